"""Methods over draws of calibration samples: each scheme, method, number of samples and seed is searched and evaluated.

Needs the stand-in data (`qvlm demo data demo-data`). Finished cells are skipped, and several processes with the same
command share the work; the table shows the finished cells.

python benchmarks/seeds.py run seeds-results                       # main methods, W4A4, 32 and 64 samples, three seeds
python benchmarks/seeds.py run seeds-results --schemes w4a8,w8a8 --methods qvlm_rotated --samples 64
python benchmarks/seeds.py table seeds-results --baseline qlora    # means, spreads, paired differences
python benchmarks/seeds.py table seeds-results --baseline full-precision --tasks average
python benchmarks/seeds.py table seeds-results --methods ladder --baseline previous   # each row with the one before
python benchmarks/seeds.py agreement seeds-results qlora-w4a4-32-0 # with generation by the harness on the same plan
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from searches import summary
from sinks import first_tokens, unobserved
from teacher_forced import Question, exact_matches, read_questions

from qvlm_plugin import planning
from qvlm_plugin.atomic import make_folder, write_file
from qvlm_plugin.calibration import read_calibration
from qvlm_plugin.demo import CALIBRATION, TASKS, resolve_demo
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.model_size import packed_bytes
from qvlm_plugin.harness.task_source import draw_samples
from qvlm_plugin.models.loading import LoadedModel, load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import PlanRequest, check_request
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.compare.grid import PREVIOUS, read_grid
from qvlm_plugin.report.estimates import difference_text, estimate_text
from qvlm_plugin.report.pooled import Pooled, pool, spread_text, verdict
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.running import run_cells
from qvlm_plugin.report.runs import Cell, Setting
from qvlm_plugin.report.samples import Document, RunSamples, read_samples
from qvlm_plugin.report.significance import p_text

_FASTER = {"veo_checkpointing": False}  # the same plans; training the tower is a quarter faster and takes more memory
_SHORT = _FASTER | {"beam": 2, "veo_epochs": 3}  # other plans than the paper's settings, in a third of the time
_LADDER = read_grid(Path("ladder"), {})  # `qvlm ablate ladder`, here without a process for each evaluation
_CENTERED, _UNSEARCHED = _LADDER.row("+ joint search")[1], _LADDER.row("+ smoothing")[1]
_TABLE1 = read_grid(Path("table1"), {})
_FIG3A, _FIG3B = read_grid(Path("fig3a"), {}), read_grid(Path("fig3b"), {})
METHODS = {
    "qlora": {},
    "qlora-zero": {"zero_on_grid": True},
    "qlora-sinks1": {},
    "qlora-sinks24": {},
    "awq": {"weights": "nf"},
    "qvlm": _FASTER,
    "qvlm-short_cdm": _TABLE1.row("+CDM")[1] | _SHORT,
    "qvlm-short_veo": _TABLE1.row("+VEO")[1] | _SHORT,
    "qvlm-short": _SHORT,
    "qvlm-short_cdm_relative": _TABLE1.row("+CDM, relative")[1] | _SHORT,
    "qvlm-short_relative": _TABLE1.row("Q-VLM, relative")[1] | _SHORT,
    "qvlm-depth1_relative": _TABLE1.row("+CDM, relative")[1] | _SHORT | {"max_depth": 1},
    **{f"qvlm-depth{depth}": _FIG3A.row(f"depth {depth}")[1] | _SHORT for depth in (1, 2, 4, 5)},
    **{f"qvlm-p{least}": _FIG3B.row(f"p {least}")[1] | _SHORT for least in ("0.995", "0.99")},
    **{f"qvlm-eta{eta}": _FIG3B.row(f"η {eta}")[1] | _SHORT for eta in ("0.1", "10")},
    "qvlm_jacobian": _FASTER,
    "quarot": {},
    "qvlm_rotated": {},
    "qvlm_rotated-cdm": {"cdm": False},
    "qvlm_rotated-groups": {"group_size": -1},
    "qvlm_rotated-centered_cdm": _UNSEARCHED,
    "qvlm_rotated-centered_blocks": _LADDER.row("+ layer-wise search")[1],
    "qvlm_rotated-centered_wide_blocks": _CENTERED | {"min_percentile": 0.7, "max_depth": 1},
    "qvlm_rotated-centered_normal": _UNSEARCHED | {"token_bounds": "normal"},
    "qvlm_rotated-centered_normal_blocks": _CENTERED
    | {"token_bounds": "normal", "max_percentile": 1.3, "percentile_step": 0.1, "max_depth": 1},
    "qvlm_rotated-centered": _CENTERED,
    "qvlm_rotated-centered_progressive": _CENTERED | {"group_scales": "progressive"},
    "qvlm_rotated-centered_veo": _LADDER.row("+ VEO")[1] | _FASTER,
    "rtn-rotation": _LADDER.row("+ rotation, per token")[1],
    "rtn-rotation-gptq": _LADDER.row("+ GPTQ")[1],
    "rtn-rotation-gptq-centers": _LADDER.row("+ centers, biases")[1],
}
"""Rows and their options: a method, and after a hyphen what the row leaves out or changes."""

SINKS = {"qlora-sinks1": 1, "qlora-sinks24": 24}
"""Number of first tokens that the decoder computes in full precision (`sinks`). 24: the text before an image."""

LADDER = (
    "qlora", "rtn-rotation", "rtn-rotation-gptq", "rtn-rotation-gptq-centers", "qvlm_rotated-centered_cdm",
    "qvlm_rotated-centered_blocks", "qvlm_rotated-centered", "qvlm_rotated-centered_veo", "qvlm_rotated",
)  # fmt: skip
"""The rows of the ladder, each to be compared with the one before."""

GROUPS = {
    "main": ("qlora", "awq", "qvlm", "qvlm_jacobian", "qvlm_rotated"),
    "ladder": LADDER,
    "table1": (
        "qlora", "qvlm-short_cdm", "qvlm-short_veo", "qvlm-short", "qvlm-short_cdm_relative", "qvlm-short_relative",
    ),
    "relative": ("qlora", "qvlm-short_cdm_relative", "qvlm-depth1_relative"),
    "fig3a": ("qvlm-depth1", "qvlm-depth2", "qvlm-short_cdm", "qvlm-depth4", "qvlm-depth5"),
    "fig3b": ("qlora", "qvlm-p0.995", "qvlm-p0.99", "qvlm-short_cdm", "qvlm-eta0.1", "qvlm-short", "qvlm-eta10"),
}  # fmt: skip
"""Rows that are measured together: those of the main table, those of `qvlm ablate`'s grids, and `relative`: the joint
search with other errors and percentiles. Without a search, `qvlm` is `qlora`; a depth of 3, a smallest percentile of
0.98 and an η of 1 are its defaults."""

METRIC = "exact_match"
FULL_PRECISION = "full-precision"


@dataclass(frozen=True)
class Draw:
    """One cell: a method on one draw of calibration samples, or full precision."""

    method: str = FULL_PRECISION
    scheme: str = "w16a16"
    samples: int = 0
    seed: int = 0

    @property
    def request(self) -> PlanRequest:
        """The checked arguments of the cell's plan."""
        return check_request(self.method.partition("-")[0], self.scheme, METHODS[self.method])

    @property
    def name(self) -> str:
        """Name of the cell's files; all draws of a row that needs no calibration are one cell."""
        if self == Draw():
            return self.method
        row = f"{self.method}-{self.scheme}"
        return f"{row}-{self.samples}-{self.seed}" if self.request.needs_calibration else row


