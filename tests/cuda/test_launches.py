"""How many kernels a token starts in a decoder layer, without a compiler: at small batches these take the time."""

import pytest
import torch
from rotations import by_token, rotated
from tiny_llava import write_tiny_llava
from transformers import DynamicCache

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.kernels import fused, selftest
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

MOST = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough for a rotation to have two matrices."""
    return write_tiny_llava(tmp_path_factory.mktemp("launches") / "tiny", hidden=256, layers=1, vision_layers=2)


def quantized(loaded, calibration, scheme, options, with_rotation):
    request = check_request("rtn", scheme, {"group_size": 32, "calibration_batch_size": 1, **options})
    plan = planning.obtain_plan(loaded, request, CalibrationSet(calibration.samples[1:2]), cache=None)
    loaded.model.to("cuda:0")
    return planning.apply(rotated(by_token(plan)) if with_rotation else plan, loaded, "packed")


@pytest.mark.parametrize(
    ("scheme", "options", "with_rotation", "kernel"),
    [
        ("w4a16", {}, False, "int4"),
        ("w4a4", {}, False, "int4"),
        ("w4a4", {}, True, "int4"),
        ("w4a4", {"group_scales": "progressive"}, True, "int4_codes"),
        ("w4a4", {"weights": "nf"}, False, "nf4"),
        ("w8a8", {}, False, "int8"),
        ("w8a8", {}, True, "int8"),
    ],
)
def test_launches_of_a_layer(triton_cuda, monkeypatch, folder, calibration, scheme, options, with_rotation, kernel):
    if kernel == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(selftest, "_TOKENS", (1,))
    monkeypatch.setattr(fused, "_FEATURES", 256)  # of fewer, for each of which the interpreter takes its time
    loaded = load(str(folder), dtype="bfloat16")
    assert kernel in quantized(loaded, calibration, scheme, options, with_rotation).counts
    decoder, cache = loaded.model.model.language_model, DynamicCache(config=loaded.model.config.text_config)
    layer = decoder.layers[0].forward

    def counted(*args, **kwargs):
        with triton_cuda.counting():
            return layer(*args, **kwargs)

    monkeypatch.setattr(decoder.layers[0], "forward", counted)
    for token in (40, 41):  # with the first, functions are tested
        with torch.no_grad():
            decoder(input_ids=torch.tensor([[token]]).to("cuda:0"), past_key_values=cache, use_cache=True)
    report = "\n".join(f"{count} {call}" for call, count in triton_cuda.launches.most_common())
    assert 40 <= triton_cuda.launches.total() <= MOST, report
    assert not triton_cuda.synchronizations and not triton_cuda.uploads
