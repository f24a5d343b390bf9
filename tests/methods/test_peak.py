"""The formula of a search's peak memory against the bytes of tensors that are alive while it runs."""

import pytest
from live_bytes import LiveBytes
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin import plugins
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.peak import Setting, Shapes, peaks
from qvlm_plugin.methods.qvlm import dependency
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

METHODS = {
    "ranges": ("rtn", {}),
    "ranges of tokens": ("qlora", {"activations": "token"}),
    "biases": ("qlora", {"bias_correction": True}),
    "scales": ("awq", {"alpha_steps": 2}),
    "scales by gradients": ("mbq", {"alpha_steps": 2}),
    "smoothing": ("smoothquant", {}),
    "gptq": ("gptq", {}),
    "gptq, corrected": ("quarot", {"correction": 0.1}),
    # Blocks as deep as may be: what the formula is of.
    "tower, blocks": ("qvlm", {"veo_epochs": 1, "h0": 0, "percentile_step": 0.02}),
    "tower without checkpointing": ("qvlm", {"veo_epochs": 1, "veo_checkpointing": False, "cdm": False}),
    # With the dependencies before the training.
    "tower, layers": ("qvlm", {"veo_epochs": 1, "max_depth": 1, "percentile_step": 0.02}),
    "tower, whole decoder": ("qvlm_jacobian", {"veo_epochs": 1, "veo_decoder": "full"}),
    "rotated tower": ("qvlm_rotated", {"veo": True, "veo_epochs": 1}),
    "layers": ("qvlm", {"veo": False, "h0": 0, "max_depth": 1}),
    "layers, quantiles": ("qvlm", {"veo": False, "h0": 0, "max_depth": 1, "reading": "quantile"}),
    "sites": (
        "qvlm",
        {"veo": False, "h0": 0, "unit": "site", "beam": 2, "reading": "quantile", "percentile_step": 0.02},
    ),
}
"""What searches do, with the methods that do it."""

SHAPES = {"wide": (256, 2, 24, 50), "deep": (160, 4, 24, 30), "wide tower": (64, 2, 512, 30)}
"""Width and depth of the decoder, width of the tower, words of a sample."""

# Elsewhere than in a deep decoder, each step that can be the largest.
CASES = [("deep", name) for name in METHODS if name != "layers, quantiles"]
CASES += [(shape, name) for shape in ("wide", "wide tower") for name in ("ranges of tokens", "gptq", "tower, blocks")]
CASES += [("wide", "layers, quantiles")]
CASES += [("wide tower", name) for name in ("tower without checkpointing", "rotated tower")]


@pytest.fixture(scope="module")
def shape(request, tmp_path_factory):
    """A model whose decoder has some width and depth, and its tower some width; and four samples of many words, two to
    a batch, of which one has padding."""
    hidden, layers, tower, words = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("peak") / "model"
    write_tiny_llava(folder, hidden=hidden, layers=layers, vision_hidden=tower)
    texts = ("what is this " * (words - index % 2) for index in range(4))
    samples = (Sample(Conversation.from_prompt(text, [random_image(i)]), "that one") for i, text in enumerate(texts))
    return load(str(folder), dtype="float32"), CalibrationSet(tuple(samples))


@pytest.mark.parametrize("shape, name", CASES, indirect=["shape"])
def test_the_formula_is_within_a_fifth_of_what_is_alive(name, shape, monkeypatch):
    # What is the same for every model must not hide what is not.
    monkeypatch.setattr(dependency, "CHUNK", 2**15)
    monkeypatch.setattr(dependency, "MAX_ELEMENTS", 2**12)
    loaded, samples = shape
    method, options = METHODS[name]
    request = check_request(method, "w4a4", {"calibration_batch_size": 2, **options})
    encoded = samples.encoded(loaded.processor, 2)
    topology, setting = plugins.topology(loaded.model.config), Setting(4, max(encoded.lengths), 1, 4, accelerator=False)
    context = SearchContext(loaded, topology, request.scheme, request.options, encoded, method)
    found = peaks(Shapes.of(loaded.model, topology), request.method, request.scheme, request.options, setting)
    draft = Draft()
    for step, peak in zip(request.method.chosen(request.scheme, request.options), found, strict=True):
        with LiveBytes(*loaded.model.parameters()) as live:
            draft = step.run(context, draft)
        assert step.name == peak.step
        assert live.peak == pytest.approx(peak.bytes, rel=0.2), (step.name, peak.largest)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_what_waits_on_the_cpu_does_not_count_on_an_accelerator(shape):
    loaded, _ = shape
    shapes = Shapes.of(loaded.model, plugins.topology(loaded.model.config))
    request = check_request("qvlm", "w4a4", {})

    def largest(**setting):
        found = peaks(shapes, request.method, request.scheme, request.options, Setting(**setting))
        return found[-1].bytes  # of the joint search; in a model as small as this a chunk of l_p losses takes more

    device = largest()
    on_cpu, few = (largest(footprint=Footprint(caches_on_cpu=True, rows=rows)) for rows in (None, 1))
    offloaded = largest(footprint=Footprint(caches_on_cpu=True), offloaded=True)
    assert offloaded < few <= on_cpu < device
    assert largest(samples=16) < device < largest(tokens=900)