def draws(
    schemes: Sequence[str], methods: Sequence[str], samples: Sequence[int], seeds: Sequence[int]
) -> Iterator[Draw]:
    """Full precision, then every combination, in the order of the table."""
    yield Draw()
    for scheme, count, method, seed in itertools.product(schemes, samples, methods, seeds):
        yield Draw(method, scheme, count, seed)


def run(todo: Sequence[Draw], output: Path, dtype: str, limit: int) -> None:
    """Search and evaluate the cells that are not finished and that no other process works on."""
    _require_dtype(output, dtype)
    finished(todo, output)  # raises if a cell does not fit its row, before the model is loaded
    questions = read_questions(load(resolve_demo("demo"), dtype=dtype), TASKS, limit)
    _keep_documents(output / "documents.json", questions)
    for draw in todo:
        make_folder(output / "plans")
        try:
            with FileLock(output / "plans" / f"{draw.name}.lock", timeout=0):
                if not (file := output / f"{draw.name}.json").exists():
                    content = _cell(draw, output, load(resolve_demo("demo"), dtype=dtype), questions)
                    write_file(file, json.dumps(content, indent=1).encode())
                    print(f"{draw.name}: finished", flush=True)
        except Timeout:
            print(f"{draw.name}: another process works on it", flush=True)


