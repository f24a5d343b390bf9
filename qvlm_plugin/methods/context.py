"""What every step of a search works on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import BatchFeature

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device
from qvlm_plugin.progress import track
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Site, Topology, decoder_layers, resolve
from qvlm_plugin.workspace import Workspace


@dataclass(frozen=True, eq=False)
class SearchContext:
    """A model, what to make of it, and the data to fit that on.

    Attributes:
        loaded: the model in full precision; a search leaves it as it was.
        topology: where its parts are.
        scheme: bit widths.
        options: of the method.
        calibration: None where no step looks at data.
        method: name of the method, for the plan.
        workspace: where finished steps are kept.
        footprint: how much memory may be taken at a time.
    """

    loaded: LoadedModel
    topology: Topology
    scheme: Scheme
    options: MethodOptions
    calibration: CalibrationSet | None = None
    method: str = ""
    workspace: Workspace = field(default_factory=Workspace)
    footprint: Footprint = field(default_factory=Footprint)

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

    @property
    def activation_sites(self) -> dict[Site, ActivationFormat]:
        """The sites whose activations the scheme rounds, with their formats."""
        formats = {
            site: self.options.activation_format(site.part, getattr(self.scheme, site.part).activation)
            for site in self.sites
        }
        return {site: fmt for site, fmt in formats.items() if fmt.kind != "none"}

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """The decoder's layers with their full names, bottom to top."""
        return decoder_layers(self.topology, self.model)

    @property
    def device(self) -> Any:
        """Where the model's inputs go."""
        return execution_device(self.model)

    def batches(self, description: str) -> Iterator[tuple[BatchFeature, Tensor]]:
        """`CalibrationSet.batches` of the method's batch size, with progress."""
        size = self.options.calibration_batch_size
        batches = self.calibration.batches(self.loaded.processor, size)
        return track(batches, description, -(-len(self.calibration.samples) // size))
