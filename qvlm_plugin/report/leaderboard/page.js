"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777"];
const ANY = "all";
const FACTS = ["vision_weight_bits", "vision_activation_bits", "backend", "dtype", "device", "calibration", "options", "arguments",
  "plan_hash", "model_fingerprint", "versions", "date", "run"];

// Every text goes in as text: names in the data are not ours.
function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
const bytes = (count) => count >= 1e9 ? `${fixed(count / 1e9, 2)} GB` : `${fixed(count / 1e6, 1)} MB`;
const score = (run) => run.scores[state.metric];
const scaled = (one, value) => one.percent ? 100 * value : value;
const number = (one, value) => one.percent ? fixed(100 * value, 1) : String(Number(value.toPrecision(5))).replace("-", "−");
const withError = (one) => number(one, one.value) + (one.stderr === null ? "" : ` ± ${number(one, one.stderr)}`);

// key: what is sorted by (null goes last); show: the text; text: aligned left; high: whether much is good
const COLUMNS = [
  {name: "rank", key: (run) => score(run)?.rank ?? null, show: (rank) => rank},
  {name: "model", key: (run) => run.model, show: (model) => model, text: true},
  {name: "method", key: (run) => run.method, show: (method) => method, text: true},
  {name: "scheme", key: (run) => run.scheme, show: (scheme) => scheme, text: true},
  {name: "bits w / a", key: (run) => run.weight_bits, show: (bits, run) => `${fixed(bits, 2)} / ${fixed(run.activation_bits ?? 16, 0)}`},
  {name: "score", key: (run) => score(run)?.value ?? null, show: (_, run) => withError(score(run)), high: true},
  {name: "drop", key: (run) => score(run)?.drop ?? null, show: (drop, run) => (drop >= 0 ? "+" : "") + number(score(run), drop), high: true},
  {name: "packed size", key: (run) => run.packed_bytes, show: bytes},
  {name: "weights", key: (run) => run.weight_bytes, show: bytes},
  {name: "peak memory", key: (run) => run.peak_memory_bytes, show: bytes},
  {name: "tokens/s", key: (run) => run.tokens_per_second, show: (speed) => fixed(speed, 1), high: true},
  {name: "search", key: (run) => run.calibration ? run.search_seconds : null, show: (seconds) => `${fixed(seconds, 0)} s`},
];

const state = {evaluation: 0, metric: null, method: ANY, scheme: ANY, search: "", sort: 0, descending: false, open: new Set()};
const evaluation = () => data.evaluations[state.evaluation];

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => element("option", value)));
  select.value = values.includes(chosen) ? chosen : values[0];
  return select.value;
}

function shown() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  return evaluation().runs.filter((run) => {
    const text = [run.model, run.method, run.scheme, run.options, run.arguments, run.backend, run.dtype, ...run.notes].join(" ").toLowerCase();
    return score(run) && (state.method === ANY || (run.method ?? "–") === state.method)
      && (state.scheme === ANY || (run.scheme ?? "–") === state.scheme) && words.every((word) => text.includes(word));
  });
}

function sorted(runs) {
  const {key} = COLUMNS[state.sort];
  const sign = state.descending ? -1 : 1;
  return [...runs].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
}

function cell(column, run) {
  const value = column.key(run);
  const made = element("td", value === null || value === undefined ? "" : column.show(value, run));
  if (made.textContent) made.dataset.label = column.name === "score" ? state.metric : column.name;
  if (column.name === "model") made.className = "text wide-cell";
  else if (column.text) made.className = "text short";
  return made;
}

function facts(run) {
  const list = element("dl");
  for (const name of FACTS) {
    if (run[name] === null || run[name] === undefined) continue;
    list.append(element("dt", name.replaceAll("_", " ")), element("dd", run[name]));
  }
  for (const [name, target] of [["results", run.file], ["samples", run.samples]]) {
    if (!target) continue;
    const place = element("dd");
    place.append(element("a", decodeURIComponent(target), {href: target}));
    list.append(element("dt", name), place);
  }
  const row = element("tr", null, {class: "facts"});
  const made = element("td", null, {colspan: COLUMNS.length + 1});
  made.append(list);
  row.append(made);
  return row;
}

