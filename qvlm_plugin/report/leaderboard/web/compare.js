// Two rows side by side, and the documents with different answers.

const PAGE = 20;
const browser = {key: "", count: PAGE};
let answersRead = null;

function answersOf(index) {
  answersRead ??= JSON.parse(at("answers").textContent);
  return answersRead[index] ?? null;
}

function pairNow(view) {
  const rows = rowsOf(view);
  return state.compare.map((id) => rows.find((row) => row.id === id)).filter(Boolean);
}

const nameOf = (row) => `${row.method} ${row.scheme}`;

function drawCompare(view) {
  const pair = pairNow(view);
  at("chosen").hidden = pair.length !== 1;
  if (pair.length === 1) at("chosen-name").textContent = `${nameOf(pair[0])}, ${pair[0].model}`;
  at("compare").hidden = pair.length !== 2;
  if (pair.length !== 2) return;
  drawSideBySide(pair, view);
  drawBrowser(pair, view);
}

function drawSideBySide([one, other], view) {
  const lines = [];
  const line = (name, show, difference) => {
    const cells = [show(one), show(other)];
    if (cells.some((cell) => cell)) lines.push([name, ...cells, difference ?? (cells[0] === cells[1] ? "same" : "")]);
  };
  line("model", (row) => row.model);
  line("method", (row) => row.method);
  line("scheme", (row) => row.scheme);
  const {columns} = columnsOf(view);
  for (const column of columns.filter(({key}) => !["rank", "notes", "difference"].includes(key))) {
    const values = [column.value(one), column.value(other)];
    if (!values.some(known)) continue;
    line(
      column.name,
      (row) => (known(column.value(row)) ? column.show(column.value(row), row) : ""),
      changeText(column, values),
    );
  }
  line("notes", (row) => row.notes.join("; "));
  at("compare-head").replaceChildren(
    element("th", element("span", "figure", {class: "unseen"}), {scope: "col"}),
    ...[one, other].map((row) => element("th", [icon(row), nameOf(row)], {scope: "col"})),
    element("th", "change", {scope: "col"}),
  );
  at("compare-rows").replaceChildren(
    ...lines.map(([name, ...cells]) =>
      element("tr", [element("th", breakable(name), {scope: "row"}), ...cells.map((cell) => element("td", cell))]),
    ),
  );
}

// The difference of scores, or the ratio of costs.
function changeText(column, [before, after]) {
  if (!known(before) || !known(after) || typeof before !== "number") return undefined;
  if (column.unit !== undefined) return signed(after - before, column.unit === "%");
  return before > 0 && column.key !== "bits" ? `× ${fixed(after / before, 2)}` : undefined;
}

function drawBrowser([one, other], view) {
  const places = Object.keys(one.entries).filter((index) => other.entries[index] && answersOf(index));
  const usable = places.filter((index) => [one, other].every((row) => picksOf(index, row)));
  at("flips").hidden = !usable.length;
  at("no-flips").hidden = usable.length > 0;
  if (!usable.length) return;
  const id = (index) => evaluations[index].name || index;
  const index = usable.find((place) => id(place) === state.benchmark) ?? usable[0];
  at("benchmark").replaceChildren(
    ...usable.map((place) => element("option", evaluations[place].label, {value: id(place)})),
  );
  at("benchmark").value = id(index);
  at("benchmark-label").hidden = usable.length < 2;
  const flips = flipsOf(index, one, other);
  for (const kind of ["broke", "fixed", "changed"]) {
    at(`flips-${kind}`).checked = state.flips === kind;
    at(`count-${kind}`).textContent = flips[kind].length;
  }
  at("flips-sum").textContent = flipsText(index, one, other, flips);
  const key = [one.id, other.id, index, state.flips].join(" ");
  if (browser.key !== key) Object.assign(browser, {key, count: PAGE});
  drawDocuments(index, flips[state.flips] ?? flips.broke, [one, other]);
}