def _cell(draw: Draw, output: Path, loaded: LoadedModel, questions: Sequence[Question]) -> dict[str, Any]:
    """The content of a cell's file.

    ``run``: facts about the run; ``search``: what the search did (`searches.summary`); ``exact``: for each task one
    mark per document, 1 where exact.
    """
    facts: dict[str, Any] = {"method": "none", "scheme": "w16a16"}
    search: dict[str, Any] = {}
    cache = None
    if count := SINKS.get(draw.method):
        first = first_tokens(loaded.model, questions, count)
        questions, cache = [first.removed_from(question) for question in questions], first.cache
    if draw != Draw():
        plan = _plan(draw, output, loaded)
        planning.apply(plan, loaded)
        facts, search = {**plan.facts}, summary(plan.record)
    exact = exact_matches(loaded.model, questions, cache)
    marks = {
        task: "".join(str(int(exact[one.task, one.id])) for one in questions if one.task == task) for task in TASKS
    }
    facts |= {"packed_bytes": packed_bytes(loaded.model), "dtype": str(loaded.model.dtype), "stand_in": True}
    return {"run": facts, "search": search, "exact": marks}


def _plan(draw: Draw, output: Path, loaded: LoadedModel) -> RoundingPlan:
    """The cell's plan, searched where it does not exist yet; an interrupted search resumes."""
    folder = output / "plans" / draw.name
    request = draw.request
    if folder.exists():
        plan = RoundingPlan.load(folder)
        if plan.options != request.options.model_dump():
            raise QVLMError(f"{folder}: the plan was searched with other options; remove it or pass another folder")
        return plan
    calibration = None
    if request.needs_calibration:
        calibration = read_calibration(f"{CALIBRATION}:{draw.samples}", None, draw.seed, draw_samples)
    sinks = SINKS.get(draw.method)
    searches = output / (f"searches-sinks{sinks}" if sinks else "searches")  # the same request, another search
    with unobserved(sinks) if sinks else nullcontext():
        plan = planning.obtain_plan(loaded, request, calibration, searches)
    plan.save(folder)
    return plan


def _keep_documents(file: Path, questions: Sequence[Question]) -> None:
    """Write the documents of all cells, in order: id, image (its digest; empty without one), reference answer.

    Raises:
        QVLMError: earlier cells were evaluated on other documents.
    """
    documents = {
        task: [[one.id, (one.image or "")[:16], one.target] for one in questions if one.task == task] for task in TASKS
    }
    if not file.exists():
        write_file(file, json.dumps(documents).encode())
    elif read_json(file) != documents:
        raise QVLMError(f"{file}: its cells were evaluated on other documents; pass the same --limit or another folder")


def _require_dtype(output: Path, dtype: str) -> None:
    """Raise a QVLMError if earlier cells were evaluated in another floating-point type."""
    if (output / f"{FULL_PRECISION}.json").exists():
        earlier = read_run(output, FULL_PRECISION).run["dtype"].removeprefix("torch.")
        if earlier != dtype:
            raise QVLMError(
                f"{output}: its cells were evaluated in {earlier}; pass --dtype {earlier} or another folder"
            )