function drawTable(runs) {
  const head = element("tr");
  COLUMNS.forEach((column, index) => {
    const made = element("th", null, {scope: "col"});
    if (column.text) made.className = "text";
    if (index === state.sort) made.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    const button = element("button", column.name === "score" ? state.metric : column.name, {type: "button"});
    button.addEventListener("click", () => sortBy(index, index === state.sort ? !state.descending : Boolean(column.high)));
    made.append(button);
    head.append(made);
  });
  head.append(element("th", "notes", {scope: "col", class: "text"}));
  document.querySelector("#runs thead").replaceChildren(head);
  document.querySelector("#runs caption").textContent = evaluation().title;
  const rows = [];
  for (const run of sorted(runs)) {
    const row = element("tr", null, {class: "run"});
    row.append(...COLUMNS.map((column) => cell(column, run)));
    const last = element("td", null, {class: "text wide-cell"});
    if (run.notes.length) last.append(element("span", run.notes.join("; "), {class: "notes"}), " ");
    const more = element("button", state.open.has(run.run) ? "less" : "more", {type: "button", class: "more", "aria-expanded": state.open.has(run.run)});
    more.addEventListener("click", () => {
      if (!state.open.delete(run.run)) state.open.add(run.run);
      draw();
    });
    last.append(more);
    row.append(last);
    rows.push(row);
    if (state.open.has(run.run)) rows.push(facts(run));
  }
  document.querySelector("#runs tbody").replaceChildren(...rows);
  at("count").textContent = `${runs.length} of ${evaluation().runs.length} runs`;
}

function drawBreakdown(runs) {
  const names = evaluation().metrics.map((metric) => metric.name);
  at("breakdown").hidden = names.length < 2;
  const head = element("tr");
  head.append(...["model", "method", "scheme"].map((name) => element("th", name, {scope: "col", class: "text"})));
  head.append(...names.map((name) => element("th", name, {scope: "col"})));
  document.querySelector("#breakdown thead").replaceChildren(head);
  const rows = sorted(runs).map((run) => {
    const row = element("tr");
    row.append(...[run.model, run.method, run.scheme].map((text) => element("td", text ?? "–", {class: "text"})));
    row.append(...names.map((name) => element("td", run.scores[name] ? number(run.scores[name], run.scores[name].value) : "")));
    return row;
  });
  document.querySelector("#breakdown tbody").replaceChildren(...rows);
}

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return {found, digits: Math.max(0, -Math.floor(Math.log10(step)))};
}

function span(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low || Math.abs(high) || 1) * .08;
  return [low - margin, high + margin];
}

