import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan_request import check_calibration, check_request


@pytest.mark.parametrize(
    "method, scheme, options, message",
    [
        ("gptqq", "w4a4", {}, "method='gptqq' is not known; allowed are awq, gptq, mbq, none, qlora, quarot, qvlm, "),
        ("rtn", "w4", {}, "for example w4a4"),
        ("rtn", "w4a4", {"nrm": 2}, "unknown argument 'nrm'; method=rtn takes these options: weights, group_size"),
        ("rtn", "w4a4", {"norm": 1}, "method=rtn: norm=1.0 is used with observer=lp only"),
        ("qlora", "w4a4", {"alpha_steps": 3}, "alpha_steps=3 is used with transform=awq only"),
        ("rtn", "w4a4", {"importance": "jacobian"}, "use it with observer=lp"),
        ("qlora", "w4a4", {"importance": "modality"}, "no errors to weight; use it with transform=awq, rounding=gptq"),
        ("smoothquant", "w4a4", {"importance": "jacobian"}, "importance=jacobian has no errors to weight"),
        ("qvlm_rotated", "w4a4", {"prune": 0.5}, "prune=0.5 is used with beam=0 only"),
        (
            "qvlm_rotated", "w4a4", {"correction": 0.5, "bias_correction": True},
            "corrected biases would undo; add bias_correction=false",
        ),
        ("qvlm_rotated", "w4a4", {"token_bounds": "extremes"}, "extremes already; use max_percentile=1, token_"),
        ("none", "w4a4", {"weights": "nf"}, "these options: none"),
        ("qlora", "w4a4", {"norm": -1}, "norm=-1 is not allowed for method=qlora"),
        ("qlora", "w4a4", {"weights": "fp8"}, "weights='fp8' is not allowed"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line_and_say_what_is_allowed(method, scheme, options, message):
    with pytest.raises(QVLMError, match=message) as caught:
        check_request(method, scheme, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_calibration_data_that_are_missing_or_fewer_than_a_batch_are_named(method, calibration):
    request = check_request(method, "w4a4", {"calibration_batch_size": 6})
    message = r"calibration='memory' has 5 samples, .*calibration_batch_size=6; draw at least 6 .* to at most 5"
    with pytest.raises(QVLMError, match=message) as caught:
        check_calibration(request, calibration)
    assert "\n" not in str(caught.value)
    with pytest.raises(QVLMError, match=f"method={method} with scheme=w4a4 needs calibration data"):
        check_calibration(request, None)
    check_calibration(check_request(method, "w4a4", {"calibration_batch_size": 5}), calibration)
    check_calibration(check_request(method, "w16a16", {}), None)


@pytest.mark.parametrize(
    "method, scheme, options, needs",
    [
        ("rtn", "w4a4", {}, True),
        ("rtn", "w4a4", {"activations": "token"}, False),
        ("rtn", "w16a16+vision:w4a4", {}, False),
        ("rtn", "w4a4", {"activations": "token", "center": True}, True),
        ("quarot", "w4a4", {"rounding": "nearest"}, False),
    ],
)
def test_only_what_reads_calibration_data_needs_them(method, scheme, options, needs):
    assert check_request(method, scheme, options).needs_calibration == needs


@pytest.mark.parametrize(
    "scheme, options, weighing",
    [
        ("w4a4", {"activations": "token"}, ["tokens"]),
        ("w4a16", {}, ["tokens"]),
        ("w4a4", {}, ["jacobian"]),
        ("w4a4", {"importance": "modality"}, ["tokens"]),
        ("w4a4", {"importance": "uniform"}, []),
    ],
)
def test_tokens_are_weighted_unless_ranges_are(scheme, options, weighing):
    request = check_request("awq", scheme, {"importance": "jacobian", **options})
    steps = [step.name for step in request.method.chosen(request.scheme, request.options)]
    assert [name for name in steps if name in ("tokens", "jacobian")] == weighing


def test_progressive_scales_are_of_narrow_codes_in_groups():
    options = [check_request("qvlm_rotated", "w4a4", {"group_size": size}).options for size in (64, -1)]
    assert [one.weight_format(bits).progressive for one in options for bits in (4, 8)] == [True, False, False, False]


def test_a_method_without_batches_takes_one_sample_at_a_time():
    assert check_request("none", "w4a4", {}).batch_size == 1
    assert check_request("rtn", "w4a4", {"calibration_batch_size": 3}).batch_size == 3
