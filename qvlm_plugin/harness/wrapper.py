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
from transformers import BatchFeature, StoppingCriteriaList

from qvlm_plugin import backends
from qvlm_plugin.cache import sources_digest
from qvlm_plugin.calibration import CalibrationSet, read_calibration
from qvlm_plugin.conversation import Conversation, as_text, encode, to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import (
    document_scores,
    likelihood,
    processes,
    provenance,
    refused_options,
    response_cache,
)
from qvlm_plugin.harness.arguments import ModelArguments, merge_arguments, parse_arguments
from qvlm_plugin.harness.generation import Generation, StopAtText, read_generation
from qvlm_plugin.harness.host import require_whole_images
from qvlm_plugin.harness.latency import FirstToken, Latency, compiled_graphs
from qvlm_plugin.harness.likelihood import Likelihood
from qvlm_plugin.harness.preparation import prepare_model
from qvlm_plugin.harness.requests import (
    Documents,
    Request,
    chat_generation,
    scoring,
    simple_generation,
    with_system_prompt,
)
from qvlm_plugin.harness.task_source import draw_samples
from qvlm_plugin.memory import restart_peak
from qvlm_plugin.models.decoding import positions
from qvlm_plugin.models.finite import finite
from qvlm_plugin.models.placement import check_placement, default_device
from qvlm_plugin.progress import Progress

T = TypeVar("T")


class _QVLM(lmms):
    """The model, except for the request format that its subclasses add."""

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
        self._system_prompt = arguments.system_prompt and self._resolve_system_prompt(arguments.system_prompt)
        prepared = prepare_model(arguments, self._device, partial(self._read_calibration, arguments))
        loaded = prepared.loaded
        self._model, self._processor, self._stops = loaded.model, loaded.processor, loaded.stops
        if arguments.device_map is not None:
            self._device = self._model.device
        self._batch_size = arguments.batch_size
        self._max_new_tokens = arguments.max_new_tokens
        self._allow_overlap = arguments.allow_overlap
        self.record = provenance.RunRecord(
            facts={
                **prepared.facts,
                "prompt_format": "simple" if self.is_simple else "chat",
                "system_prompt": self._system_prompt,
            },
            calibration_digests=prepared.calibration_digests,
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

    def _note_lengths(self, batch: Sequence[Request], inputs: BatchFeature) -> list[int]:
        """Record and return the number of tokens of each prompt."""
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
        graphs, start = compiled_graphs(), time.perf_counter()
        try:
            inputs, _ = encode(self._processor, conversations)
            prompt_lengths, width = self._note_lengths(batch, inputs), inputs["input_ids"].shape[1]
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
        lengths = (tokens != tokenizer.pad_token_id).sum(dim=1).tolist()
        if compiled_graphs() > graphs:
            self.record.counts.compile_seconds += end - start
        else:
            self.record.counts.tokens += sum(lengths)
            self.record.counts.seconds += end - start
            self.record.counts.latencies.append(Latency.of(len(batch), (start, first.time, end), tokens.shape[1]))
        texts = tokenizer.batch_decode(
            tokens, skip_special_tokens=generation.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        results = []
        for item, text, count, prompt_length in zip(batch, texts, lengths, prompt_lengths, strict=True):
            answer = generation.cut(text)
            self.record.count(item, answer)
            results.append(GenerationResult(answer, TokenCounts(input_tokens=prompt_length, output_tokens=count)))
        return results

    @torch.inference_mode()
    def _score(self, batch: Sequence[Request]) -> list[Likelihood]:
        conversations = self._conversations(batch)
        try:
            continuations = [as_text(self._processor.tokenizer, item.continuation) for item in batch]
            inputs, mask = encode(self._processor, conversations, continuations)
            self._note_lengths(batch, inputs)
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


class QVLMSimple(_QVLM):
    """Reads "simple" requests (``--force_simple``)."""

    is_simple = True
    read_request = staticmethod(simple_generation)


class QVLMChat(_QVLM):
    """Reads "chat" requests."""

    is_simple = False
    read_request = staticmethod(chat_generation)


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
