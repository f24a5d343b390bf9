"""The context of a search, which every step reads."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device
from qvlm_plugin.progress import track
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Site, Topology, blocks_of, resolve
from qvlm_plugin.workspace import Workspace


@dataclass(frozen=True, eq=False)
class SearchContext:
    """The model, the request and the calibration data of a search.

    Attributes:
        loaded: the model in full precision; a search leaves it unchanged.
        topology: the model's topology.
        scheme: bit widths.
        options: the method's options.
        calibration: calibration samples; None if no step reads them.
        method: name of the method, for the plan.
        workspace: storage of finished steps.
        footprint: limits of memory use.
        shard: this process's share of the batches.
    """

    loaded: LoadedModel
    topology: Topology
    scheme: Scheme
    options: MethodOptions
    calibration: CalibrationSet | None = None
    method: str = ""
    workspace: Workspace = field(default_factory=Workspace)
    footprint: Footprint = field(default_factory=Footprint)
    shard: Shard = field(default_factory=Shard)

    @property
    def model(self) -> nn.Module:
        """The transformers model."""
        return self.loaded.model

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the model, from the image to the answer."""
        return resolve(self.topology, self.model)

    @property
    def weight_sites(self) -> list[Site]:
        """The sites of Linears whose weights the scheme rounds."""
        return [site for site in self.sites if getattr(self.scheme, site.part).weight != UNQUANTIZED]

    @cached_property
    def activation_sites(self) -> dict[Site, ActivationFormat]:
        """The sites whose activations the scheme rounds, with their formats."""
        formats = {
            site: self.options.activation_format(site.part, getattr(self.scheme, site.part).activation)
            for site in self.sites
        }
        return {site: fmt for site, fmt in formats.items() if fmt.kind != "none"}

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """The decoder's layers with their full names, from the bottom up."""
        return self.blocks("decoder")

    def blocks(self, part: str) -> list[tuple[str, nn.Module]]:
        """A part's blocks with their full names, from the bottom up."""
        return blocks_of(self.topology, self.model, part)

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return execution_device(self.model)

    def batches(self, description: str) -> Iterator[tuple[BatchFeature, Tensor]]:
        """This process's share of `CalibrationSet.batches`, with the method's batch size and a progress display."""
        batches = self.calibration.batches(self.loaded.processor, self.options.calibration_batch_size)
        return track(islice(batches, self.share.start, self.share.stop), description, len(self.share))

    @property
    def share(self) -> range:
        """The indices of this process's batches among all batches."""
        return self.shard.own(range(-(-len(self.calibration.samples) // self.options.calibration_batch_size)))

    def recalled(self, step: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A step's outcome from the first process's workspace (`Workspace.recall`), in all processes."""
        return self.shard.first(lambda: self.workspace.recall(step))
