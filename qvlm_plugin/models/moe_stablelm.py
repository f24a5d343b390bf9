"""StableLM with sparse mixture-of-experts layers: the language model of MoE-LLaVA-StableLM, for transformers.

This is transformers' own StableLM; in the layers named by ``moe_layers``, experts replace the MLP. Each token goes to
two experts (Lin et al., 2024, "MoE-LLaVA", after DeepSpeed's gating): the likeliest and the second likeliest, weighted
by their probabilities divided by their sum. An expert processes all tokens that choose it: at the evaluation capacity
of the released checkpoints no token is dropped, and checkpoints with a smaller capacity are refused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, StableLmModel
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from qvlm_plugin.models.moe_stablelm_config import MoEStableLmConfig


class RoutedExpert(StableLmMLP):
    """An MLP that processes some of the tokens."""

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """The outputs [n, C] for the tokens [N, C] at ``rows`` [n]."""
        return super().forward(tokens[rows])


class Router(nn.Linear):
    """The Linear that scores experts, in float32 whatever the compute type."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [N, C] → logits float32 [N, E]."""
        return F.linear(tokens.float(), self.weight.float())


class SparseExperts(nn.Module):
    """Experts, of which two process each token."""

    def __init__(self, config: MoEStableLmConfig, layer_index: int) -> None:
        super().__init__()
        self.router = Router(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(RoutedExpert(config) for _ in range(config.num_experts))
        self.seed = None if config.router_noise_seed is None else config.router_noise_seed + layer_index

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, C] → [B, T, C]."""
        tokens = hidden.flatten(0, -2)
        chosen, shares = route(self.router(tokens), self.seed)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, rank = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                share = shares[rows, rank].unsqueeze(1).to(tokens.dtype)
                output.index_add_(0, rows, expert(tokens, rows) * share)
        return output.view_as(hidden)


def route(logits: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """The two experts of each token.

    Args:
        logits: float32 [N, E].
        seed: seed of the noise in the choice of the second expert; None adds no noise.

    Returns:
        Indices int64 [N, 2], first the expert with the largest logit; and their shares float32 [N, 2], which sum to 1.
    """
    first = logits.argmax(dim=1, keepdim=True)
    noisy = logits if seed is None else logits + gumbel_noise(logits, seed)
    second = noisy.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
    chosen = torch.cat([first, second], dim=1)
    probabilities = logits.softmax(dim=1).gather(1, chosen)
    return chosen, probabilities / probabilities.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)


def gumbel_noise(logits: Tensor, seed: int) -> Tensor:
    """Noise of the standard Gumbel distribution in the shape of ``logits`` [N, E].

    It is a hash of the seed and of each token's logits, so it depends neither on other tokens nor on earlier calls.
    """
    columns = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    bits = logits.detach().contiguous().view(torch.int32).long()
    token = _scramble((bits * (2 * columns + 1)).sum(dim=1, keepdim=True) + seed)
    uniform = ((_scramble(token + columns) >> 8) & 0xFFFFFF).double().add(0.5) / 2**24
    return -(-uniform.log()).log().to(logits.dtype)


def _scramble(x: Tensor) -> Tensor:
    """A bijection of int64 that maps close numbers far apart (the finalizer of MurmurHash3)."""
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return x ^ ((x >> 33) & 0x7FFFFFFF)


class MoEStableLmModel(StableLmModel):
    """StableLM with experts in some layers."""

    config_class = MoEStableLmConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoEStableLmConfig) -> None:
        super().__init__(config)
        for index in config.moe_layers:
            self.layers[index].mlp = SparseExperts(config, index)
        self.post_init()


AutoModel.register(MoEStableLmConfig, MoEStableLmModel, exist_ok=True)
