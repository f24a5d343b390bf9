"""The models that lmms-eval runs: a vision-language model, quantized while it is loaded.

``QVLMSimple`` and ``QVLMChat`` differ only in the request format that they read.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from transformers import BatchFeature, PretrainedConfig, StoppingCriteriaList

from qvlm_plugin import backends, planning, plugins
from qvlm_plugin.cache import sources_digest
from qvlm_plugin.calibration import CalibrationSet, check_sources, read_calibration
from qvlm_plugin.checkpoint import CheckpointRecord
from qvlm_plugin.conversation import Conversation, as_text, encode, to_device
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import (
    document_scores,
    likelihood,
    processes,
    provenance,
    refused_options,
    response_cache,
)
from qvlm_plugin.harness.arguments import ModelArguments, check_stored, merge_arguments, parse_arguments
from qvlm_plugin.harness.generation import Generation, StopAtText, read_generation
from qvlm_plugin.harness.host import require_whole_images
from qvlm_plugin.harness.latency import FirstToken, Latency
from qvlm_plugin.harness.likelihood import Likelihood
from qvlm_plugin.harness.requests import (
    Documents,
    Request,
    chat_generation,
    scoring,
    simple_generation,
    with_system_prompt,
)
from qvlm_plugin.harness.task_source import draw_samples
from qvlm_plugin.hf_quantizer import QUANT_METHOD, quantizer_of
from qvlm_plugin.kernels.selection import Execution
from qvlm_plugin.memory import peak_memory, restart_peak
from qvlm_plugin.models.decoding import check_compilation, compile_decoding, plain_config, positions, steering
from qvlm_plugin.models.finite import finite
from qvlm_plugin.models.loading import Checkpoint, LoadedModel, load_weights, open_checkpoint
from qvlm_plugin.models.placement import check_placement, default_device, device_name, execution_device
from qvlm_plugin.models.pre_quantized import foreign_method
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import check_calibration, check_request
from qvlm_plugin.progress import Progress
from qvlm_plugin.quantized_loading import QuantizeOnLoad
from qvlm_plugin.source import source_commit
from qvlm_plugin.stored_bits import stored_facts, stored_kernels
from qvlm_plugin.tracing.trace import traced

T = TypeVar("T")


class _QVLM(lmms):
    """The model without a request format."""

    read_request: ClassVar[Callable[[Instance, Documents], Request]]

    def __init__(self, **values: Any) -> None:
        """Load a model, and quantize it with a searched or a saved plan.

        Args:
            values: see `ModelArguments`; other names are options of the quantization method.

        Raises:
            QVLMError: an argument is not allowed, or names something unusable. Cheap checks come first.
        """
        super().__init__()
        arguments = parse_arguments(values)
        backends.kernels(arguments.backend)
        require_whole_images()
        self.accelerator = Accelerator()
        self._rank, self._world_size = processes.rank(), processes.count()
        self._device = _device(arguments, self.accelerator)
        system_prompt = arguments.system_prompt and self._resolve_system_prompt(arguments.system_prompt)
        self._system_prompt = system_prompt

        if arguments.plan is not None:
            request, plan = None, RoundingPlan.load(arguments.plan)
        else:
            request = check_request(arguments.method, arguments.scheme, arguments.options)
            draws = request.needs_calibration and arguments.calibration
            if draws:
                check_sources(arguments.calibration)
        checkpoint = self._open(arguments)
        if request is not None:
            calibration = None
            if draws:
                with processes.first_process_first():
                    calibration = self._read_calibration(arguments)
            check_calibration(request, calibration)
        quantize = None
        if request is None and arguments.backend != "reference" and arguments.device_map is None:
            quantize = QuantizeOnLoad(plan, backends.kernels(arguments.backend), arguments.strict)
        loaded = load_weights(
            checkpoint,
            dtype=arguments.dtype,
            device=self._device,
            device_map=arguments.device_map,
            attn_implementation=arguments.attn_implementation,
            quantize=quantize,
        )
        stored, foreign = quantizer_of(loaded.model), foreign_method(loaded.model.config)
        if foreign is not None:
            execution, digests, kernels = Execution({}), (), stored_kernels(loaded.model)
            facts = {
                **stored_facts(loaded.model, plugins.topology_of(loaded), foreign),
                "plan_hash": loaded.fingerprint,
                "backend": foreign,
                "quantized_from": None,
            }
            if self._rank == 0:
                logger.warning(
                    f"pretrained={arguments.pretrained!r}: quantized by {foreign} with unknown calibration samples; "
                    "they may include evaluated documents"
                )
        elif stored is None:
            if request is not None:
                plan = planning.obtain_plan(loaded, request, calibration, arguments.cache)
            if quantize is None:
                execution = planning.apply(plan, loaded, arguments.backend, arguments.strict)
            else:
                execution = quantize.execution
                plugins.notify_quantized(loaded, plan)
            digests = plan.calibration.digests if plan.calibration else ()
            facts = {**plan.facts, "backend": arguments.backend, "quantized_from": None}
        else:
            record, execution = stored.record, stored.execution
            if arguments.strict:
                execution.require_no_fallback()
            digests = record.calibration_digests
            facts = {**record.plan, "backend": record.backend, "quantized_from": record.model}
        if foreign is None:
            kernels = execution.counts
        if self._rank == 0 and execution.choices:
            logger.info(f"backend={facts['backend']}: {execution}")
        searched = (facts["calibration"] or {}).get("conv")
        if self._rank == 0 and (warning := planning.prompt_warning(searched, loaded)):
            logger.warning(warning)

        self._model, self._processor, self._stops = loaded.model, loaded.processor, loaded.stops
        ignored = steering(self._model.generation_config)
        if self._rank == 0 and ignored:
            settings = ", ".join(f"{name}={value}" for name, value in ignored.items())
            logger.warning(f"ignoring {settings} of generation_config.json; set them with --gen_kwargs if needed")
        self._model.generation_config = plain_config(self._model.generation_config)
        if arguments.compile:
            compile_decoding(self._model)
        if arguments.device_map is not None:
            self._device = self._model.device
        self._batch_size = arguments.batch_size
        self._max_new_tokens = arguments.max_new_tokens
        self._allow_overlap = arguments.allow_overlap
        self.record = provenance.RunRecord(
            facts={**facts, **self._facts(arguments, loaded, kernels, execution), "generation_config_ignored": ignored},
            calibration_digests=frozenset(digests),
            documents=self.task_dict,
        )
        restart_peak()
        processes.leave_at_exit()
        provenance.install()
        likelihood.install()
        document_scores.install()
        response_cache.install()
        refused_options.install()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """Create the model from the text of ``--model_args`` and the options that lmms-eval passes on."""
        return cls(**merge_arguments(simple_parse_args_string(arg_string), additional_config or {}))

    @property
    def device(self) -> torch.device:
        """Device of inputs, and of tensors that processes exchange."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Documents per forward pass."""
        return self._batch_size

    @processes.failing_together()
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer each request; returns answers in the order of the requests.

        Raises:
            QVLMError: a generation argument or a document is unusable, or a document is in the calibration set.
            RuntimeError: generation failed; the message names the documents.
        """
        items = self._prepare(requests, self.read_request)
        results = self._generate(items)
        for item, result in zip(items, results, strict=True):
            self.cache_hook.add_partial("generate_until", (item.context, item.generation), result.text)
        return results

    @processes.failing_together()
    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer each request round by round until its task stops; returns the answers of all rounds.

        Raises:
            QVLMError, RuntimeError: as `generate_until`.
        """
        items = self._prepare(requests, self.read_request)
        answers: list[list[str]] = [[] for _ in items]
        states: list[Any] = [None] * len(items)
        current, active, index = list(items), list(range(len(items))), 0
        while active:
            for row, result in zip(active, self._generate([current[row] for row in active]), strict=True):
                answers[row].append(result.text)
            index += 1
            for row in list(active):
                following, answers[row], states[row] = items[row].following(index, answers[row], states[row])
                if following is None:
                    active.remove(row)
                else:
                    build = self._with_system_prompt(lambda conversation=following: conversation)
                    current[row] = replace(items[row], build=build)
        return answers

    @processes.failing_together()
    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """The log-probability of each request's continuation, and whether greedy decoding would produce it.

        Raises:
            QVLMError, RuntimeError: as `generate_until`.
        """
        items = self._prepare(requests, scoring)
        results = self._by_batches(items, "scoring", self._score)
        for item, result in zip(items, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", (item.context, item.continuation), result)
        return results

    def clean(self) -> None:
        """Finish the run's record, then free the model; the harness calls it before scoring."""
        if hasattr(self, "_model"):
            self.record.finish(self._model)
        super().clean()

    def response_identity(self) -> str:
        """Everything that answers depend on beyond the text of ``--model_args``; part of the response cache's key."""
        files = sorted(
            file["filename"]
            for splits in self.task_dict.values()
            for split in splits.values()
            for file in getattr(split, "cache_files", ())
        )
        names = (
            "model_fingerprint", "plan_hash", "backend", "kernels", "dtype", "device", "attn_implementation",
            "image_processor", "prompt_format", "conv", "system_prompt", "versions",
        )  # fmt: skip
        facts = {name: self.record.facts[name] for name in names}
        return json.dumps([facts, sources_digest("qvlm_plugin"), files], sort_keys=True)

    @processes.failing_together()
    def prepare(self, kind: str, requests: Sequence[Instance]) -> list[Request]:
        """Read and check all requests of a kind (``generate_until``, …) before any of them is answered.

        Raises:
            QVLMError: as `generate_until`.
        """
        return self._prepare(requests, scoring if kind == "loglikelihood" else self.read_request)

    def batches(self, items: Sequence[Request]) -> list[list[int]]:
        """Rows of requests that run together: with equal generation arguments, longest first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row in sorted(
            range(len(items)), key=lambda row: -len(items[row].context + (items[row].continuation or ""))
        ):
            groups[json.dumps(items[row].generation, sort_keys=True, default=str)].append(row)
        size = self._batch_size
        return [rows[start : start + size] for rows in groups.values() for start in range(0, len(rows), size)]

    @processes.failing_together()
    def note_found(self, items: Sequence[Request], responses: Sequence[Any]) -> None:
        """Record requests that the response cache answered, as if the model had answered them.

        Raises:
            QVLMError: a document cannot be read.
        """
        answers = [
            [response] if isinstance(response, str) else [] if isinstance(response, Likelihood) else response
            for response in responses
        ]
        self.record.note_found([*zip(items, answers, strict=True)], show_progress=self.rank == 0)

    def _prepare(self, requests: Sequence[Instance], read: Callable[[Instance, Documents], Request]) -> list[Request]:
        items = [read(instance, self.task_dict) for instance in requests]
        items = [replace(item, build=self._with_system_prompt(item.build)) for item in items]
        for item in items:
            if item.generation is not None:
                self.record.note_generation(item, self._generation(item))
        self.record.compare(items, allow_overlap=self._allow_overlap, show_progress=self.rank == 0)
        return items

    def _generation(self, item: Request) -> Generation:
        return read_generation(item.generation, self._max_new_tokens, item.task, self._stops)

    def _with_system_prompt(self, build: Callable[[], Conversation]) -> Callable[[], Conversation]:
        return lambda: with_system_prompt(build(), self._system_prompt)

    def _generate(self, items: Sequence[Request]) -> list[GenerationResult]:
        # Random numbers drawn while loading (a search, or none if the plan was cached) must not affect sampled answers.
        torch.manual_seed(torch.initial_seed())
        return self._by_batches(items, "generating", self._answer)

    def _by_batches(self, items: Sequence[Request], label: str, run: Callable[[Sequence[Request]], list[T]]) -> list[T]:
        """The results of ``run`` on all batches, in the order of the items."""
        results: dict[int, T] = {}
        batches = self.batches(items)
        with Progress(label, len(items), shown=self.rank == 0 and len(batches) > 1) as progress:
            for rows in batches:
                results.update(zip(rows, run([items[row] for row in rows]), strict=True))
                progress.advance(len(rows))
        return [results[row] for row in range(len(items))]

    def _conversations(self, batch: Sequence[Request]) -> list[Conversation]:
        conversations = [item.conversation() for item in batch]
        for item, conversation in zip(batch, conversations, strict=True):
            self.record.note_images(item, conversation)
        return conversations

    def _measured(self, batch: Sequence[Request], inputs: BatchFeature) -> list[int]:
        """Number of tokens of each prompt; also recorded."""
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        for item, length in zip(batch, lengths, strict=True):
            self.record.note_length(item, length)
        return lengths

    @torch.inference_mode()
    def _answer(self, batch: Sequence[Request]) -> list[GenerationResult]:
        conversations, generation = self._conversations(batch), self._generation(batch[0])
        tokenizer = self._processor.tokenizer
        if generation.seed is not None:
            torch.manual_seed(generation.seed)
        start = time.perf_counter()
        try:
            inputs, _ = encode(self._processor, conversations)
            prompt_lengths, width = self._measured(batch, inputs), inputs["input_ids"].shape[1]
            first = FirstToken()
            stops = [StopAtText(generation.stops, tokenizer, width)] if generation.stops else []
            generate = partial(
                self._model.generate,
                **to_device(inputs, self._device, self._model.dtype),
                **generation.arguments,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([first, *stops]),
            )
            output = finite(self._model, generate)
            tokens = output[:, width:].cpu()
        except Exception as error:
            raise _failure("generation", batch, error) from error
        end = time.perf_counter()
        self.record.counts.seconds += end - start
        self.record.counts.latencies.append(Latency.of(len(batch), (start, first.time, end), tokens.shape[1]))
        texts = tokenizer.batch_decode(
            tokens, skip_special_tokens=generation.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        results = []
        for item, text, row, prompt_length in zip(batch, texts, tokens, prompt_lengths, strict=True):
            count = int((row != tokenizer.pad_token_id).sum())
            answer = generation.cut(text)
            self.record.count(item, answer, count)
            results.append(GenerationResult(answer, TokenCounts(input_tokens=prompt_length, output_tokens=count)))
        return results

    @torch.inference_mode()
    def _score(self, batch: Sequence[Request]) -> list[Likelihood]:
        conversations = self._conversations(batch)
        try:
            continuations = [as_text(self._processor.tokenizer, item.continuation) for item in batch]
            inputs, mask = encode(self._processor, conversations, continuations)
            self._measured(batch, inputs)
            kept = int(mask.sum(dim=1).max())  # padding is on the left, so every continuation ends the row
            placed = to_device(inputs, self._device, self._model.dtype)
            forward = partial(
                self._model,
                **placed,
                position_ids=positions(self._model, placed),
                logits_to_keep=kept + 1,
                use_cache=False,
            )
            logits = finite(self._model, forward).logits[:, :-1]
        except Exception as error:
            raise _failure("scoring", batch, error) from error
        mask, targets = mask[:, -kept:].to(logits.device), inputs["input_ids"][:, -kept:].to(logits.device)
        log_probabilities = logits.float().log_softmax(dim=-1)
        chosen = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        sums = chosen.masked_fill(~mask, 0.0).sum(dim=1)
        greedy = ((log_probabilities.argmax(dim=-1) == targets) | ~mask).all(dim=1)
        return [Likelihood(*score) for score in zip(sums.tolist(), greedy.tolist(), strict=True)]

    def _read_calibration(self, arguments: ModelArguments) -> CalibrationSet:
        """The calibration samples, with the same system prompt as evaluated documents."""
        draw = partial(draw_samples, chat=not self.is_simple, allow_overlap=arguments.allow_overlap)
        calibration = read_calibration(arguments.calibration, arguments.images, arguments.seed, draw)
        samples = [
            replace(sample, conversation=with_system_prompt(sample.conversation, self._system_prompt))
            for sample in calibration.samples
        ]
        return replace(calibration, samples=tuple(samples))

    def _open(self, arguments: ModelArguments) -> Checkpoint:
        with processes.first_process_first():  # which may have to build the embedded model
            pretrained = resolve_demo(arguments.pretrained)
        checkpoint = open_checkpoint(
            pretrained,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            conv=arguments.conv,
            router_noise_seed=arguments.router_noise_seed,
            image_aspect_ratio=arguments.image_aspect_ratio,
            check_config=partial(_check_config, arguments, self._device),
        )
        needed = arguments.topology == "traced" and _needs_topology(arguments, checkpoint.config)
        return traced(checkpoint) if needed else checkpoint

    def _facts(
        self, arguments: ModelArguments, loaded: LoadedModel, kernels: Mapping[str, int], execution: Execution
    ) -> dict[str, Any]:
        return {
            "kernels": kernels,
            "fallbacks": len(execution.fallbacks),
            "pretrained": arguments.pretrained,
            "revision": arguments.revision,
            "model_fingerprint": loaded.fingerprint,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "compile": arguments.compile,
            "device": device_name(execution_device(loaded.model)),
            "attn_implementation": loaded.model.config._attn_implementation,
            "image_processor": type(loaded.processor.image_processor).__name__,
            "prompt_format": "simple" if self.is_simple else "chat",
            "conv": loaded.conv,
            "context_length": loaded.context,
            "router_noise_seed": arguments.router_noise_seed,
            "image_aspect_ratio": arguments.image_aspect_ratio,
            "system_prompt": self._system_prompt,
            "eos_token_id": loaded.model.generation_config.eos_token_id,
            "versions": provenance.versions(),
            "commit": source_commit(),
            # Recorded separately, because the next run finds the plan in the cache and needs less.
            "preparation_peak_bytes": peak_memory(provenance.on_gpu(loaded.model)),
        }


class QVLMSimple(_QVLM):
    """Reads "simple" requests (``--force_simple``)."""

    is_simple = True
    read_request = staticmethod(simple_generation)


class QVLMChat(_QVLM):
    """Reads "chat" requests."""

    is_simple = False
    read_request = staticmethod(chat_generation)


def _check_config(arguments: ModelArguments, device: torch.device, config: PretrainedConfig) -> None:
    """Check the arguments against the model's configuration, before weights are loaded."""
    if arguments.compile:
        check_compilation(config, device, arguments.trust_remote_code)
    if arguments.topology == "described" and _needs_topology(arguments, config):
        plugins.topology(config)
    if _is_exported(config):
        check_stored(arguments, CheckpointRecord.read(config.quantization_config).backend)
    elif (foreign := foreign_method(config)) is not None:
        check_stored(arguments, foreign)


def _needs_topology(arguments: ModelArguments, config: PretrainedConfig) -> bool:
    """Whether the model's parts must be known: a saved plan and an exported checkpoint say them."""
    return arguments.plan is None and not _is_exported(config)


def _is_exported(config: PretrainedConfig) -> bool:
    stored = getattr(config, "quantization_config", None)
    return stored is not None and stored.get("quant_method") == QUANT_METHOD


def _device(arguments: ModelArguments, accelerator: Accelerator) -> torch.device:
    """This process's device."""
    wanted = check_placement(arguments.dtype, arguments.device or default_device())
    if processes.count() == 1:
        return wanted
    if arguments.device_map is not None:
        raise QVLMError(f"device_map={arguments.device_map} spreads one model over all devices; start a single process")
    if wanted.type != accelerator.device.type:
        raise QVLMError(
            f"device={arguments.device}: the {processes.count()} processes communicate on "
            f"{accelerator.device.type}; leave device out, or set ACCELERATE_USE_CPU=true for cpu"
        )
    return accelerator.device


def _failure(action: str, batch: Sequence[Request], error: Exception) -> RuntimeError:
    names = ", ".join(item.name for item in batch)
    return RuntimeError(f"{action} failed for {names}: {type(error).__name__}: {' '.join(str(error).split())}")
