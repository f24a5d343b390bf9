// The table. Of many rows, only visible ones and their neighbours are in the document; all have equal height.

const WHOLE = 200; // so many rows are all in the document
const MARGIN = 30; // of more, so many above and below those in sight
const NAMES = ["method", "scheme", "model"];
const table = {rows: [], columns: [], first: 0, last: 0, built: new Map()};

function sortNow(columns, usual) {
  const text = state.sort || usual;
  const [key, descending] = [text.slice(0, -1), text.endsWith("-")];
  const column =
    columns.find((one) => one.key === key) ?? (NAMES.includes(key) ? {key, value: (row) => row[key]} : null);
  return column ? {column, descending} : {column: columns[0], descending: Boolean(columns[0].high)};
}

function sorted(rows, {column, descending}) {
  const sign = descending ? -1 : 1;
  const keyed = rows.map((row) => [column.value(row) ?? null, row]);
  keyed.sort(([a, one], [b, other]) => {
    if (a === null || b === null) return (a === null) - (b === null) || (a === b ? compareNames(one, other) : 0);
    return sign * (typeof a === "string" ? (a < b ? -1 : a > b ? 1 : 0) : a - b) || compareNames(one, other);
  });
  return keyed.map(([, row]) => row);
}

function compareNames(one, other) {
  for (const name of ["model", "method", "scheme"])
    if (one[name] !== other[name]) return one[name] < other[name] ? -1 : 1;
  return 0;
}

function drawTable(view, rows, columns, order) {
  const head = `${view.id} ${columns.map((column) => column.key + column.name).join(" ")}`;
  if (table.head !== head) {
    drawHead(view, columns);
    table.built.clear();
  }
  if (rows.length !== table.rows.length || rows.some((row, place) => row !== table.rows[place]))
    at("table").scrollTop = 0;
  Object.assign(table, {head, rows, columns, order});
  for (const button of document.querySelectorAll("#runs thead button")) {
    const isKey = button.dataset.key === order.column.key;
    button.dataset.order = isKey ? (order.descending ? "descending" : "ascending") : "";
  }
  for (const cell of document.querySelectorAll("#runs thead th")) {
    cell.setAttribute(
      "aria-sort",
      [...cell.querySelectorAll("button")].map((button) => button.dataset.order).find(Boolean) || "none",
    );
  }
  const runs = at("runs");
  runs.setAttribute("aria-rowcount", rows.length + 1);
  runs.querySelector("caption").textContent = view.title;
  drawWindow(true);
}

function drawHead(view, columns) {
  const button = (key, name, {high, title, unit}) => {
    const parts = [...breakable(name), unit ? element("span", ` ${unit}`, {class: "unit"}) : null];
    const made = element("button", parts, {type: "button", "data-key": key, title});
    on(made, "click", () => {
      const {column, descending} = table.order;
      const down = key === column.key ? !descending : Boolean(high);
      update({sort: `${key}${down ? "-" : "+"}`});
    });
    return made;
  };
  const cells = columns.map((column) => {
    const sorting = button(column.key, column.name, column);
    return element("th", sorting, {scope: "col", class: column.text ? "text" : null});
  });
  const sorting = NAMES.map((name) => button(name, name, {title: `Sort by ${name}`}));
  const names = element("th", element("span", sorting, {class: "names"}), {scope: "col", class: "run"});
  document.querySelector("#runs thead").replaceChildren(element("tr", [names, ...cells], {"aria-rowindex": 1}));
  const rows = rowsOf(view);
  const width = (column) => {
    if (column.hasInterval) return column.hasInterval(rows) ? 11.2 : 6.8;
    return column.wide ? 16 : column.text ? 9 : column.narrow ? 4.5 : 6.3;
  };
  document.querySelector("#runs colgroup").replaceChildren(
    element("col", null, {class: "run"}),
    ...columns.map((column) => {
      const made = element("col");
      made.style.width = `${width(column)}rem`;
      return made;
    }),
  );
  at("runs").style.setProperty("--columns", `${columns.reduce((sum, column) => sum + width(column), 0)}rem`);
}

function tableRow(row, place) {
  if (!table.built.has(row)) {
    const cells = table.columns.map((column) => {
      const value = column.value(row) ?? null;
      const text = value === null ? "" : column.show(value, row);
      return element("td", text, {class: column.text ? "text" : null, title: column.text && text ? text : null});
    });
    table.built.set(row, element("tr", [nameCell(row), ...cells], {class: "run"}));
  }
  const made = table.built.get(row);
  made.setAttribute("aria-rowindex", place + 2);
  made.querySelector("input").checked = state.compare.includes(row.id);
  return made;
}

function nameCell(row) {
  const name = `${row.method} ${row.scheme} ${row.model}`;
  const box = element("input", null, {
    type: "checkbox",
    "aria-label": `Compare ${name}`,
    title: "Compare this row with another one",
  });
  on(box, "change", () => update({compare: toggled(state.compare, row.id).slice(-2)}));
  const more = element("button", row.method, {
    type: "button",
    class: "more",
    "aria-label": `Details of ${name}`,
    "aria-haspopup": "dialog",
    title: "Details",
  });
  on(more, "click", () => showDetails(row));
  const parts = [
    element("span", [box, icon(row), more], {class: "method"}),
    element("span", row.scheme, {class: "scheme"}),
    element("span", shortName(row.model), {class: "model", title: row.model}),
  ];
  return element("th", element("span", parts, {class: "names"}), {scope: "row", class: "run"});
}

function drawWindow(fresh) {
  const [frame, body] = [at("table"), document.querySelector("#runs tbody")];
  const {rows} = table;
  const height = table.height || 36;
  const top = Math.floor(frame.scrollTop / height);
  const bottom = Math.ceil((frame.scrollTop + frame.clientHeight) / height);
  const isNear = table.first <= Math.max(0, top - 5) && table.last >= Math.min(rows.length, bottom + 5);
  if (!fresh && isNear) return;
  const all = rows.length <= WHOLE;
  Object.assign(table, {
    first: all ? 0 : Math.max(0, top - MARGIN),
    last: all ? rows.length : Math.min(rows.length, bottom + MARGIN),
  });
  const wanted = rows.slice(table.first, table.last).map((row, place) => tableRow(row, table.first + place));
  const focused = body.contains(document.activeElement) ? document.activeElement : null;
  const spacer = (count) => {
    const made = element("tr", null, {class: "spacer", "aria-hidden": "true"});
    made.style.height = `${count * height}px`;
    return made;
  };
  body.replaceChildren(spacer(table.first), ...wanted, spacer(rows.length - table.last));
  if (focused) (body.contains(focused) ? focused : frame).focus({preventScroll: true});
  const measured = wanted[0]?.getBoundingClientRect().height;
  if (measured && Math.abs(measured - (table.height ?? 0)) > 0.1) {
    table.height = measured;
    if (!all) drawWindow(true);
  }
}

function watchTable() {
  let asked = 0;
  const redraw = () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      drawWindow(false);
    });
  };
  on(at("table"), "scroll", redraw);
  on(window, "resize", () => {
    table.height = 0;
    drawWindow(true);
  });
}
