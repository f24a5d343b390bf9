"""How much a rounding error matters: the Jacobian of the answers with respect to what the decoder computes.

The l_p distance of section 4.1 and the block error of Eq. 3 count all tokens and channels alike. But an error e in an
activation x moves the answer by about e · ∂m/∂x, and these Jacobians differ by orders of magnitude: to most image
tokens of the upper layers no answer listens any more, while all attention rests on the first token.
``importance=jacobian`` therefore weighs squared errors with (∂m/∂x)² - the diagonal of a Gauss-Newton matrix - where m
is the log-odds of the answers' tokens in the full-precision model: each element when ranges are searched, each token in
the error of a block.

The paper uses Jacobians for weighing layers (Eq. 8). That elements are weighed by them, and that each channel gets a
ratio of its own, is our deviation and off by default.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.blocks import TokenWeights
from qvlm_plugin.methods.gradients import LOSS_SCALE, checkpointed, frozen, last_positions
from qvlm_plugin.methods.observe import watching
from qvlm_plugin.methods.options import RangeSearchOptions
from qvlm_plugin.methods.rtn import observe_ranges
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device
from qvlm_plugin.observers import best_ratio, channel_lp_losses
from qvlm_plugin.quantizers import widen
from qvlm_plugin.topology import Site, Topology, decoder_layers


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p/(1 - p) of the given tokens. Unlike log p, its gradient does not vanish where the model is sure.

    Args:
        logits: [N, V].
        tokens: int64 [N].

    Returns:
        [N], float32 or wider.
    """
    logits, index = widen(logits), tokens.unsqueeze(1)
    others = logits.scatter(1, index, float("-inf"))
    return logits.gather(1, index).squeeze(1) - others.logsumexp(dim=1)


def visit_jacobians(
    loaded: LoadedModel,
    topology: Topology,
    sites: Sequence[Site],
    calibration: CalibrationSet,
    batch_size: int,
    visit: Callable[[Site, Tensor, Tensor], None],
) -> TokenWeights:
    """Run the calibration set forwards and backwards, and show each site's input and Jacobian to ``visit``.

    Args:
        loaded: the model in full precision.
        topology: its parts.
        sites: of the decoder.
        calibration: samples with answers.
        batch_size: samples per pass.
        visit: called as ``visit(site, tokens, jacobian)`` from the top of the decoder to its bottom, for every batch:
            the input [N, C] of the site without padding, and the gradient [N, C] of the summed log-odds of all answer
            tokens with respect to it.

    Returns:
        ‖∂m/∂x‖² at each token of each decoder layer's output.

    Raises:
        QVLMError: a Jacobian is not finite.
    """
    model, device = loaded.model, execution_device(loaded.model)
    layers = decoder_layers(topology, model)
    weights: TokenWeights = [[] for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(model))
        stack.enter_context(checkpointed([layer for _, layer in layers]))
        for inputs, answer in track(
            calibration.batches(loaded.processor, batch_size),
            description="importance",
            total=-(-len(calibration.samples) // batch_size),
            console=Console(stderr=True),
        ):
            longest, placed = int(answer.sum(dim=1).max()), to_device(inputs, device, model.dtype)
            with _listening(model, topology, sites, inputs["attention_mask"].bool(), visit, weights):
                kept = last_positions(answer, longest + 1)
                logits = model(**placed, use_cache=False, logits_to_keep=kept).logits[:, :-1]
            said = answer[:, -longest:].to(logits.device)
            tokens = placed["input_ids"][:, -longest:].to(logits.device)
            (log_odds(logits[said], tokens[said]).sum() * LOSS_SCALE).backward()
    return weights


@contextmanager
def _listening(
    model: nn.Module,
    topology: Topology,
    sites: Sequence[Site],
    attended: Tensor,
    visit: Callable[[Site, Tensor, Tensor], None],
    weights: TokenWeights,
) -> Iterator[None]:
    """While active, forward passes prepare for the backward pass to come to show its gradients."""

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # No parameter takes gradients: the graph begins at the decoder's input.
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].detach().requires_grad_()}

    def look(site: Site, x: Tensor, mask: Tensor) -> None:
        def show(gradient: Tensor) -> None:
            jacobian = widen(gradient[mask]) / LOSS_SCALE
            if not jacobian.isfinite().all():
                raise QVLMError(f"the Jacobian at the input of {site.name} is not finite; try dtype=float32")
            visit(site, x.detach()[mask], jacobian)

        x.register_hook(show)

    def weigh(index: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.register_hook(
            lambda gradient: weights[index].append((widen(gradient) / LOSS_SCALE).square().sum(dim=-1).float())
        )

    handles = [model.get_submodule(topology.decoder_path).register_forward_pre_hook(begin, with_kwargs=True)]
    for index, (_, layer) in enumerate(decoder_layers(topology, model)):
        handles.append(layer.register_forward_hook(partial(weigh, index)))
    try:
        with watching(model, sites, attended, look):
            yield
    finally:
        for handle in handles:
            handle.remove()


def search_important_ranges(
    loaded: LoadedModel,
    topology: Topology,
    sites: Sequence[Site],
    bits: int,
    calibration: CalibrationSet,
    options: RangeSearchOptions,
) -> tuple[dict[str, Tensor], TokenWeights]:
    """For each channel of static decoder sites, the ratio of least weighted distance; ties keep the wider range.

    Returns:
        The plan tensors of the sites, and what `visit_jacobians` returns.
    """
    statistics = observe_ranges(loaded, list(sites), calibration, options.calibration_batch_size)
    losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def visit(site: Site, tokens: Tensor, jacobian: Tensor) -> None:
        seen, weights = statistics[site.name], jacobian.float().square()
        new = channel_lp_losses(tokens, seen, options.ratios, bits, options.norm, weights)
        losses[site.name] = losses[site.name] + new if site.name in losses else new

    token_weights = visit_jacobians(loaded, topology, sites, calibration, options.calibration_batch_size, visit)
    tensors = {}
    for name, loss in losses.items():
        bounds = statistics[name].range(best_ratio(loss, options.ratios))
        tensors[f"{name}/lower"], tensors[f"{name}/upper"] = bounds
    return tensors, token_weights
