import dataclasses

import pytest
import torch
from searching import context_of

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.importance import visit_jacobians
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantizers import fake_quantize
from qvlm_plugin.report.ablations.sources import TOKENS, error_sources, sources_report, token_kinds

OPTIONS = {"calibration_batch_size": 2}


def plan_of(loaded, calibration, **options):
    request = check_request("qlora", "w3a3", {**OPTIONS, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


def halves(calibration):
    return CalibrationSet(calibration.samples[:3]), CalibrationSet(calibration.samples[3:])


def test_every_token_has_the_kind_that_it_is():
    ids = torch.tensor([[0, 0, 7, 9, 9, 5, 6], [7, 9, 9, 4, 4, 5, 6]])
    attended = ids != 0
    answer = torch.zeros_like(attended)
    answer[:, -2:] = True
    names = [TOKENS[kind] for kind in token_kinds(ids, attended, answer, image_token=9)]
    assert names == ["first", "image", "answer", "answer", "text", *("first", "image", "image", "text"), *(
        "answer", "answer", "text")]  # fmt: skip


def test_sources_are_weighed_errors_and_add_up_over_kinds_and_batches(loaded, calibration):
    fitted, apart = halves(calibration)
    plan = plan_of(loaded, fitted)
    sources = error_sources(loaded, plan, apart, 1)
    context = context_of(loaded, apart)
    sites = [site for site in context.sites if site.part == "decoder"]

    def visit(site, x, jacobian, batch):
        bounds = (plan.tensors[f"{site.name}/{bound}"] for bound in ("lower", "upper"))
        return ((fake_quantize(x, *bounds, 3) - x) * jacobian).square().sum() / 2

    expected, _ = visit_jacobians(context, sites, visit)
    assert list(sources) == sites
    for site in sites:
        assert float(sources[site].sum()) == pytest.approx(float(expected[site]), rel=1e-3)
    assert all(float(sum(sources.values())[TOKENS.index(kind)]) > 0 for kind in TOKENS)


def test_the_report_shows_every_plan_on_held_out_samples(loaded, calibration, tmp_path):
    fitted, _ = halves(calibration)
    calibration = dataclasses.replace(calibration, source="task:train:5")
    plans = {"site": plan_of(loaded, fitted), "channel": plan_of(loaded, fitted, ranges="channel")}
    file = sources_report(loaded, plans, calibration, 2, "qvlm ablate sources out").write(tmp_path)
    text = file.read_text()
    assert "mean over 2 samples" in text and "| channel | down_proj |" in text and "| site | all |" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".png", ".svg"}
    with pytest.raises(QVLMError, match="calibrated on all samples"):
        sources_report(loaded, plans, dataclasses.replace(fitted, source="task:train:3"), 2, "")
