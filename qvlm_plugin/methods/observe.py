"""Run calibration data through a model and look at what its Linears read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device
from qvlm_plugin.topology import Site


@torch.inference_mode()
def visit_site_inputs(
    loaded: LoadedModel,
    sites: Sequence[Site],
    calibration: CalibrationSet,
    batch_size: int,
    visit: Callable[[Site, Tensor], None],
    description: str,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Call ``visit(site, tokens)`` for every batch, with the input of each site as tokens [N, C] without padding.

    Args:
        loaded: the model in full precision.
        sites: whose inputs to look at.
        calibration: prompts with their answers, so that the positions of decoding are seen too.
        batch_size: samples per forward pass.
        visit: called in the order of the computation.
        description: for the progress bar.
        scales: by site name, what to divide its channels by [C], as folding these scales would.

    Raises:
        QVLMError: an input is not finite; the message names the site.
    """
    model, device = loaded.model, execution_device(loaded.model)
    for inputs, _ in track(
        calibration.batches(loaded.processor, batch_size),
        description=description,
        total=-(-len(calibration.samples) // batch_size),
        console=Console(stderr=True),
    ):
        with _looking(model, sites, inputs["attention_mask"].bool(), visit, scales or {}):
            model(**to_device(inputs, device, model.dtype), use_cache=False, logits_to_keep=1)


@contextmanager
def _looking(
    model: nn.Module,
    sites: Sequence[Site],
    attended: Tensor,
    visit: Callable[[Site, Tensor], None],
    scales: Mapping[str, Tensor],
) -> Iterator[None]:
    """While active, every forward pass shows its sites' inputs to ``visit``; ``attended`` [B, T] leaves out padding."""

    def look(site: Site, module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        tokens = x[attended.to(x.device)] if site.part == "decoder" else x.flatten(0, -2)
        if not tokens.isfinite().all():
            raise QVLMError(f"the input of {site.name} is not finite on calibration data; try dtype=float32")
        visit(site, tokens / scales[site.name].to(tokens) if site.name in scales else tokens)

    handles = [model.get_submodule(site.name).register_forward_pre_hook(partial(look, site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
