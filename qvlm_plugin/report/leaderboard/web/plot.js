// Score against a cost: one path for each colour and shape, so that thousands of points are drawn at once.

const EDGE = {left: 46, right: 14, top: 12, bottom: 42};

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough * 0.999);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step);
  return {found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9))};
}

function span(values) {
  const [low, high] = values.reduce(
    ([low, high], value) => [Math.min(low, value), Math.max(high, value)],
    [Infinity, -Infinity],
  );
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

// The points that no other point beats in both cost and score.
function front(points, lessCost, higher) {
  const ordered = [...points].sort(
    (a, b) => (lessCost ? a.cost - b.cost : b.cost - a.cost) || (higher ? b.score - a.score : a.score - b.score),
  );
  let best = null;
  return ordered.filter(({score}) => {
    if (best !== null && (higher ? score <= best : score >= best)) return false;
    best = score;
    return true;
  });
}

function pointsOf(rows, score, cost) {
  const points = [];
  for (const row of rows) {
    const [own, x] = [score.of(row), cost(row)];
    if (own && known(x))
      points.push({
        row,
        cost: x,
        score: scaled(own.value, score.percent),
        error: scaled(own.error ?? 0, score.percent),
      });
  }
  return points;
}

function drawPlot(id, {title, unit, cost, lessCost}, rows, score) {
  const figure = at(id);
  const points = pointsOf(rows, score, cost);
  const caption = `${score.name}${score.percent ? " (%)" : ""} against ${title}`;
  const told =
    points.length < rows.length ? ` – ${points.length || "none"} of ${counted(rows.length, "row")} have both` : "";
  figure.querySelector("figcaption").replaceChildren(element("strong", caption), told);
  figure.querySelector("svg")?.remove();
  figure.points = null;
  if (!points.length) return;
  const width = Math.max(260, figure.clientWidth);
  const height = Math.min(320, Math.max(210, width * 0.52));
  const ends = points.flatMap((point) => [point.score - point.error, point.score + point.error]);
  const [x0, x1] = [0, span(points.map((point) => point.cost))[1]];
  const [y0, y1] = span(ends);
  const x = (value) => EDGE.left + ((value - x0) / (x1 - x0)) * (width - EDGE.left - EDGE.right);
  const y = (value) => height - EDGE.bottom - ((value - y0) / (y1 - y0)) * (height - EDGE.top - EDGE.bottom);
  const beaten = front(points, lessCost, score.higher);
  const made = drawing("svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    "aria-label": `${caption}. ${summary(points, beaten)}`,
  });
  made.append(...axes({x, y, x0, x1, y0, y1, width, height}, `${title} (${unit})`));
  if (beaten.length > 1) made.append(drawing("path", {class: "front", d: steps(beaten, x, y)}));
  for (const own of series(points)) {
    const [look, shape] = [colourOf(own[0].row.method), shapeOf(own[0].row.model)];
    const errors = own
      .filter(({error}) => error)
      .map((point) => `M${x(point.cost)} ${y(point.score - point.error)}V${y(point.score + point.error)}`)
      .join("");
    if (errors && points.length <= 60) made.append(drawing("path", {class: "error", d: errors}));
    const marks = own.map((point) => placed(shape, x(point.cost), y(point.score))).join("");
    made.append(paint(drawing("path", {class: "points", d: marks}), look));
  }
  made.append(drawing("circle", {class: "near", r: 9, visibility: "hidden"}));
  figure.points = points.map((point) => ({...point, x: x(point.cost), y: y(point.score)}));
  figure.told = (point) => `${pointText(point)}: ${score.show(point.row)} at ${fixed(point.cost, 2)} ${unit}`;
  figure.insertBefore(made, figure.querySelector(".tip"));
}

function series(points) {
  const found = new Map();
  for (const point of points) {
    const key = `${shapePlaces.get(point.row.model)} ${point.row.method}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(point);
  }
  return found.values();
}

function axes({x, y, x0, x1, y0, y1, width, height}, label) {
  const [across, up] = [ticks(x0, x1, width / 90), ticks(y0, y1, height / 55)];
  const [floor, edge] = [height - EDGE.bottom, width - EDGE.right];
  return [
    ...across.found.flatMap((value) => [
      drawing("line", {class: "grid", x1: x(value), x2: x(value), y1: EDGE.top, y2: floor}),
      drawing("text", {x: x(value), y: floor + 16, "text-anchor": "middle"}, fixed(value, across.digits)),
    ]),
    ...up.found.flatMap((value) => [
      drawing("line", {class: "grid", x1: EDGE.left, x2: edge, y1: y(value), y2: y(value)}),
      drawing("text", {x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end"}, fixed(value, up.digits)),
    ]),
    drawing("path", {class: "axis", d: `M${EDGE.left} ${EDGE.top}V${floor}H${edge}`}),
    drawing("text", {x: (EDGE.left + edge) / 2, y: height - 6, "text-anchor": "middle"}, label),
  ];
}

// From each point of the front, level to the cost of the next one: the best score for that cost.
function steps(points, x, y) {
  return points
    .map((point, place) => (place ? `H${x(point.cost)}V${y(point.score)}` : `M${x(point.cost)} ${y(point.score)}`))
    .join("");
}

const pointText = ({row}) => `${row.method} ${row.scheme}, ${row.model}`;

function summary(points, beaten) {
  return `${counted(points.length, "point")}; on the Pareto line: ${beaten.slice(0, 10).map(pointText).join("; ")}`;
}

// Names the point near the pointer; a click shows its details.
function watchPlot(id) {
  const figure = at(id);
  const tip = figure.querySelector(".tip");
  const nearest = (event) => {
    const box = figure.querySelector("svg")?.getBoundingClientRect();
    if (!box || !figure.points) return null;
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    const distance = (point) => Math.hypot(point.x - left, point.y - top);
    const best = figure.points.reduce((one, other) => (distance(other) < distance(one) ? other : one));
    return distance(best) < 24 ? best : null;
  };
  const show = (point) => {
    tip.hidden = !point;
    const ring = figure.querySelector(".near");
    ring?.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return;
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    tip.textContent = figure.told(point);
    tip.style.left = `${Math.min(point.x, figure.clientWidth - 200)}px`;
    tip.style.top = `${point.y + figure.querySelector("figcaption").offsetHeight + 14}px`;
  };
  on(figure, "pointermove", (event) => show(nearest(event)));
  on(figure, "pointerleave", () => show(null));
  on(figure, "click", (event) => {
    const point = nearest(event);
    if (point) showDetails(point.row);
  });
}

function drawPlots(rows, score) {
  at("plots").hidden = !rows.length;
  const largest = rows.reduce((most, row) => Math.max(most, row.run.packed_bytes ?? 0), 0);
  const [unit, size] = largest >= 1e9 ? ["GB", 1e9] : ["MB", 1e6];
  const packed = (row) => (known(row.run.packed_bytes) ? row.run.packed_bytes / size : null);
  drawPlot("plot-size", {title: "packed size", unit, cost: packed, lessCost: true}, rows, score);
  drawPlot("plot-speed", {title: "speed", unit: "tokens/s", cost: (row) => row.speed, lessCost: false}, rows, score);
  drawLegend(rows);
  at("bars").hidden = !document.querySelector("#plots .error");
}
