// Marks of runs: the colour is the method, the shape the model. Both depend on all runs, not only those shown.

const COLOURS = 7; // --c0 … in page.css
// A starting point and a path relative to it, centered on 0 0.
const SHAPES = [
  [-4.5, 0, "a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"],
  [-4, -4, "h8v8h-8z"],
  [0, -5.4, "l5.2 9.2h-10.4z"],
  [0, -5.8, "l5.4 5.8l-5.4 5.8l-5.4 -5.8z"],
  [0, 5.4, "l5.2 -9.2h-10.4z"],
  [-1.7, -5, "h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z"],
  [0, -6, "l1.6 4.1l4.3 .3l-3.3 2.7l1.1 4.2l-3.7 -2.3l-3.7 2.3l1.1 -4.2l-3.3 -2.7l4.3 -.3z"],
  [-2.7, -4.7, "h5.4l2.7 4.7l-2.7 4.7h-5.4l-2.7 -4.7z"],
];
const METHODS = unique(data.runs.map((run) => run.method ?? "–"))
  .sort()
  .filter((method) => method !== "none");
const MODELS = unique(data.runs.map((run) => run.model)).sort();
const lastPart = (model) => model.replace(/\/+$/, "").split("/").at(-1);

// The name without owner or folder, unless several models share it.
const OWNERS = Map.groupBy(MODELS, lastPart);
const shortName = (model) => (OWNERS.get(lastPart(model)).length === 1 ? lastPart(model) : model);

// Full precision has the colour of text; after the last colour, they repeat with hollow shapes.
function colourOf(method) {
  const place = METHODS.indexOf(method);
  return place < 0
    ? {colour: "var(--text)", hollow: false}
    : {colour: `var(--c${place % COLOURS})`, hollow: Math.floor(place / COLOURS) % 2 === 1};
}

const shapePlaces = new Map(MODELS.map((model, place) => [model, place % SHAPES.length]));
const shapeOf = (model) => SHAPES[shapePlaces.get(model)];

function paint(shape, {colour, hollow}) {
  shape.style.fill = hollow ? "var(--back)" : colour;
  shape.style.stroke = hollow ? colour : "var(--back)";
  shape.style.strokeWidth = hollow ? 2 : 1;
  return shape;
}

const placed = ([left, top, path], x = 0, y = 0) => `M${(x + left).toFixed(2)} ${(y + top).toFixed(2)}${path}`;

function symbol(shape, look) {
  const made = drawing("svg", {viewBox: "-7 -7 14 14", class: "icon", "aria-hidden": "true"});
  made.append(paint(drawing("path", {d: placed(shape)}), look));
  return made;
}

const icon = ({model, method}) => symbol(shapeOf(model), colourOf(method));

const NAMED = 16; // so many models the legend names
const HOLLOW = {colour: "var(--text)", hollow: true};

function drawLegend(rows) {
  const [shownMethods, shownModels] = ["method", "model"].map((name) => new Set(rows.map((row) => row[name])));
  const methods = ["none", ...METHODS].filter((method) => shownMethods.has(method));
  const models = MODELS.filter((model) => shownModels.has(model));
  const entry = (mark, name) => element("li", [mark, name]);
  at("legend-methods").replaceChildren(
    ...methods.map((method) =>
      entry(symbol(SHAPES[0], colourOf(method)), method === "none" ? "none (full precision)" : method),
    ),
  );
  const named = models.slice(0, NAMED).map((model) => entry(symbol(shapeOf(model), HOLLOW), shortName(model)));
  const more = models.length > NAMED ? [element("li", `and ${models.length - NAMED} more, whose shapes repeat`)] : [];
  at("legend-models").replaceChildren(...named, ...more);
  at("legend-models").parentElement.hidden = MODELS.length < 2;
}
