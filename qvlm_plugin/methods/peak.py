"""The peak memory of each step of a search, computed from the shapes of a model. No weight is loaded.

A step's peak is that of its largest phase, and a phase is the sum of its terms. Symbols, here and in the code:

=======  =========================================================================================================
e        bytes of an element in the compute type: 2, or 4 in float32; statistics, rounding and l_p losses take 4
n        tokens that go through a layer together: samples of a batch (or `Footprint.rows`) times tokens
N        tokens of the whole calibration set, padding included: samples times tokens
C, I     width of a part's hidden states, and the widest input of its Linears (an MLP's)
ΣK       input widths of all sites of a block together: 3C + I in a Llama layer
L        blocks of the part
O·K      elements of the largest Linear
=======  =========================================================================================================

Only tensors are counted, not the allocator's overhead and the workspaces of kernels. Attention is that of torch's fused
kernels; an implementation that materializes all scores takes n · heads · tokens · 4 bytes more. On a CPU, rounding
works on slices (`qvlm_plugin.quantizers.by_rows`). Without an accelerator, terms that would wait on the CPU count, too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from qvlm_plugin import observers, quantizers
from qvlm_plugin.methods.base import Method
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm import dependency, mining
from qvlm_plugin.rotation import rotation_of
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import ORDER, Site, Topology, blocks_of, resolve

ANSWER = 16
"""Rough number of answer tokens, for which logits are computed."""


@dataclass(frozen=True)
class Part:
    """A stack of blocks; widths are those of the first block with the most sites.

    Attributes:
        blocks: L, the number of blocks with sites.
        hidden: C, the width of hidden states.
        sites: input widths of a block's sites.
        linears: shapes [O, K] of a block's Linears that have sites.
        elements: number of elements of a block's weights, norms included.
    """

    blocks: int
    hidden: int
    sites: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]
    elements: int

    @property
    def widest(self) -> int:
        """I, the widest input of a block's Linears."""
        return max(self.sites, default=0)

    @property
    def rounded(self) -> int:
        """Elements of a block's Linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def largest(self) -> int:
        """Elements of the largest Linear."""
        return max((rows * columns for rows, columns in self.linears), default=0)


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that decide memory.

    Attributes:
        elements: number of elements of all weights.
        vision, projector, decoder: the model's parts; a projector without Linears is empty.
        tower: elements of the whole vision tower.
        head: elements of the token embeddings, equal to those of the language model's head.
        vocabulary: tokens in the vocabulary.
        head_width: channels of an attention head.
        positions: number of the tower's positions for one image.
    """

    elements: int
    vision: Part
    projector: Part
    decoder: Part
    tower: int
    head: int
    vocabulary: int
    head_width: int
    positions: int

    @classmethod
    def of(cls, model: Any, topology: Topology) -> "Shapes":
        """The shapes of a transformers model, which may be empty (`qvlm_plugin.models.placement.empty_model`)."""
        vision_part, projector, decoder = (_part(model, topology, part) for part in ORDER)
        embeddings = model.get_input_embeddings().weight
        text, vision = model.config.get_text_config(), model.config.vision_config
        heads = getattr(text, "num_attention_heads", 1)
        return cls(
            elements=_elements(model),
            vision=vision_part,
            projector=projector,
            decoder=decoder,
            tower=_elements(model.get_submodule(topology.vision_path)),
            head=embeddings.numel(),
            vocabulary=len(embeddings),
            head_width=getattr(text, "head_dim", None) or embeddings.shape[1] // heads,
            positions=(_side(vision, "image_size", 336) // _side(vision, "patch_size", 14)) ** 2 + 1,
        )


def _elements(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _side(config: Any, name: str, default: int) -> int:
    """A size in a configuration: one number, or one for each side; missing in towers that take images of any size."""
    size = getattr(config, name, default)
    return size if isinstance(size, int) else size[0]


def _part(model: Any, topology: Topology, part: str) -> Part:
    blocks: dict[int, list[Site]] = {}
    for site in resolve(topology, model):
        if site.part == part:
            blocks.setdefault(site.block, []).append(site)
    if not blocks:
        return Part(0, 0, (), (), 0)
    fullest = max(blocks.values(), key=len)
    names = [name for site in fullest for name in site.linears]
    linears = tuple(tuple(model.get_submodule(name).weight.shape) for name in names)
    widths = tuple(model.get_submodule(site.name).weight.shape[1] for site in fullest)
    _, owner = blocks_of(topology, model, part)[fullest[0].block]
    elements = _elements(owner) if len(blocks) > 1 else sum(rows * columns for rows, columns in linears)
    return Part(len(blocks), widths[0], widths, linears, elements)


@dataclass(frozen=True)
class Setting:
    """The data and the device of a search.

    Attributes:
        samples: number of calibration samples.
        tokens: number of tokens of the longest sample, including image and answer.
        pictures: images that the tower encodes for a sample: 1, or the number of crops.
        element: e.
        offloaded: whether the weights are kept on the CPU (``device_map=offload``).
        accelerator: whether the model runs on an accelerator instead of the CPU.
        footprint: the search's footprint.
    """

    samples: int = 64
    tokens: int = 600
    pictures: int = 1
    element: int = 2
    offloaded: bool = False
    accelerator: bool = True
    footprint: Footprint = field(default_factory=Footprint)


class Term(NamedTuple):
    """Tensors that a phase holds: their name, bytes, and whether they are on the CPU instead of the accelerator."""

    what: str
    bytes: float
    waits: bool = False


Phase = list[Term]


@dataclass(frozen=True)
class Peak:
    """The memory of a step.

    Attributes:
        step: name of the step.
        phases: the terms that are held at the same time, for each phase.
        accelerator: see `Setting`.
    """

    step: str
    phases: tuple[Phase, ...]
    accelerator: bool

    @property
    def largest(self) -> Phase:
        """The phase that takes the most memory of the model's device, its largest terms first."""
        counted = [
            [term for term in phase if not (term.waits and self.accelerator) and term.bytes] for phase in self.phases
        ]
        return sorted(max(counted, key=_total), key=lambda term: -term.bytes)

    @property
    def bytes(self) -> float:
        """The peak on the model's device."""
        return _total(self.largest)


def _total(phase: Phase) -> float:
    return sum(term.bytes for term in phase)


def peaks(shapes: Shapes, method: Method, scheme: Scheme, options: MethodOptions, setting: Setting) -> list[Peak]:
    """The peak of each step that the scheme and the options select.

    Any other step, of a plugin's method, counts as a pass of the calibration set through the model.
    """
    search = _Search(shapes, scheme, options, setting)
    known: dict[str, Callable[[], Iterator[Phase]]] = {
        "awq": search.awq, "smooth": search.observing, "rotate": search.without_data, "clip": search.clip,
        "minmax": search.minmax, "lp": search.lp, "jacobian": search.jacobian, "zero": search.without_data,
        "means": search.means, "tokens": search.tokens, "gptq": search.gptq, "vision": search.vision,
        "dependencies": search.dependencies, "blocks": search.blocks,
    }  # fmt: skip
    return [
        Peak(step.name, tuple(known.get(step.name, search.observing)()), setting.accelerator)
        for step in method.chosen(scheme, options)
    ]


@dataclass(frozen=True)
class _Search:
    """The phases of each step."""

    shapes: Shapes
    scheme: Scheme
    options: MethodOptions
    setting: Setting

    @property
    def e(self) -> int:
        return self.setting.element

    @property
    def wide(self) -> int:
        """Bytes of an element's float32 copy; 0 if the compute type is float32."""
        return 4 if self.e < 4 else 0

    @property
    def batch(self) -> int:
        return min(self.options.calibration_batch_size, self.setting.samples)

    @property
    def n(self) -> int:
        """Tokens of a batch in the decoder."""
        return self.batch * self.setting.tokens

    @property
    def rows(self) -> int:
        """Samples of a batch that go through a layer together."""
        return min(self.setting.footprint.rows or self.batch, self.batch)

    @property
    def tower_positions(self) -> int:
        """Positions of a batch in the tower."""
        return self.batch * self.setting.pictures * self.shapes.positions

    @property
    def N(self) -> int:
        return self.setting.samples * self.setting.tokens

    @property
    def caches_wait(self) -> bool:
        return self.setting.footprint.caches_on_cpu or self.setting.offloaded

    def weights(self) -> Phase:
        """The model's weights; if they are offloaded, those that are on the device at the same time."""
        if not self.setting.offloaded:
            return [Term("weights", self.e * self.shapes.elements)]
        once = max(self.shapes.decoder.elements, self.shapes.vision.elements, self.shapes.head)
        return [
            Term("weights of a block, or of the head", self.e * once),
            Term("other weights", self.e * (self.shapes.elements - once), True),
        ]

    def layer(self, part: Part, tokens: int) -> float:
        """A block's forward pass without gradients: the residual stream and the normed input (C each), and either gate,
        up and their product (I each) or queries, keys, values, their rotary copies and attention's output (C each)."""
        return self.e * tokens * (2 * part.hidden + max(3 * part.widest, 5 * part.hidden))

    def rounding(self, part: Part, tokens: int) -> float:
        """Rounding a site's input: float32 codes and the result; slices of them on a CPU."""
        elements = tokens * part.widest
        return self.e * elements + 4 * (elements if self.setting.accelerator else min(elements, quantizers._SLICE))

    def rounding_a_weight(self, part: Part) -> float:
        """Rounding the largest Linear: its float32 copy, the dequantized values in float32, and codes; in addition the
        quotients before and after rounding, on a CPU only of a slice."""
        slices = part.largest if self.setting.accelerator else min(part.largest, quantizers._SLICE)
        return part.largest * (self.wide + 4 + 1) + 8 * slices

    def tower(self) -> Phase:
        """A batch in the vision tower; transformers keeps all of its hidden states."""
        vision = self.shapes.vision
        return [
            Term("hidden states of the tower", self.e * self.tower_positions * vision.hidden * (vision.blocks + 2)),
            Term("a block of the tower", self.layer(vision, self.tower_positions)),
        ]

    def mask(self, each: float) -> Term:
        """The attention mask of a batch with padding: ``each`` bytes for a pair of tokens."""
        return Term("attention mask", each * self.n * self.setting.tokens)

    def site_inputs(self, part: Part, tokens: int, extra: float) -> Phase:
        """A site's input without padding and transformed, and ``extra`` bytes for each of its elements."""
        elements = tokens * part.widest
        between = self.e * tokens * (part.hidden + part.widest)
        kept = part.blocks + 2 if part is self.shapes.vision else 3
        return [
            Term("hidden states", self.e * tokens * part.hidden * kept),
            Term("a block's activations", between),
            Term("the inputs of a site", elements * (self.e + extra + self.scaled)),
            self.mask(0 if part is self.shapes.vision else 1),
        ]

    @property
    def scaled(self) -> int:
        """Bytes of an element's copy divided by a transform's scale."""
        return 0 if self.options.transform == "none" else self.e

    def statistics(self, rows: float) -> Phase:
        """``rows`` float32 numbers for each input channel of the decoder's sites."""
        return [Term("statistics of channels", 4 * rows * self.shapes.decoder.blocks * sum(self.shapes.decoder.sites))]

    def forward_pass(self) -> Iterator[Phase]:
        """The forward pass of a batch between observed sites."""
        decoder = self.shapes.decoder
        states = Term("hidden states", self.e * self.n * decoder.hidden * 3)
        yield self.weights() + self.tower()
        yield [*self.weights(), states, Term("a layer", self.layer(decoder, self.n))]

    def rotation(self, part: Part) -> Term:
        """Drawing the largest M of a part's rotations: normal numbers and their QR decomposition in float64."""
        outer = max(rotation_of("", channels).outer for channels in part.sites)
        return Term("a rotation", 28 * outer**2 if "rotate" in self.options.transforms else 0)

    def without_data(self) -> Iterator[Phase]:
        """Computing with the plan's small tensors only."""
        yield self.weights()

    def minmax(self) -> Iterator[Phase]:
        """Extremes of static sites; per-token ranges need no observation."""
        yield from self.observing() if self.options.activations == "channel" else self.without_data()

    def clip(self) -> Iterator[Phase]:
        """A copy of the largest Linear, its float32 copy, and the rounding errors of a candidate."""
        part = max(self._parts, key=lambda part: part.largest)
        own = Term("a Linear and its copies", part.largest * (self.e + self.wide + 8))
        yield [*self.weights(), own, Term("rounding a weight", self.rounding_a_weight(part)), self.rotation(part)]

    def observing(self) -> Iterator[Phase]:
        """Extremes and means: in addition to a site's input its float32 copy, or its magnitudes and two boolean tensors
        of the check for finite values."""
        yield from self.forward_pass()
        extra = max(self.wide + (4 if self.options.bias_correction else 0), self.e + 2)
        yield self.weights() + self.statistics(3) + self.site_inputs(self.shapes.decoder, self.n, extra)

    def means(self) -> Iterator[Phase]:
        """Means of inputs, which are rotated by now."""
        yield from self.observing()
        yield from ([*self.weights(), self.rotation(part)] for part in self._parts)

    def lp(self) -> Iterator[Phase]:
        """l_p losses: a chunk of rounded elements at a time for static sites, a whole site's for dynamic ones, with
        float32 copies of both and their distance."""
        yield from self.forward_pass()
        decoder, per_token = self.shapes.decoder, self.e + 4 + 2 * self.wide
        losses = 2 * len(self.options.ratios) if self.options.ranges == "channel" else 0
        if self.options.activations == "token":
            yield self.weights() + self.site_inputs(decoder, self.n, per_token)
        elif self.options.importance == "uniform":
            held = self.weights() + self.statistics(5 + losses)
            yield held + self.site_inputs(decoder, self.n, self.e + 2)
            yield [*held, *self.site_inputs(decoder, self.n, 0), Term("a chunk of candidates", self._chunk(decoder))]
        yield self.weights() + self.site_inputs(self.shapes.vision, self.tower_positions, per_token)

    def _chunk(self, part: Part) -> float:
        elements, together = observers.chunk_for(torch.device("cuda" if self.setting.accelerator else "cpu"))
        count = len(self.options.ratios) if together else 1
        # Rounded values, their distance, the loss of the chunk before, and float32 copies of what is subtracted.
        return (self.e + 8 + 2 * self.wide) * min(elements, self.n * part.widest * count)

    def activations(self, part: Part, tokens: int) -> float:
        """What a frozen block saves for the backward pass: inputs of norms (C each), queries, keys, values and
        attention's output (4C), gate, activation and up (3I); in 16 bits also two float32 copies in norms."""
        return tokens * (self.e * (6 * part.hidden + 3 * part.widest) + 2 * self.wide * part.hidden)

    @property
    def saved_per_token(self) -> int:
        """Bytes of an input element that a Linear with a range for each token saves for the backward pass: distances,
        codes before and after rounding in float32, and the rotated or centered input, or a float32 copy."""
        changed = self.options.center or "rotate" in self.options.transforms
        return 12 + (4 if changed else self.wide)

    def checkpoints(self) -> float:
        """The input of every decoder layer for a batch."""
        return self.e * self.n * self.shapes.decoder.hidden * (self.shapes.decoder.blocks + 2)

    def jacobian(self) -> Iterator[Phase]:
        """The backward pass of one layer at a time; at its widest site the input, its gradient and both without
        padding, the Jacobian and its square in float32, and a chunk of losses."""
        yield from self.observing()
        decoder, wait = self.shapes.decoder, self.setting.footprint.caches_on_cpu
        rows = 5 + 2 * 2 * len(self.options.ratios)  # float64, of a batch and of those before
        inputs = self.e * self.n * (2 * decoder.hidden + decoder.widest)
        yield [
            *self.weights(),
            *self.statistics(rows),
            Term("checkpoints", self.checkpoints(), wait),
            Term("a layer backwards", self.activations(decoder, self.n) + inputs),
            self.mask(2 + self.e),
            Term("the Jacobian of a site", self.n * decoder.widest * (3 * self.e + 8)),
            Term("a chunk of candidates", self._chunk(decoder)),
        ]

    def tokens(self) -> Iterator[Phase]:
        """The backward pass of one layer at a time; of the gradient at its output a float32 copy, its quotient and its
        square."""
        yield from self.forward_pass()
        decoder, wait = self.shapes.decoder, self.setting.footprint.caches_on_cpu
        yield [
            *self.weights(),
            Term("checkpoints", self.checkpoints(), wait),
            Term("a layer backwards", self.activations(decoder, self.n)),
            self.mask(2 + self.e),
            Term("the Jacobian of a layer", self.n * decoder.hidden * (2 * self.e + 8 + self.wide)),
        ]

    def awq(self) -> Iterator[Phase]:
        """Copies of a block, and the rounding errors of its largest Linear: its float32 copy and rounded values, their
        difference, and its product with second moments of the inputs."""
        sampled = sum(self._sampled(part) * part.blocks * sum(part.sites) for part in self._parts)
        kept = Term("sampled tokens", self.e * sampled, True)
        untransformed = replace(self, options=self.options.model_copy(update={"transform": "none"}))
        yield from ([*phase, kept] for phase in untransformed.observing())
        for part in self._parts:
            group = self.options.group_size if 0 < self.options.group_size < part.widest else part.widest
            yield [
                *self.weights(),
                kept,
                Term("copies of a block", self.e * part.rounded),
                Term("errors of a Linear", part.largest * (self.wide + 16)),
                Term("tokens of a site", 4 * part.widest * (3 * self._sampled(part) + group)),
            ]

    def _sampled(self, part: Part) -> int:
        positions = self.setting.pictures * self.shapes.positions
        there = self.N if part is self.shapes.decoder else self.setting.samples * positions
        return min(self.options.search_tokens, there)

    @property
    def _parts(self) -> tuple[Part, ...]:
        parts = self.shapes.vision, self.shapes.projector, self.shapes.decoder
        return tuple(part for part in parts if part.sites)

    def vision(self) -> Iterator[Phase]:
        """The forward and backward pass of the quantized model: the output of every decoder layer and its gradient, and
        what one block saves. Linears with fixed ranges save float32 codes before clamping; see also `saved_per_token`.
        """
        shapes, decoder, vision = self.shapes, self.shapes.decoder, self.shapes.vision
        rounded = vision.blocks * vision.rounded + shapes.projector.rounded
        if self.options.veo_decoder == "quantized":
            rounded += decoder.blocks * decoder.rounded
        features = self.setting.samples * self.setting.pictures * shapes.positions * vision.hidden
        held = [
            *self.weights(),
            Term("full-precision weights of rounded Linears", self.e * rounded, True),
            Term("full-precision outputs", self.e * self.N * decoder.hidden + self.e * features, True),
        ]
        if self.setting.offloaded:
            held.append(Term("the vision tower", self.e * shapes.tower))
        states = self.e * self.tower_positions * vision.hidden * (vision.blocks + 2)
        layers = self.checkpoints()
        logits = self.batch * (ANSWER + 1) * shapes.vocabulary * (self.e + 12)
        inputs = sum(columns for _, columns in decoder.linears) if self.options.veo_decoder == "quantized" else 0
        each = self.saved_per_token if self.options.activations == "token" else 4
        kept = self.activations(decoder, self.n) + each * self.n * inputs
        seen = self.activations(vision, self.tower_positions)
        seen += self.saved_per_token * self.tower_positions * sum(columns for _, columns in vision.linears)
        if not self.options.veo_checkpointing:  # all blocks of both parts save theirs until the backward pass
            seen, kept = seen * vision.blocks, kept * decoder.blocks
        both = 0 if self.options.veo_checkpointing else seen
        yield [
            *held,
            Term("hidden states of the tower", states),
            Term("outputs of layers and their gradients", 2 * layers),
            Term("a layer backwards", kept + both),
            self.mask(2 + self.e),
            Term("gradients of a site", 12 * self.n * decoder.widest),
            Term("logits", logits),
        ]
        yield [
            *held,
            Term("hidden states of the tower", states),
            Term("outputs of layers", layers),
            Term("a block of the tower backwards", seen),
            Term("gradients of a site", 12 * self.tower_positions * vision.widest),
        ]
        yield [*held, Term("rounding a weight", self.rounding_a_weight(decoder))]
        yield [*held, self.rotation(vision)]

    def gptq(self) -> Iterator[Phase]:
        """A part's cached hidden states, copies of a block's weights, the second moments of its widest site and their
        inverse in float64, and the rounding points of each element of a Linear. The correction needs full-precision
        states and inputs in addition."""
        yield from self.forward_pass()
        decoder, vision = self.shapes.decoder, self.shapes.vision
        positions = self.setting.pictures * self.shapes.positions
        models = 2 if self.options.correction else 1
        for part, tokens in ((vision, positions), (decoder, self.setting.tokens)):
            rows = self.rows * tokens
            state = self.e * self.setting.samples * tokens * part.hidden
            inputs, moments = self.batch * tokens * part.widest, 4 * models * part.widest**2
            wanted = self.e * self.setting.samples * tokens * part.widest * (models - 1)
            held = [
                *self.weights(),
                Term("attention masks", models * self.N * tokens if part is decoder else 0, self.caches_wait),
                Term("cached hidden states", models * state, self.caches_wait),
                Term("weights of a block", self.e * part.rounded),
            ]
            yield [*held, self.rotation(part)]
            yield [
                *held,
                Term("second moments", 2 * moments),
                Term("full-precision inputs of a site", wanted),
                Term("the inputs of a site", inputs * (self.e + self.wide + 8 + 2 * models * self.scaled)),
                Term("a block's activations", self.e * rows * (part.hidden + part.widest)),
            ]
            yield [
                *held,
                Term("second moments", moments),
                Term("their inverse", 4 * 8 * part.widest**2),
            ]
            yield [
                *held,
                Term("second moments", moments),
                Term("their factors", (8 + 4) * part.widest**2),
                self.rotation(part),
                Term("solving for the correction", (models - 1) * (8 * part.widest**2 + 16 * part.largest)),
                Term("a Linear's points", part.largest * 22),
            ]
            yield [
                *held,
                Term("outputs", state, self.caches_wait),
                Term("a block", self.layer(part, rows)),
                Term("rounding", self.rounding(part, rows)),
            ]

    def dependencies(self, models: int = 1) -> Iterator[Phase]:
        """The hidden states of the quantized model between layers, and the codes of two layers.

        Args:
            models: number of models whose hidden states are held: 2 with those in full precision.
        """
        decoder, wait, held = self.shapes.decoder, self.caches_wait, self._searching(models)
        state = self.e * self.N * decoder.hidden
        vision, projector = self.shapes.vision, self.shapes.projector
        rounded = vision.blocks * vision.rounded + projector.blocks * projector.rounded
        tower = Term("rounded weights of the tower", self.e * rounded, self.setting.offloaded)
        yield [*held, tower, self.rotation(vision), Term("rounding a weight", self.rounding_a_weight(vision))]
        yield [*held, *self.tower(), Term("cached hidden states", state, wait), tower]
        joint = 2**self.scheme.decoder.activation if self.scheme.decoder.activation != UNQUANTIZED else 0
        elements = min(self.N * decoder.hidden, dependency.MAX_ELEMENTS)
        assigned = min(dependency.CHUNK, elements * joint)
        yield [
            *held,
            # inputs of the models, outputs of a layer and of the one before, and the former without padding, with
            # its batches
            Term("cached hidden states", (4 + models) * state, wait),
            Term("soft assignments", 4 * 4 * assigned + elements * (8 + 6 * self.e)),
        ]
        yield [*held, Term("cached hidden states", (4 + models) * state, wait), self._layer]

    @property
    def _layer(self) -> Term:
        """A decoder layer that processes a batch, or the footprint's rows of it."""
        return Term("a layer", self.layer(self.shapes.decoder, self.rows * self.setting.tokens))

    def _searching(self, models: int) -> Phase:
        """The weights, and what the layers of so many models read in addition to hidden states."""
        tokens, batches = self.setting.tokens, self.setting.samples / self.batch
        masks = self.N * tokens + batches * 2 * self.e * tokens * self.shapes.head_width
        return [*self.weights(), Term("masks and rotations", models * masks, self.caches_wait)]

    def blocks(self) -> Iterator[Phase]:
        """Cached hidden states between layers, and the rounded weights of a block's d layers."""
        yield from self.dependencies(models=2)
        options, decoder, held = self.options, self.shapes.decoder, self._searching(2)
        depth, wait = min(options.max_depth, decoder.blocks), self.caches_wait
        state = self.e * self.N * decoder.hidden
        inputs = 0
        if options.reading == "quantile" and options.activations == "channel":
            # A site's inputs are concatenated, then sorted in slices: values, indices and a float32 copy. The inputs of
            # later sites wait.
            inputs = self.e * self.N * sum(decoder.sites)
            first, last = inputs + self.e * self.N * decoder.sites[0], 2 * self.e * self.N * decoder.widest
            if wait:  # the inputs of one site at a time are moved to the device
                yield [*held, Term("inputs of a site", last), Term("rounded weights", self.e * depth * decoder.rounded)]
            yield [
                *held,
                Term("cached hidden states", (max(depth, 2) + 1) * state, wait),
                Term("inputs of a layer's sites", max(first, last), wait),
                Term("sorted channels", (12 + self.wide) * min(mining.SORTED, self.N * decoder.sites[0])),
                Term("rounded weights of a block", self.e * depth * decoder.rounded),
            ]
        yield [
            *held,
            Term("cached hidden states", (depth + 1 + self._states(depth)) * state, wait),
            Term("rounded weights of a block", self.e * depth * decoder.rounded),
            self._layer,
            Term("rounding", self.rounding(decoder, self.rows * self.setting.tokens)),
        ]
        yield [
            *held,
            Term("cached hidden states", (max(depth, 2) + 1) * state, wait),
            Term("inputs of a layer's sites", inputs, wait),
            Term("rounded weights of a block", self.e * depth * decoder.rounded),
            Term("rounding a weight", self.rounding_a_weight(decoder)),
        ]

    def _states(self, depth: int) -> int:
        """Outputs that the search of a block of ``depth`` layers holds in addition to its input: the path in the tree;
        or, with a beam, the prefixes of two steps and one candidate, within a layer also the inputs of these."""
        width, candidates = self.options.beam, len(self.options.percentiles)
        if not width:
            return depth
        kept = min(width, candidates)
        if self.options.unit == "site":
            return 2 * width + 1 + (width if depth > 1 else 0)
        return kept + 1 + (min(width, candidates**depth) if depth > 1 else 0)
