from math import sqrt

import numpy as np
import pytest
import statsmodels.api as sm
from report.paired_runs import values_of
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from qvlm_plugin.report.estimates import clustered_mean, score_estimate


def test_without_clusters_it_is_the_paired_t_interval():
    values = values_of(40) - values_of(40, seed=1)
    estimate = clustered_mean([values], [np.arange(40)])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.value, estimate.error) == pytest.approx((values.mean(), stats.sem(values)))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_clustered_error_equals_the_sandwich_of_a_regression():
    values, clusters = values_of(60), np.random.default_rng(5).integers(0, 17, 60)
    fit = sm.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert clustered_mean([values], [clusters]).error == pytest.approx(fit.bse[0])


def test_duplicated_documents_in_clusters_keep_the_error():
    values, clusters = values_of(30), np.arange(30)
    once, twice = clustered_mean([values], [clusters]), clustered_mean([np.tile(values, 2)], [np.tile(clusters, 2)])
    assert (twice.value, twice.error, twice.high) == pytest.approx((once.value, once.error, once.high))
    apart = clustered_mean([np.tile(values, 2)], [np.arange(60)])
    assert apart.error < 0.75 * once.error


def test_the_average_is_stratified_by_task():
    tasks = [values_of(30), values_of(80, seed=1), values_of(7, seed=2)]
    clusters = np.split(np.arange(117), [30, 110])
    average = clustered_mean(tasks, clusters)
    assert average.value == pytest.approx(np.mean([task.mean() for task in tasks]))
    assert average.error == pytest.approx(sqrt(sum(stats.sem(task) ** 2 for task in tasks)) / 3)
    shared = clustered_mean([tasks[0], tasks[0]], [clusters[0], clusters[0]])  # one set of images in two tasks
    assert shared.error == pytest.approx(stats.sem(tasks[0]))


def test_one_cluster_has_no_error():
    estimate = clustered_mean([np.array([0.0, 1.0])], [np.array([0, 0])])
    assert estimate.value == 0.5 and np.isnan(estimate.error)


def test_the_average_of_shares_uses_the_effective_count():
    values, clusters = [np.ones(4), np.ones(12)], [np.arange(4), np.arange(4, 16)]
    estimate = score_estimate(clustered_mean(values, clusters), values, clusters)
    assert estimate.low == pytest.approx(proportion_confint(12, 12, method="wilson")[0])  # 2² / (1/4 + 1/12) is 12
    twice = [np.repeat(task, 2) for task in clusters]  # documents that share images are no more sure
    doubled = score_estimate(estimate, [np.ones(8), np.ones(24)], twice)
    assert doubled.low == estimate.low
    values[1] = 1 - (np.arange(12) < 5.0)
    assert not score_estimate(clustered_mean(values, clusters), values, clusters).wilson  # five of either kind
