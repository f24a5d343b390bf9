// The data, as rows of a view: an overview of all benchmarks, or one evaluation.

const data = JSON.parse(at("data").textContent);
const evaluations = data.evaluations;

const VIEWS = [
  ...data.overviews.map((overview) => ({
    id: overview.apart ? "overview-apart" : "overview",
    title: "Overview",
    apart: overview.apart,
    overview,
  })),
  ...evaluations.map((evaluation, index) => ({
    id: evaluation.name || `unknown-${index}`,
    title: evaluation.title,
    apart: evaluation.apart,
    index,
  })),
];

// entries: the row's runs by evaluation; several if they differ only in the seed
function rowOf(id, variant, entries, place) {
  const all = Object.values(entries).flat();
  const runs = unique(all.map((entry) => data.runs[entry.run]));
  const run = runs[0];
  const speeds = runs.map((one) => one.tokens_per_second).filter(known);
  const notes = unique(all.flatMap((entry) => entry.notes));
  if (variant) notes.unshift(variant);
  const seeds = unique(runs.map((one) => one.seed).filter(known)).sort((a, b) => a - b);
  if (seeds.length > 1) notes.push(`mean of seeds ${seeds.join(", ")}`);
  const told = [
    run.model,
    run.method,
    run.scheme,
    run.options,
    run.arguments,
    run.backend,
    run.dtype,
    run.device,
    ...notes,
  ];
  return {
    id,
    entries,
    place,
    runs,
    run,
    notes,
    model: run.model,
    method: run.method ?? "–",
    scheme: run.scheme ?? "–",
    speed: speeds.length ? speeds.reduce((sum, one) => sum + one) / speeds.length : null,
    text: told.filter(known).join(" ").toLowerCase(),
  };
}

function makeRows(view) {
  if (view.overview) {
    return view.overview.rows.map(({id, variant, cells, place}) => {
      const entries = Object.fromEntries(
        Object.entries(cells).map(([index, own]) => [index, own.map((one) => evaluations[index].entries[one])]),
      );
      return rowOf(id, variant, entries, place);
    });
  }
  return evaluations[view.index].entries.map((entry) =>
    rowOf(data.runs[entry.run].run, "", {[view.index]: [entry]}, null),
  );
}

const rowsMade = new Map();
function rowsOf(view) {
  if (!rowsMade.has(view)) rowsMade.set(view, makeRows(view));
  return rowsMade.get(view);
}

const intervalOf = (score) => (known(score[6]) ? [score[6], score[7]] : null);

// A row's score by a metric of an evaluation: value, error and difference are means over its runs.
function scoreOf(row, index, metric) {
  const scores = (row.entries[index] ?? []).map((entry) => entry.scores[metric]).filter(known);
  if (!scores.length) return null;
  const mean = (place) =>
    scores.every((score) => known(score[place]))
      ? scores.reduce((sum, score) => sum + score[place], 0) / scores.length
      : null;
  const [, , , rank, low, high] = scores[0];
  const interval = scores.length === 1 ? intervalOf(scores[0]) : null;
  return {value: mean(0), error: mean(1), difference: mean(2), rank, low, high, interval, count: scores.length};
}

const metricOf = (index, name) => evaluations[index].metrics.find((metric) => metric.name === name);
const mainOf = (index) => evaluations[index].metrics[0];

// The mean over benchmarks whose scores are shares; null if the row lacks one.
function meanOf(row, indices) {
  const scores = indices.map((index) => scoreOf(row, index, mainOf(index).name));
  if (!scores.length || scores.some((score) => score === null)) return null;
  const mean = (of) =>
    scores.every((score) => known(of(score)))
      ? scores.reduce((sum, score) => sum + of(score), 0) / scores.length
      : null;
  const square = mean((score) => (known(score.error) ? score.error ** 2 : null));
  return {
    value: mean((score) => score.value),
    difference: mean((score) => score.difference),
    error: known(square) ? Math.sqrt(square / scores.length) : null,
  };
}
