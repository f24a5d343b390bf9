from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from qvlm_plugin.report.compare.comparison import choose_test
from qvlm_plugin.report.paired import compare
from qvlm_plugin.report.samples import Document, RunSamples


def run(scores, images=None):
    images = images or [None] * len(scores)
    documents = [
        Document(index, "red", f"question {index}", str(score), image, {"exact_match": float(score)})
        for index, (score, image) in enumerate(zip(scores, images, strict=True))
    ]
    return RunSamples(Path("run"), None, {"quiz": tuple(documents)})


def chosen(one, other, images=None):
    baseline, compared = run(one, images), run(other, images)
    (row,) = compare(baseline, compared, "exact_match")
    return choose_test(row, baseline, compared, "exact_match")


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_0_and_1_are_tested_by_mcnemar(seed):
    generator = np.random.default_rng(seed)
    one, other = generator.integers(0, 2, 40), generator.integers(0, 2, 40)
    table = [[((one == a) & (other == b)).sum() for b in (1, 0)] for a in (1, 0)]
    name, p = chosen(one, other)
    assert name == "McNemar" and p == pytest.approx(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_soft_scores_are_tested_by_students_t(seed):
    generator = np.random.default_rng(seed)
    one, other = generator.choice([0, 0.3, 0.6, 1], 40), generator.choice([0, 0.3, 0.6, 1], 40)
    name, p = chosen(one, other)
    assert name == "paired t" and p == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_documents_that_share_an_image_are_not_independent():
    one, other = [1] * 12, [0] * 12
    name, p = chosen(one, other, [f"picture {index // 4}" for index in range(12)])
    assert name == "sign flip" and p == pytest.approx(2 * 0.5**3)
    assert chosen(one, other)[1] == pytest.approx(2 * 0.5**12)


def test_equal_runs():
    assert chosen([1, 0, 1], [1, 0, 1]) == ("McNemar", 1.0)
    assert chosen([0.3, 0.6, 1], [0.3, 0.6, 1]) == ("paired t", 1.0)