// For a row with several seeds, the first of its runs that has samples.
function picksOf(index, row) {
  const found = row.entries[index].map((entry) => answersOf(index).picks[entry.run]).find(Boolean);
  return found ?? null;
}

function flipsOf(index, one, other) {
  const [before, after] = [picksOf(index, one), picksOf(index, other)];
  const sign = mainOf(index).higher ? 1 : -1;
  const flips = {broke: [], fixed: [], changed: [], square: 0};
  const sums = new Map();
  answersOf(index).questions.forEach((question, place) => {
    const [, , , image, outcomes] = question;
    if (before[place] === after[place]) return;
    const answered = {question, before: outcomes[before[place]], after: outcomes[after[place]]};
    const change = sign * (answered.after[1] - answered.before[1]);
    flips[change < 0 ? "broke" : change > 0 ? "fixed" : "changed"].push(answered);
    sums.set(image, (sums.get(image) ?? 0) + change);
  });
  for (const sum of sums.values()) flips.square += sum ** 2;
  return flips;
}

function flipsText(index, one, other, flips) {
  const {questions, differing} = answersOf(index);
  const {documents} = evaluations[index];
  const {name, percent} = mainOf(index);
  const [before, after] = [one, other].map((row) => scoreOf(row, index, name));
  const [held, all] = [questions.length, differing].map((count) => count.toLocaleString("en"));
  const part = held === all ? "" : `Shows ${held} of the ${all} documents on which runs differ. `;
  const reach = (1.96 * Math.sqrt(flips.square * (questions.length ? differing / questions.length : 1))) / documents;
  const difference = after.value - before.value;
  const interval = [difference - reach, difference + reach].map((end) => signed(end, percent)).join(" to ");
  const seeds = Math.max(before.count, after.count) > 1 ? " Scores are means over seeds, documents of the first." : "";
  const asked = counted(documents, "document");
  return `${part}${name}: ${signed(difference, percent)} (95 % interval ${interval}) on ${asked}.${seeds}`;
}

function drawDocuments(index, found, pair) {
  const items = found.slice(0, browser.count).map((flip) => documentItem(answersOf(index).pictures, flip, pair));
  at("documents").replaceChildren(...items);
  at("no-documents").hidden = found.length > 0;
  at("more-documents").hidden = found.length <= browser.count;
  at("more-documents").textContent = `Show ${Math.min(PAGE, found.length - browser.count)} more of ${found.length}`;
}

function documentItem(pictures, {question: [id, text, target, image], before, after}, [one, other]) {
  const line = (name, said) => element("div", [element("dt", name), element("dd", said)], {class: "answer"});
  const answer = (row, [said, score]) =>
    line([icon(row), nameOf(row)], [element("q", said || "nothing"), ` scores ${number(score, false)}`]);
  const answers = [answer(one, before), answer(other, after), line("reference", element("q", target))];
  const shown = pictures[image]
    ? element("img", null, {src: pictures[image], alt: `Picture of document ${id}`, loading: "lazy"})
    : null;
  const told = [
    element("p", text, {class: "question"}),
    element("dl", answers),
    element("p", `document ${id}`, {class: "small"}),
  ];
  return element("li", [shown, element("div", told)], {tabindex: -1});
}

function watchCompare() {
  on(at("benchmark"), "change", (event) => update({benchmark: event.target.value}));
  for (const kind of ["broke", "fixed", "changed"]) on(at(`flips-${kind}`), "change", () => update({flips: kind}));
  on(at("more-documents"), "click", () => {
    const next = browser.count;
    browser.count += PAGE;
    drawCompare(viewOf());
    if (at("more-documents").hidden) at("documents").children[next].focus();
  });
  on(at("swap"), "click", () => update({compare: [...state.compare].reverse()}));
  for (const id of ["compare-close", "chosen-clear"])
    on(at(id), "click", () => {
      update({compare: []});
      at("table").focus({preventScroll: id === "chosen-clear"});
    });
}
