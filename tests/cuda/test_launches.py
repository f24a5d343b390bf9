"""How many kernels a token starts in a decoder layer, without a compiler: at small batches these take the time."""

import pytest
import torch
from rotations import by_token, rotated
from tiny_llava import write_tiny_llava
from transformers import DynamicCache

from qvlm_plugin import planning
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with one and with two decoder layers."""
    base = tmp_path_factory.mktemp("launches")
    return [write_tiny_llava(base / f"{layers}", hidden=256, layers=layers) for layers in (1, 2)]


def launches(cuda, folders, calibration, scheme, options, turned):
    """Of the second layer, for one token."""
    counts = []
    for folder in folders:
        loaded = load(str(folder), dtype="bfloat16")
        if scheme != "w16a16":
            request = check_request("rtn", scheme, {"group_size": 32, "calibration_batch_size": 5, **options})
            plan = planning.obtain_plan(loaded, request, calibration, cache=None)
            plan = rotated(by_token(plan)) if turned else plan
        loaded.model.to("cuda:0")
        if scheme != "w16a16":
            planning.apply(plan, loaded, "packed")
        decoder, cache = loaded.model.model.language_model, DynamicCache(config=loaded.model.config.text_config)
        with torch.no_grad():
            for tokens in (torch.arange(5, 13), torch.tensor([40])):
                with cuda.counting():
                    decoder(input_ids=tokens[None].to("cuda:0"), past_key_values=cache, use_cache=True)
        counts.append(cuda.launches)
    assert not cuda.synchronizations
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("scheme", "options", "turned", "most"),
    [
        ("w16a16", {}, False, 56),
        ("w4a16", {}, False, 56),
        ("w4a4", {}, False, 60),
        ("w4a4", {}, True, 72),
        ("w8a8", {}, False, 64),
        ("w8a8", {}, True, 72),
        ("w4a4", {"weights": "nf"}, False, 60),
    ],
)
def test_launches_of_a_layer(cuda, folders, calibration, scheme, options, turned, most):
    if "nf" in options.values():
        pytest.importorskip("bitsandbytes")
        options = {**options, "group_size": 128}
    counted = launches(cuda, folders, calibration, scheme, options, turned)
    report = "\n".join(f"{count} {call}" for call, count in counted.most_common())
    print(counted.total(), report)
    assert counted.total() <= most, report
