from math import comb, sqrt

import numpy as np
import pytest
from report.paired_runs import SOFT, enumerated_p
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from qvlm_plugin.report import significance
from qvlm_plugin.report.significance import holm, sign_flip_p


@pytest.mark.parametrize("fell, rose", [(0, 0), (1, 0), (5, 5), (3, 11), (40, 7), (400, 90), (1, 200)])
def test_it_equals_mcnemars_exact_test_for_0_1_scores(fell, rose):
    count = fell + rose
    p = sign_flip_p(np.repeat([-1.0, 1.0, 0.0], (fell, rose, 50)) / (count + 50))
    assert p == pytest.approx(mcnemar([[30, fell], [rose, 20]], exact=True).pvalue, rel=1e-9)
    tail = sum(comb(count, k) for k in range(min(fell, rose) + 1))
    assert p == pytest.approx(min(1, 2 * tail / 2**count), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_exact_for_any_differences(seed):
    generator = np.random.default_rng(seed)
    real = generator.normal(0.4, 1, 9)
    soft = (generator.choice(SOFT, 10) - generator.choice(SOFT, 10)) / 30
    for sums in (real, soft, np.concatenate((soft[:5], real[:4]))):
        assert sign_flip_p(sums) == pytest.approx(enumerated_p(sums), rel=1e-9)
        assert sign_flip_p(-sums) == pytest.approx(sign_flip_p(sums), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_and_exact_p_agree(monkeypatch, seed):
    generator = np.random.default_rng(seed)
    sums = np.concatenate((generator.choice([-0.3, 0.1, 0.6], 60), generator.choice([-1.0, 1.0], 40)))
    exact = sign_flip_p(sums)
    monkeypatch.setattr(significance, "_SUPPORT", 50)
    drawn = sign_flip_p(sums)
    assert drawn != exact and drawn == sign_flip_p(sums)
    assert drawn == pytest.approx(exact, abs=5 * sqrt(exact * (1 - exact) / 99_999) + 1e-5)
    assert sign_flip_p(np.abs(sums)) == 1 / 100_000  # never 0


def test_it_agrees_with_scipys_permutation_test():
    sums = np.random.default_rng(0).normal(0.1, 1, 60)
    expected = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=9999, rng=0).pvalue
    assert sign_flip_p(sums) == pytest.approx(expected, abs=0.02) and 0.05 < expected < 0.95


def test_differences_that_cancel_in_each_cluster_are_no_evidence():
    assert sign_flip_p(np.array([0.1 + 0.2 - 0.3] * 20)) == 1


def test_holm_is_monotone_and_adds_nothing_to_one_comparison():
    ps = np.random.default_rng(0).uniform(0, 0.1, 12).tolist()
    adjusted = holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    assert np.argsort(adjusted, kind="stable").tolist() == sorted(range(12), key=lambda i: (adjusted[i], i))
    assert holm([0.04]) == [0.04]


@pytest.mark.parametrize("ps", [[0.04, 0.01, 0.01, 1.0], [0.9, 0.5, 0.7], [0.2] * 5, list(np.linspace(1e-6, 0.2, 40))])
def test_holm_agrees_with_statsmodels(ps):
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1].tolist(), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
def test_the_fair_binomial_is_scipys(count):
    expected = stats.binom.pmf(np.arange(count + 1), count, 0.5)
    assert significance._fair_binomial(count) == pytest.approx(expected, rel=1e-9, abs=1e-300)
