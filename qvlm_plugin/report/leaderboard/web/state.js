// State of the view. The address has all that differs from the defaults, so a link shows the same view.

const LISTS = ["model", "method", "scheme", "columns", "compare"];
const TEXTS = ["view", "metric", "bits", "size", "search", "sort", "benchmark", "flips"];
const DEFAULTS = {
  ...Object.fromEntries(LISTS.map((name) => [name, []])),
  ...Object.fromEntries(TEXTS.map((name) => [name, ""])),
  flips: "broke",
};
const state = {};

function readAddress() {
  const told = new URLSearchParams(location.hash.slice(1));
  for (const name of LISTS) state[name] = told.getAll(name);
  for (const name of TEXTS) state[name] = told.get(name) ?? DEFAULTS[name];
}

function writeAddress() {
  const told = new URLSearchParams();
  for (const name of LISTS) for (const value of state[name]) told.append(name, value);
  for (const name of TEXTS) if (state[name] !== DEFAULTS[name]) told.set(name, state[name]);
  const text = told.toString();
  if (text !== location.hash.slice(1))
    history.replaceState(null, "", `${location.pathname}${location.search}${text && `#${text}`}`);
}

const viewOf = () => VIEWS.find((view) => view.id === state.view) ?? VIEWS[0];

// The metric of an evaluation; an overview has none.
function metricNow() {
  const {index} = viewOf();
  return known(index) ? (metricOf(index, state.metric) ?? mainOf(index)) : null;
}

const toggled = (values, value) =>
  values.includes(value) ? values.filter((one) => one !== value) : [...values, value];
