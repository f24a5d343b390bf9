import pytest

from qvlm_plugin.report.shares import PERCENT, number_text


@pytest.mark.parametrize(
    ("points", "text"),
    [(-0.53, "-0.5"), (0.06, "+0.1"), (-0.04, "-0.04"), (0.0031, "+0.003"), (-1e-13, "+0.0"), (0.0, "+0.0")],
)
def test_a_difference_that_rounds_to_0_shows_its_sign(points, text):
    assert number_text(points / PERCENT, PERCENT, signed=True) == text


def test_scores_and_other_metrics_have_their_own_digits():
    assert number_text(0.0004, PERCENT) == "0.0"
    assert number_text(-0.0004, 1, signed=True) == "-0.0004"