def read_run(output: Path, name: str) -> RunSamples:
    """A finished cell, in the form of a run of the harness."""
    file = output / f"{name}.json"
    content, documents = read_json(file), read_json(output / "documents.json")
    tasks = {}
    for task, marks in content["exact"].items():
        tasks[task] = tuple(
            Document(index, target, "", target if mark == "1" else "another answer", image, {METRIC: float(mark)})
            for (index, image, target), mark in zip(documents[task], marks, strict=True)
        )
    return RunSamples(file, content["run"], tasks)


def finished(todo: Iterable[Draw], output: Path) -> dict[Draw, RunSamples]:
    """The cells whose files exist in the folder.

    Raises:
        QVLMError: a cell was measured with other options than its row has. Options that the cell does not record are
            newer than it; their defaults keep what was done before.
    """
    found = {draw: read_run(output, draw.name) for draw in todo if (output / f"{draw.name}.json").exists()}
    for draw, run in found.items():
        options = draw.request.options.model_dump() if draw != Draw() else {}
        recorded = run.run.get("options", {})
        if changed := [name for name, value in recorded.items() if options.get(name) != value]:
            raise QVLMError(
                f"{run.file}: the cell was measured with another {', '.join(changed)} than its row has; remove it or "
                "pass another folder"
            )
    return found


def show_table(todo: Sequence[Draw], output: Path, baseline: str, tasks: Sequence[str]) -> None:
    """Print means over seeds and paired differences to a baseline, for finished cells and the given tasks.

    Args:
        todo: the cells of the table, whose folder is ``output``.
        baseline: a method, or `PREVIOUS`: the row above of the same scheme and number of samples.
        tasks: none is all.
    """
    found, rows, sentences, above = finished(todo, output), [], [], {}
    for scheme, count, method in dict.fromkeys((draw.scheme, draw.samples, draw.method) for draw in found):
        own = [draw for draw in found if (draw.scheme, draw.samples, draw.method) == (scheme, count, method)]
        other = above.get((scheme, count), FULL_PRECISION) if baseline == PREVIOUS else baseline
        above[scheme, count] = method
        pairs = [(_compared_with(draw, other), draw) for draw in own]
        runs = [(found[one], found[draw]) for one, draw in pairs if one in found]
        if len(runs) < len(pairs):
            print(f"{method} {scheme} {count} samples: {len(pairs) - len(runs)} seeds have no {other} to compare with")
        if runs:
            pooled = pool(runs, METRIC)
            head = (method, scheme, _bits(runs[0][1]), str(count or ""))
            compared = method not in (other, FULL_PRECISION)
            rows += [_row(head, one, compared) for one in pooled if one.task in (tasks or (one.task,))]
            if compared:
                sentences.append(f"{count} samples: {verdict(pooled[-1], f'{scheme} {method}', other)}")
    print(Grid(HEADER, tuple(rows)).markdown())
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences))


HEADER = (
    "method", "scheme", "bits", "samples", "seeds", "task", "exact match", "spread over seeds", "difference (points)",
    "p", "sign-flip p",
)  # fmt: skip


def _compared_with(draw: Draw, baseline: str) -> Draw:
    """The baseline's cell for a draw; full precision, which has no draws, is compared with itself."""
    return Draw() if Draw() in (draw, Draw(baseline)) else replace(draw, method=baseline)


def _bits(run: RunSamples) -> str:
    """Effective bits of a decoder weight, scales included, and of a decoder activation."""
    decoder = run.run.get("bits", {}).get("decoder")
    return f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else ""


def _row(head: tuple[str, ...], one: Pooled, compared: bool) -> tuple[str, ...]:
    texts = (*head, str(one.seeds), one.task, estimate_text(one.score, one.scale), spread_text(one))
    if not compared:
        return (*texts, "", "", "")
    return (*texts, difference_text(one.difference, one.scale, decimals=1), p_text(one.t_p), p_text(one.sign_flip_p))


