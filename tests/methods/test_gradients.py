import torch
from torch import nn

from qvlm_plugin.methods.gradients import last_positions


def test_the_head_reads_the_last_positions_without_copying_its_weight_for_each_row():
    head = nn.Linear(4, 1000, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 6, 4, requires_grad=True)
    positions = last_positions(torch.zeros(3, 6), 2)
    assert positions.tolist() == [4, 5]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits = head(hidden[:, positions, :])
    assert torch.allclose(logits, head(hidden[:, -2:, :]), atol=1e-6)
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}
