"""The page's colours: contrast, and whether people with any kind of colour vision tell them apart."""

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

CSS = files("qvlm_plugin.report.leaderboard").joinpath("web", "page.css").read_text()

# Machado, Oliveira and Fernandes 2009, severity 1.0; for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def theme(name):
    """The colours of a theme by their names."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]+);", blocks[("light", "dark").index(name)]))


def linear(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = np.array([int(digits[start : start + 2], 16) for start in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """By WCAG 2."""
    high, low = sorted((float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def oklab(rgb):
    """Ottosson's OKLab of linear RGB."""
    lms = np.cbrt(
        np.array(
            [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
        )
        @ rgb.clip(0, 1)
    )
    mix = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
    return np.array(mix) @ lms


def distances(colours, vision):
    """Between all pairs, in OKLab."""
    seen = [oklab(np.array(VISIONS[vision]) @ linear(one)) for one in colours]
    return [float(np.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2)]


def methods(name):
    return [colour for key, colour in theme(name).items() if re.fullmatch(r"c\d", key)]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_contrast(name):
    colours = theme(name)
    backs = [colours["back"], colours["stripe"]]
    assert len(methods(name)) == 7
    for back in backs:
        assert min(contrast(one, back) for one in [*methods(name), colours["edge"]]) >= 3
        assert min(contrast(colours[each], back) for each in ("text", "quiet", "warn", "link")) >= 4.5


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_are_distinguishable(name, vision):
    # Of Okabe and Ito's palette, made for this, the closest pair is 0.076 apart by the same measure.
    assert min(distances([*methods(name), theme(name)["text"]], vision)) > 0.07


def test_measures():
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )
    assert oklab(linear("#ffffff")) == pytest.approx([1, 0, 0], abs=1e-3)
    assert distances(["#00ff00", "#ff0000"], "deuteranopia")[0] < distances(["#00ff00", "#ff0000"], "normal")[0] / 2