def agreement(output: Path, name: str, data: Path, limit: int) -> None:
    """Let the harness generate with a cell's plan; print the number of documents on which the two scores differ.

    Raises:
        QVLMError: the cell's first tokens are in full precision, which the harness cannot compute.
    """
    if any(name.startswith(f"{row}-") for row in SINKS):
        raise QVLMError(f"{name}: the harness cannot compute first tokens in full precision; pass another cell")
    ours = read_run(output, name)
    dtype = ours.run["dtype"].removeprefix("torch.")
    arguments = {"pretrained": "demo", "plan": str(output / "plans" / name), "dtype": dtype}
    cell = Cell(f"{name}-generated", arguments, TASKS, limit)
    (outcome,) = run_cells([cell], Setting(output, data, batch_size=16), METRIC)
    (theirs,) = read_samples(outcome.results)
    for task, documents in theirs.tasks.items():
        exact = {one.id: one.metrics[METRIC] for one in ours.tasks[task]}
        pairs = [(exact[one.id], float(one.metrics[METRIC] >= 0.5)) for one in documents if one.id in exact]
        counts = [sum(pair == found for pair in pairs) for found in ((1, 0), (0, 1))]
        mine, generated = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        print(
            f"{task}: {len(pairs)} documents; exact {mine:.1f}, generated {generated:.1f}; only exact right "
            f"{counts[0]}, only generated right {counts[1]}"
        )


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = lambda text: text.split(",")  # noqa: E731
    methods = lambda text: [row for name in names(text) for row in GROUPS.get(name, [name])]  # noqa: E731
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    for name in ("run", "table"):
        command = commands.add_parser(name)
        command.add_argument("output", type=Path, help="folder of the runs")
        command.add_argument("--schemes", type=names, default=["w4a4"], help="such as w4a4,w8a8")
        command.add_argument(
            "--methods",
            type=methods,
            default=GROUPS["main"],
            help=f"separated by commas; {', '.join(GROUPS)}: these groups of rows; default: main",
        )
        command.add_argument(
            "--samples", type=numbers, default=[32, 64], help="numbers of calibration samples, separated by commas"
        )
        command.add_argument(
            "--seeds", type=numbers, default=[0, 1, 2], help="seeds of calibration samples, separated by commas"
        )
    commands.choices["run"].add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    commands.choices["table"].add_argument(
        "--baseline",
        choices=[FULL_PRECISION, PREVIOUS, *METHODS],
        metavar="METHOD",
        default="qlora",
        help=f"method that the others are compared with, {FULL_PRECISION}, or {PREVIOUS} for the ladder's row before",
    )
    commands.choices["table"].add_argument(
        "--tasks", type=names, default=[], help="rows to show, such as average; default: all tasks and average"
    )
    command = commands.add_parser("agreement")
    command.add_argument("output", type=Path, help="folder of the runs")
    command.add_argument("cell", help="a finished cell, such as qlora-w4a4-32-0")
    for name, limit in (("run", 600), ("agreement", 60)):
        commands.choices[name].add_argument(
            "--data", type=Path, default=Path("demo-data"), help="folder of the stand-in data"
        )
        commands.choices[name].add_argument("--limit", type=int, default=limit, help="documents of each task")
    asked = parser.parse_args()
    output = asked.output.resolve()
    if asked.command == "agreement":
        agreement(output, asked.cell, asked.data, asked.limit)
        return
    if unknown := [name for name in asked.methods if name not in METHODS]:
        parser.error(f"--methods: no row is named {', '.join(unknown)}; there are {', '.join([*GROUPS, *METHODS])}")
    cells = [*draws(asked.schemes, asked.methods, asked.samples, asked.seeds)]
    if asked.command == "table":
        show_table(cells, output, asked.baseline, asked.tasks)
        return
    with chdir(asked.data):
        run(cells, output, asked.dtype, asked.limit)


if __name__ == "__main__":
    main()
