"""What tests of paired comparisons share."""

from itertools import product

import numpy as np
from report.logged import write_run

from qvlm_plugin.report.samples import read_samples

SOFT = [0, 0.3, 0.6, 0.9, 1]
"""Scores between wrong and right, as VQA metrics give them."""

FIRST, SECOND = [1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0]
"""Scores of two runs on the same six documents."""

_SIGNS = {count: list(product((-1, 1), repeat=count)) for count in range(1, 11)}


def enumerated_p(sums):
    """The sign-flip test's p by trying all signs; at most 10 sums."""
    totals = [abs(sum(sign * value for sign, value in zip(signs, sums, strict=True))) for signs in _SIGNS[len(sums)]]
    return sum(total >= abs(sum(sums)) - 1e-9 for total in totals) / len(totals)


def values_of(count, seed=0):
    """Random scores."""
    return np.random.default_rng(seed).choice(SOFT, count)


def write_runs(folder, *runs, **provenance):
    """Runs of samples by task; read back."""
    files = [
        write_run(folder / str(index), tasks, qvlm={"method": f"m{index}", "scheme": "w4a4", **provenance})
        for index, tasks in enumerate(runs)
    ]
    return [run for file in files for run in read_samples(file)]
