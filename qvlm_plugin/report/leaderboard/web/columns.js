// Columns of a view. value: sort key, null goes last; high: whether higher is better; rare: hidden by default.

const cost = (key, name, value, show, title, more) => ({key, name, value, show, title, ...more});
const fact = (key, name, field, title, show = String) =>
  cost(key, name, (row) => row.run[field], show, title, {text: true, rare: true});

const SIMULATED = "left out if low bits are simulated";
const bitsText = (bits, row) => `${fixed(bits, 2)} / ${fixed(row.run.activation_bits ?? 16, 0)}`;
const searched = (row) => (row.run.calibration ? row.run.search_seconds : null);
const noted = (row) => (row.notes.length ? row.notes.join("; ") : null);

const COSTS = [
  cost("bits", "bits w / a", (row) => row.run.weight_bits, bitsText, "Effective, scales included, of the decoder"),
  cost("packed", "packed size", (row) => row.run.packed_bytes, bytes, "Quantized weights, everything else in 16 bits"),
  cost(
    "speed",
    "tokens/s",
    (row) => row.speed,
    (speed) => fixed(speed, 1),
    `Measured; ${SIMULATED}`,
    {high: true},
  ),
  cost("weights", "weights in memory", (row) => row.run.weight_bytes, bytes, `Measured; ${SIMULATED}`, {rare: true}),
  cost("peak", "peak memory", (row) => row.run.peak_memory_bytes, bytes, `Measured; ${SIMULATED}`, {rare: true}),
  cost("search", "search", searched, duration, "Time of the search", {rare: true}),
  fact("backend", "backend", "backend", "Arithmetic; reference simulates low bits"),
  fact("device", "device", "device", "Device of the run"),
  fact("date", "date", "date", "When the evaluation began", day),
  fact("version", "version", "package", "Version of qvlm_plugin, with its commit if known"),
  cost("notes", "notes", noted, String, "Why a row is listed apart or has no rank", {text: true, wide: true}),
];

function day(date) {
  const parts = /^(\d{4})-?(\d\d)-?(\d\d)/.exec(date);
  return parts ? parts.slice(1).join("-") : date;
}

function rankText(rank, low, high) {
  return known(low) && low !== high ? `${low}–${high}` : String(rank);
}

// state.columns: columns whose visibility differs from the default
const isShown = (column) => !column.rare !== state.columns.includes(column.key);

function scoreColumn(index, metric, more) {
  const {percent, higher} = metric;
  return {
    value: (row) => scoreOf(row, index, metric.name)?.value ?? null,
    high: higher,
    show: (_, row) => {
      const {value, error, interval} = scoreOf(row, index, metric.name);
      return withError(value, error, percent, interval);
    },
    unit: percent ? "%" : "",
    hasInterval: (rows) => rows.some((row) => scoreOf(row, index, metric.name)?.interval),
    ...more,
  };
}

function differenceColumn(of, percent, title) {
  return {
    key: "difference",
    name: "difference",
    value: (row) => of(row)?.difference ?? null,
    show: (value) => signed(value, percent),
    high: true,
    title,
  };
}

const DIFFERENCE = "From the same model in full precision";
const PLACES = "A range gives the ranks that the documents do not exclude";

// Cache of computed means, by their benchmarks.
const meansKept = new Map();
function meansOver(indices) {
  const key = indices.join(" ");
  if (!meansKept.has(key)) meansKept.set(key, new Map());
  return meansKept.get(key);
}

function overviewColumns(overview) {
  const own = [...overview.benchmarks, ...overview.others].map((index) =>
    scoreColumn(index, mainOf(index), {
      key: `evaluation ${evaluations[index].name || index}`,
      name: evaluations[index].label,
      index,
      rare: overview.others.includes(index),
      title: `${mainOf(index).name}: ${evaluations[index].title}`,
    }),
  );
  const shown = own.filter(isShown).map((column) => column.index);
  const averaged = shown.filter((index) => mainOf(index).percent && mainOf(index).higher);
  const isUsual =
    shown.length === overview.benchmarks.length && overview.benchmarks.every((index) => shown.includes(index));
  const means = meansOver(averaged);
  const mean = (row) => {
    if (!means.has(row)) means.set(row, meanOf(row, averaged));
    return means.get(row);
  };
  const shownMean = (row) => withError(mean(row).value, mean(row).error, true);
  const rank = {
    key: "rank",
    name: "rank",
    value: (row) => (row.place && mean(row) ? -mean(row).value : null),
    show: (_, row) => rankText(row.place[0], ...row.place),
    narrow: true,
    title: `By the mean. ${PLACES}`,
  };
  const average = {
    key: "mean",
    name: `mean of ${averaged.length}`,
    value: (row) => mean(row)?.value ?? null,
    show: (_, row) => shownMean(row),
    high: true,
    unit: "%",
    hasInterval: () => false,
    title: "Over the benchmarks shown whose scores are shares; empty if one is missing",
  };
  const difference = {
    ...differenceColumn(mean, true, `${DIFFERENCE}, over the same benchmarks`),
    name: "mean difference",
  };
  const summed = averaged.length ? [...(isUsual ? [rank] : []), average, difference] : [];
  return {
    columns: [...summed, ...own, ...COSTS],
    score: {name: "mean", percent: true, higher: true, of: mean, show: (row) => `${shownMean(row)} %`},
    sort: averaged.length ? "mean-" : "method+",
  };
}

function evaluationColumns(index, metric) {
  const of = (row) => scoreOf(row, index, metric.name);
  const rank = {
    key: "rank",
    name: "rank",
    value: (row) => of(row)?.rank ?? null,
    show: (value, row) => rankText(value, of(row).low, of(row).high),
    narrow: true,
    title: PLACES,
  };
  const title = metric.higher ? "Higher is better" : "Lower is better";
  const score = scoreColumn(index, metric, {key: "score", name: metric.name, title});
  const others = evaluations[index].metrics
    .filter((one) => one !== metric)
    .map((one) => scoreColumn(index, one, {key: `metric ${one.name}`, name: one.name, title: "Of the same task"}));
  return {
    columns: [rank, score, differenceColumn(of, metric.percent, DIFFERENCE), ...others, ...COSTS],
    score: {...metric, of, show: (row) => `${score.show(null, row)}${metric.percent ? " %" : ""}`},
    sort: "rank+",
  };
}

const columnsOf = (view) =>
  view.overview ? overviewColumns(view.overview) : evaluationColumns(view.index, metricNow());
