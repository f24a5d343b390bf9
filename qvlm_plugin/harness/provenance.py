"""Provenance of results, written as ``qvlm`` at the top level of every results JSON.

lmms-eval has no hook for information about a model, so two of its functions are wrapped, once per process. The wrappers
have no state: the run's record is passed in the harness's list of logged metrics, which is cleared at the start of each
evaluation, so a record cannot end up in another run's results.
"""

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics
from lmms_eval.utils import handle_non_serializable
from loguru import logger
from torch import nn

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import processes
from qvlm_plugin.harness.data_origin import data_origin
from qvlm_plugin.harness.generation import Generation
from qvlm_plugin.harness.host import wrap_once
from qvlm_plugin.harness.latency import Latency, summary
from qvlm_plugin.harness.model_size import memory
from qvlm_plugin.harness.requests import Documents, Request
from qvlm_plugin.progress import Progress
from qvlm_plugin.report.seal import PARTS as SEALED
from qvlm_plugin.report.seal import SEAL, seal
from qvlm_plugin.scheme import PARTS
from qvlm_plugin.stored_bits import UNKNOWN

T = TypeVar("T")

RESULT_KEY = "qvlm"

_LETTER = re.compile(r"[A-Za-z]\Z|[A-Z]\.")

READABLE_ANSWERS = {
    # lmms_eval.tasks.scienceqa: the answer is one letter, or begins with a capital letter and a full stop
    "scienceqa": _LETTER,
    "scienceqa_img": _LETTER,
    "qvlm_scienceqa": _LETTER,
    "qvlm_scienceqa_lepa": re.compile(r"(?s:.*)(?:ANSWER:|The answer is)\s*\(?[A-Z]\b"),
}
"""What a stripped answer must begin with for the task's scorer to parse it, for tasks with an answer format. For other
tasks only an empty answer cannot be parsed."""

_ANY_ANSWER = re.compile(r"\S")


def is_readable(task: str, answer: str) -> bool:
    """Whether the scorer of ``task`` can parse ``answer``, right or wrong."""
    return bool(READABLE_ANSWERS.get(task, _ANY_ANSWER).match(answer.strip()))


@dataclass
class Counts:
    """Counts of one process.

    Attributes:
        generated, found: answers generated, and answers found in the response cache, by task.
        unreadable: answers that the task's scorer cannot parse, by task.
        over_context: encoded prompts longer than the model's context, by task.
        compared: documents compared with the calibration's: task, document id and context.
        overlapping: names of documents that are also in the calibration.
        tokens, seconds: generated tokens, and the time to generate them, without batches that waited for a compiler.
        latencies: latency of each of these batches.
        compile_seconds: time of the batches that waited.
        images: digest of each document's images, by task and document id; None if it has no image.
        generation: distinct `Generation.settings` by task.
    """

    generated: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    over_context: Counter[str] = field(default_factory=Counter)
    compared: set[tuple[str, int, str]] = field(default_factory=set)
    overlapping: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[Latency] = field(default_factory=list)
    compile_seconds: float = 0.0
    images: dict[tuple[str, int], str | None] = field(default_factory=dict)
    generation: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def total(cls, counts: Sequence["Counts"]) -> "Counts":
        """The sum over processes that run in parallel."""
        generation: dict[str, list[dict[str, Any]]] = {}
        for task, own in ((task, own) for count in counts for task, own in count.generation.items()):
            known = generation.setdefault(task, [])
            known += [settings for settings in own if settings not in known]
        return cls(
            generated=sum((count.generated for count in counts), Counter()),
            found=sum((count.found for count in counts), Counter()),
            unreadable=sum((count.unreadable for count in counts), Counter()),
            over_context=sum((count.over_context for count in counts), Counter()),
            compared=set().union(*(count.compared for count in counts)),
            overlapping=[name for count in counts for name in count.overlapping],
            tokens=sum(count.tokens for count in counts),
            seconds=max(count.seconds for count in counts),
            latencies=[latency for count in counts for latency in count.latencies],
            compile_seconds=max(count.compile_seconds for count in counts),
            images={document: digest for count in counts for document, digest in count.images.items()},
            generation=generation,
        )


