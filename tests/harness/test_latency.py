import time

import pytest
import torch

from qvlm_plugin.harness.latency import FirstToken, Latency, summary


def test_the_first_call_is_recorded_and_generation_continues():
    first = FirstToken()
    before = time.perf_counter()
    assert not first(torch.zeros(3, 5), None).any()
    noted = first.time
    assert before <= noted <= time.perf_counter() and len(first(torch.zeros(3, 6), None)) == 3 and first.time == noted


def test_tokens_after_the_first_share_the_remaining_time():
    assert Latency.of(2, (1.0, 1.5, 3.5), 5) == Latency(2, 0.5, 0.5)
    assert Latency.of(1, (1.0, 1.5, 1.5), 1).per_token is None


def test_requests_count_not_batches():
    found = summary([Latency(3, 1.0, 0.1), Latency(1, 5.0, None)])
    assert found["requests"] == 4
    assert found["time_to_first_token"] == {"mean": 2.0, "median": 1.0, "p90": pytest.approx(3.8)}
    assert found["time_per_output_token"] == pytest.approx({"mean": 0.1, "median": 0.1, "p90": 0.1})
    assert summary([]) is None and summary([Latency(1, 1.0, None)])["time_per_output_token"] is None