// One point a run: score against a cost; runs without that cost are left out.
function drawPlot(figure, title, unit, cost, runs) {
  const points = runs.map((run) => ({run, x: cost(run), y: scaled(score(run), score(run).value), error: scaled(score(run), score(run).stderr ?? 0)}))
    .filter((point) => point.x !== null);
  figure.hidden = !points.length;
  figure.querySelector("svg")?.remove();
  figure.querySelector("figcaption").textContent = `${state.metric}${points.some((point) => score(point.run).percent) ? " (%)" : ""} against ${title}`;
  if (!points.length) return;
  const [width, height, left, bottom, top, right] = [480, 320, 52, 44, 12, 12];
  const names = [...new Set(evaluation().runs.map((run) => run.method ?? "–"))].sort();
  const used = names.filter((name) => points.some(({run}) => (run.method ?? "–") === name));
  const [x0, x1] = span(points.map((point) => point.x));
  const [y0, y1] = span(points.flatMap((point) => [point.y - point.error, point.y + point.error]));
  const x = (value) => left + (value - x0) / (x1 - x0) * (width - left - right);
  const y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - bottom - top);
  const rows = Math.ceil(used.length / 4);
  const drawing = svg("svg", {viewBox: `0 0 ${width} ${height + 18 * rows}`, role: "img", "aria-label": figure.querySelector("figcaption").textContent});
  const across = ticks(x0, x1), up = ticks(y0, y1);
  for (const value of across.found) {
    drawing.append(svg("line", {class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom}));
    drawing.append(svg("text", {x: x(value), y: height - bottom + 16, "text-anchor": "middle"}, fixed(value, across.digits)));
  }
  for (const value of up.found) {
    drawing.append(svg("line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}));
    drawing.append(svg("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, fixed(value, up.digits)));
  }
  drawing.append(svg("path", {class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}`}));
  drawing.append(svg("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle"}, `${title} (${unit})`));
  for (const point of points) {
    const colour = COLOURS[names.indexOf(point.run.method ?? "–") % COLOURS.length];
    if (point.error) drawing.append(svg("line", {stroke: colour, x1: x(point.x), x2: x(point.x), y1: y(point.y - point.error), y2: y(point.y + point.error)}));
    const circle = svg("circle", {class: "point", cx: x(point.x), cy: y(point.y), r: 5, fill: colour});
    circle.append(svg("title", {}, `${point.run.model} ${point.run.method ?? ""} ${point.run.scheme ?? ""}: ${withError(score(point.run))}`));
    drawing.append(circle);
  }
  used.forEach((name, index) => {
    const [column, row] = [index % 4, Math.floor(index / 4)];
    const place = {x: left + column * 105, y: height + 12 + 18 * row};
    drawing.append(svg("circle", {cx: place.x, cy: place.y - 4, r: 5, fill: COLOURS[names.indexOf(name) % COLOURS.length]}));
    drawing.append(svg("text", {x: place.x + 9, y: place.y}, name));
  });
  figure.append(drawing);
}

function draw() {
  const runs = shown();
  at("apart").hidden = !evaluation().apart;
  at("sort").value = COLUMNS[state.sort].name;
  drawTable(runs);
  drawPlot(at("memory"), "packed size", "GB", (run) => run.packed_bytes === null ? null : run.packed_bytes / 1e9, runs);
  drawPlot(at("speed"), "speed", "tokens/s", (run) => run.tokens_per_second, runs);
  at("simulated").hidden = !runs.some((run) => run.backend === "reference" && run.method !== "none");
  drawBreakdown(runs);
}

function sortBy(index, descending) {
  Object.assign(state, {sort: index, descending});
  draw();
}

function choose(index) {
  state.evaluation = index;
  const runs = evaluation().runs;
  const values = (name) => [ANY, ...[...new Set(runs.map((run) => run[name] ?? "–"))].sort()];
  state.metric = options(at("metric"), evaluation().metrics.map((metric) => metric.name), null);
  state.method = options(at("method"), values("method"), state.method);
  state.scheme = options(at("scheme"), values("scheme"), state.scheme);
  Object.assign(state, {sort: 0, descending: false});
  draw();
}

for (const [apart, label] of [[false, "Whole benchmarks"], [true, "Stand-in data or a part"]]) {
  const group = element("optgroup", null, {label});
  data.evaluations.forEach((one, index) => {
    if (one.apart === apart) group.append(element("option", one.title, {value: index}));
  });
  if (group.children.length) at("evaluation").append(group);
}
options(at("sort"), COLUMNS.map((column) => column.name), null);
at("evaluation").addEventListener("change", (event) => choose(Number(event.target.value)));
for (const name of ["metric", "method", "scheme"]) {
  at(name).addEventListener("change", (event) => { state[name] = event.target.value; draw(); });
}
at("search").addEventListener("input", (event) => { state.search = event.target.value; draw(); });
at("sort").addEventListener("change", (event) => {
  const index = COLUMNS.findIndex((column) => column.name === event.target.value);
  sortBy(index, Boolean(COLUMNS[index].high));
});
at("controls").addEventListener("submit", (event) => event.preventDefault());
choose(Number(at("evaluation").value));
