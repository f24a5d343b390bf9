// Elements, and formatted numbers. All texts are inserted as text, because names in the data are untrusted.

// content: a text, an element, or a list of them
function element(name, content = null, attributes = {}) {
  const made = document.createElement(name);
  made.append(...[content].flat().filter(known));
  for (const [key, value] of Object.entries(attributes)) {
    if (known(value) && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  return made;
}

function drawing(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const at = (id) => document.getElementById(id);
const on = (target, event, act) => target.addEventListener(event, act);
const known = (value) => value !== null && value !== undefined;
const unique = (values) => [...new Set(values)];
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// A name that wraps after underscores.
const breakable = (name) => name.split(/(?<=_)/).flatMap((part, place) => (place ? [element("wbr"), part] : [part]));

const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
const bytes = (count) => (count >= 1e9 ? `${fixed(count / 1e9, 2)} GB` : `${fixed(count / 1e6, 1)} MB`);
const duration = (seconds) =>
  seconds < 120
    ? `${fixed(seconds, 0)} s`
    : seconds < 7200
      ? `${fixed(seconds / 60, 0)} min`
      : `${fixed(seconds / 3600, 1)} h`;

// A score: shares in percent, others with five digits.
const scaled = (value, percent) => (percent ? 100 * value : value);
const number = (value, percent) =>
  percent ? fixed(100 * value, 1) : String(Number(value.toPrecision(5))).replace("-", "−");

// interval: both ends; null if the standard error is shown. An error of 0 is not shown.
function withError(value, error, percent, interval = null) {
  const text = number(value, percent);
  if (interval) return `${text} [${interval.map((end) => number(end, percent)).join(", ")}]`;
  return text + (known(error) && error > 0 ? ` ± ${number(error, percent)}` : "");
}

function signed(value, percent) {
  const text = number(value, percent).replace("−", "");
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : "+") + text;
}