@dataclass
class RunRecord:
    """One evaluation's provenance, from the loaded model to the written results.

    Attributes:
        facts: facts known before the evaluation: method, scheme, bits, hashes, versions, …; JSON values.
        calibration_digests: content digests of the calibration documents.
        documents: the tasks' data sets, ``documents[task][split]``; filled in by the harness.
        counts: this process's counts; after `finish`, those of all processes.
        measured: bytes of weights and of peak memory; set by `finish`.
    """

    facts: Mapping[str, Any]
    calibration_digests: frozenset[str]
    documents: Documents
    counts: Counts = field(default_factory=Counts)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.facts['method']} {self.facts['scheme']}"  # the harness prints logged metrics on one line

    def compare(self, requests: Iterable[Request], *, allow_overlap: bool, show_progress: bool) -> None:
        """Compare the documents to evaluate with the calibration's by content, each once.

        Raises:
            QVLMError: documents overlap and ``allow_overlap`` is false, or a document cannot be read.
        """
        if not self.calibration_digests:
            return
        documents = {(r.task, r.doc_id, r.context): r for r in requests if r.doc_id is not None and not r.is_padding}
        new = [request for key, request in documents.items() if key not in self.counts.compared]

        def examine(request: Request) -> str:
            conversation = request.conversation()
            self.note_images(request, conversation)
            return conversation.digest()

        digests = _read_all(new, examine, "looking for calibration documents", show_progress)
        found = [
            request.name for request, digest in zip(new, digests, strict=True) if digest in self.calibration_digests
        ]
        self.counts.compared |= documents.keys()
        self.counts.overlapping += found
        if found and not allow_overlap:
            raise QVLMError(
                f"{len(found)} of the documents to evaluate are in the calibration set, for example {found[0]}; "
                "calibrate on another split or with another seed, or allow it with allow_overlap=true"
            )

    def note_generation(self, request: Request, generation: Generation) -> None:
        """Record how a request's answer is generated, whether or not the response cache has it."""
        if not request.is_padding:
            known = self.counts.generation.setdefault(request.task, [])
            if generation.settings not in known:
                known.append(generation.settings)

    def note_images(self, request: Request, conversation: Conversation) -> None:
        """Record the images of a document's first question."""
        key = request.task, request.doc_id
        if request.doc_id is not None and not request.is_padding and key not in self.counts.images:
            self.counts.images[key] = conversation.image_digest()

    def note_length(self, request: Request, length: int) -> None:
        """Count a prompt that is longer than the model's context.

        Args:
            request: the prompt's request.
            length: number of its tokens.
        """
        context = self.facts["context_length"]
        if context is not None and length > context and not request.is_padding:
            self.counts.over_context[request.task] += 1

    def count(self, request: Request, answer: str) -> None:
        """Count one generated answer."""
        self._count(self.counts.generated, request, answer)

    def note_found(self, answered: Sequence[tuple[Request, Sequence[str]]], show_progress: bool) -> None:
        """Record documents with answers from the response cache, as if their answers had been generated.

        Raises:
            QVLMError: a document cannot be read.
        """
        documents = {(request.task, request.doc_id): request for request, _ in answered}
        unseen = [request for key, request in documents.items() if key not in self.counts.images]
        _read_all(unseen, lambda item: self.note_images(item, item.conversation()), "hashing images", show_progress)
        for request, answers in answered:
            for answer in answers:
                self._count(self.counts.found, request, answer)

    def _count(self, answers: Counter[str], request: Request, answer: str) -> None:
        if not request.is_padding:
            answers[request.task] += 1
            self.counts.unreadable[request.task] += not is_readable(request.task, answer)

    def finish(self, model: nn.Module) -> None:
        """Measure the model, sum the processes' counts, and pass the record to the harness.

        Every process must call it while the model still exists.
        """
        counts, measured = zip(*processes.gather((self.counts, memory(model))), strict=True)
        self.counts = Counts.total(counts)
        self.measured = {
            **measured[0],
            "peak_memory_bytes": max(process["peak_memory_bytes"] for process in measured),
            "processes": len(measured),
        }
        for task, count in self.counts.over_context.items() if processes.rank() == 0 else ():
            context = self.facts["context_length"]
            logger.warning(
                f"task {task}: {count} prompts exceed the model's context of {context} tokens; their answers are "
                "unreliable"
            )
        seconds, tokens = self.counts.seconds, self.counts.tokens
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={**self._numbers(), RESULT_KEY: self},
        )

    def _numbers(self) -> dict[str, float]:
        bits = {part: self.facts["bits"][part] for part in PARTS if part in self.facts["bits"]}
        latency = summary(self.counts.latencies) or {}
        means = {name: spread["mean"] for name, spread in latency.items() if isinstance(spread, dict)}
        return {
            **({"total_requests": latency["requests"]} if latency else {}),
            **{f"qvlm_{name}": seconds for name, seconds in means.items()},
            "qvlm_weight_bytes": self.measured["weight_bytes"],
            "qvlm_peak_memory_bytes": self.measured["peak_memory_bytes"],
            "qvlm_search_seconds": self.facts["search_seconds"],
            "qvlm_parse_failures": self.counts.unreadable.total(),
            **{f"qvlm_{part}_{kind}_bits": width for part, widths in bits.items() for kind, width in widths.items()},
        }

    def report(self, task_configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON object for the results, given the results' ``configs``."""
        counts = self.counts
        data = {task: data_origin(config, self.documents.get(task, {})) for task, config in task_configs.items()}
        return {
            **self.facts,
            "calibration": self.facts["calibration"]
            and {
                **self.facts["calibration"],
                # Another program's calibration samples are unknown, so nothing was compared with them.
                "documents_compared": None if self.facts["calibration"]["source"] == UNKNOWN else len(counts.compared),
                "documents_also_evaluated": len(counts.overlapping),
            },
            "data": data,
            "stand_in": any(origin["stand_in"] for origin in data.values()),
            "answers": {
                task: {
                    "generated": counts.generated[task],
                    "found_in_cache": counts.found[task],
                    "parse_failures": counts.unreadable[task],
                }
                for task in counts.generated | counts.found
            },
            "latency": summary(counts.latencies),
            "compile_seconds": counts.compile_seconds,
            "generation": counts.generation,
            "prompts_over_context": {
                task: None if counts.found[task] else counts.over_context[task]
                for task in counts.generated | counts.found | counts.over_context
            },
            **self.measured,
        }


def _read_all(requests: Sequence[Request], read: Callable[[Request], T], label: str, show_progress: bool) -> list[T]:
    """Call ``read`` on each request, in threads: decoding and hashing images release the interpreter's lock."""
    with ThreadPoolExecutor() as pool, Progress(label, len(requests), show_progress and bool(requests)) as progress:
        results = []
        for result in pool.map(read, requests):
            results.append(result)
            progress.advance()
    return results


def versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    packages = ("torch", "transformers", "lmms_eval", "datasets", "accelerate", "qvlm_plugin")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def install() -> None:
    """Make lmms-eval write provenance. Idempotent."""
    wrap_once(EvaluationTracker, "save_results_aggregated", _saving_provenance)
    wrap_once(EvaluationTracker, "save_results_samples", _naming_images)


def _saving_provenance(save: Callable) -> Callable:
    def save_results_aggregated(self: EvaluationTracker, results: dict, *args: Any, **kwargs: Any) -> None:
        if record := _record_of_this_run():
            results[RESULT_KEY] = record.report(results["configs"])
            parts = {name: results[name] for name in (*SEALED, RESULT_KEY) if name in results}
            as_written = json.loads(json.dumps(parts, default=handle_non_serializable))
            results[RESULT_KEY][SEAL] = seal(as_written)
        save(self, results, *args, **kwargs)

    return save_results_aggregated


def _naming_images(save: Callable) -> Callable:
    # Questions about one image are not independent. The harness records images in files, but not those that
    # ``datasets`` decodes, so its samples do not show which questions share an image. An empty list means that a
    # document has no image; a missing list, that this is unknown.
    def save_results_samples(self: EvaluationTracker, task_name: str, samples: list[dict[str, Any]]) -> None:
        record = _record_of_this_run()
        for sample in samples if record else ():
            if (key := (task_name, sample["doc_id"])) in record.counts.images:
                digest = record.counts.images[key]
                sample.setdefault("input_media", [f"sha256:{digest}"] if digest else [])
        save(self, task_name, samples)

    return save_results_samples


def _record_of_this_run() -> RunRecord | None:
    records = [metrics.get(RESULT_KEY) for metrics in get_logged_metrics_history()]
    return next((record for record in records if isinstance(record, RunRecord)), None)
