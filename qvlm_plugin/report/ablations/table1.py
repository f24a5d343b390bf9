"""Table 1: what cross-layer dependency mining and visual encoder optimization do, alone and together."""

from collections.abc import Sequence
from pathlib import Path

from qvlm_plugin import plugins
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.report.ablations.evaluation import Subject, accuracy, columns_of, evaluate, failures, notes_on
from qvlm_plugin.report.figures import Bars, bars_figure
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.runs import Setting
from qvlm_plugin.report.writing import Report

VARIANTS = {
    "baseline": {"cdm": "false", "veo": "false"},
    "+CDM": {"cdm": "true", "veo": "false"},
    "+VEO": {"cdm": "false", "veo": "true"},
    "Q-VLM": {"cdm": "true", "veo": "true"},
}
"""The rows of Table 1."""

FULL_PRECISION = "full precision"


def table1(
    subject: Subject, schemes: Sequence[str], setting: Setting, shapes: LoadedModel, command: str
) -> tuple[Report, list[Path]]:
    """Baseline, +CDM, +VEO and Q-VLM at each scheme: weight memory, search cost and accuracy.

    Args:
        subject: what is evaluated.
        schemes: of the rows.
        setting: of the runs.
        shapes: the model, whose weights may be on the meta device.
        command: for the report.

    Returns:
        The report, and the logs of runs that failed.
    """
    cells = {FULL_PRECISION: subject.full_precision()}
    for scheme in schemes:
        cells |= {
            (scheme, name): subject.cell(f"{scheme}-{name.strip('+').lower()}", scheme, **options)
            for name, options in VARIANTS.items()
        }
    found = dict(zip(cells, evaluate([*cells.values()], setting), strict=True))
    columns = columns_of(found.values())
    lines, rows = [], []
    for key, one in found.items():
        scheme, name = ("w16a16", key) if key == FULL_PRECISION else key
        memory = planned_weight_bytes(shapes, subject.request(scheme))
        lines.append((scheme, name, _bytes_text(memory), *one.texts(columns)))
        rows.append({"scheme": scheme, "method": name, "weight_bytes": memory, **one.row()})
    lines_across = {c: score.scale * score.value for c, score in found[FULL_PRECISION].scores.items()}
    groups = [
        Bars(
            title=scheme,
            rows=tuple(VARIANTS),
            accuracies={c: [accuracy(found[scheme, name].scores.get(c)) for name in VARIANTS] for c in columns},
            lines=lines_across,
            costs=[found[scheme, name].search_seconds for name in VARIANTS],
        )
        for scheme in schemes
    ]
    report = Report(
        name="table1",
        title="Table 1: cross-layer dependency mining (CDM) and visual encoder optimization (VEO)",
        command=command,
        tables=[Grid(("scheme", "method", "weight memory", "search cost (s)", *columns), tuple(lines))],
        rows=rows,
        notes=[
            *notes_on(found.values()),
            "Scores ± standard error, shares in percent. In the figure, lines across are full precision.",
            "Weight memory is that of the weights packed as their formats say, scales included, and of everything else "
            "in the compute type; `backend=reference` holds more than that while it runs.",
        ],
        figure=bars_figure(groups),
    )
    return report, failures(found.values())


def planned_weight_bytes(shapes: LoadedModel, request: PlanRequest) -> int:
    """Bytes of the model's weights when packed as the request's formats say; what stays, in the compute type.

    Args:
        shapes: the model, whose weights may be on the meta device.
        request: of ``method=qvlm``.
    """
    model = shapes.model
    context = SearchContext(shapes, plugins.topology(model.config), request.scheme, request.options)
    plan = build_plan(context, Draft())
    packed = {f"{module.name}.weight": module for module in plan.modules if module.weight.kind != "none"}
    bits = 0.0
    for name, parameter in model.named_parameters():  # shared ones once
        module = packed.get(name)
        width = module.weight.effective_bits(module.shape) if module else 8 * parameter.element_size()
        bits += width * parameter.numel()
    return round(bits / 8)


def _bytes_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
