// All facts of a row in a dialog; closing it returns the focus.

const FACTS = [
  "method",
  "scheme",
  "weight_bits",
  "activation_bits",
  "vision_weight_bits",
  "vision_activation_bits",
  "packed_bytes",
  "weight_bytes",
  "peak_memory_bytes",
  "tokens_per_second",
  "search_seconds",
  "backend",
  "dtype",
  "device",
  "calibration",
  "seed",
  "options",
  "arguments",
  "plan_hash",
  "model_fingerprint",
  "versions",
  "package",
  "date",
  "run",
];

function factText(name, value) {
  if (name.endsWith("_bytes")) return `${bytes(value)} (${value.toLocaleString("en")} bytes)`;
  return name === "date"
    ? day(value)
    : typeof value === "number"
      ? String(Number(value.toPrecision(6)))
      : String(value);
}

function factList(runs) {
  const list = element("dl");
  for (const name of FACTS) {
    const values = unique(runs.map((run) => run[name]).filter(known));
    if (!values.length) continue;
    const told =
      values.length > 3 ? `${values.length} different values` : values.map((value) => factText(name, value)).join("; ");
    list.append(element("dt", name.replaceAll("_", " ")), element("dd", told));
  }
  return list;
}

function scoreList(row) {
  const list = element("ul");
  for (const [index, entries] of Object.entries(row.entries)) {
    for (const entry of entries) {
      const {name, percent} = mainOf(index);
      const score = entry.scores[name];
      const text = score ? `${name} ${withError(score[0], score[1], percent, intervalOf(score))}` : "no score";
      const item = element("li", `${evaluations[index].title}: ${text} `);
      item.append(element("a", "results", {href: entry.file}));
      if (entry.samples) item.append(" ", element("a", "samples", {href: entry.samples}));
      if (entry.notes.length) item.append(element("span", ` ${entry.notes.join("; ")}`, {class: "notes"}));
      list.append(item);
    }
  }
  return list;
}

function showDetails(row) {
  const dialog = at("details");
  at("details-title").textContent = `${row.method} ${row.scheme}, ${row.model}`;
  at("details-body").replaceChildren(scoreList(row), factList(row.runs));
  const chosen = state.compare.includes(row.id);
  const button = element("button", chosen ? "Do not compare" : "Compare with another row", {type: "button"});
  on(button, "click", () => {
    dialog.close();
    update({compare: toggled(state.compare, row.id).slice(-2)});
  });
  at("details-body").append(button);
  dialog.showModal();
  dialog.scrollTop = 0;
}

function watchDetails() {
  on(at("details-close"), "click", () => at("details").close());
  on(at("details"), "click", (event) => {
    if (event.target === at("details")) at("details").close();
  });
}
