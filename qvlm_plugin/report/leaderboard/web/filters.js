// Filters of rows. Each has a test, or null if inactive, and a function that clears it.

const amount = (text) => (text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text));

function filters() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const [bits, size] = [amount(state.bits), amount(state.size)];
  return [
    ...["model", "method", "scheme"].map((name) => ({
      name: `${name} ${state[name].join(" or ")}`,
      test: state[name].length ? (row) => state[name].includes(row[name]) : null,
      clear: {[name]: []},
    })),
    {
      name: `at most ${bits} bits`,
      test: bits === null ? null : (row) => known(row.run.weight_bits) && row.run.weight_bits <= bits,
      clear: {bits: ""},
    },
    {
      name: `at most ${size} GB`,
      test: size === null ? null : (row) => known(row.run.packed_bytes) && row.run.packed_bytes <= 1e9 * size,
      clear: {size: ""},
    },
    {
      name: `search “${state.search}”`,
      test: words.length ? (row) => words.every((word) => row.text.includes(word)) : null,
      clear: {search: ""},
    },
  ].filter((filter) => filter.test);
}

const passing = (rows, chosen) => rows.filter((row) => chosen.every((filter) => filter.test(row)));

// Shows the number of rows; if there are none, names the filter that removes them.
function drawCount(rows, shown) {
  const chosen = filters();
  const told = at("count");
  told.textContent =
    shown.length === rows.length
      ? counted(rows.length, "row")
      : `${shown.length.toLocaleString("en")} of ${counted(rows.length, "row")}`;
  at("clear").hidden = !chosen.length;
  at("empty").hidden = shown.length > 0;
  if (!shown.length) drawReasons(rows, chosen);
}

function drawReasons(rows, chosen) {
  const reasons = chosen.map((filter) => {
    const others = chosen.filter((other) => other !== filter);
    const left = passing(rows, others).length;
    const button = element("button", `Remove: ${filter.name}`, {type: "button"});
    on(button, "click", () => {
      update(filter.clear);
      at("table").focus();
    });
    return element("li", [button, ` leaves ${counted(left, "row")}`]);
  });
  at("empty-why").textContent = chosen.length ? "No row passes the filters." : "There are no rows.";
  at("empty-list").replaceChildren(...reasons);
}

// A button that opens a list of checkboxes. choices: [value, name, checked]
function drawMenu(id, title, choices, choose) {
  const menu = at(id);
  const ticked = choices.filter(([, , checked]) => checked).length;
  menu.querySelector("summary").textContent = title(ticked, choices.length);
  const boxes = [...menu.querySelectorAll("input")];
  if (boxes.length === choices.length && boxes.every((box, place) => box.value === choices[place][0])) {
    boxes.forEach((box, place) => {
      const [, name, checked] = choices[place];
      if (box.nextSibling.textContent !== name) box.nextSibling.textContent = name;
      box.checked = checked;
    });
    return;
  }
  menu.querySelector("fieldset").replaceChildren(
    menu.querySelector("legend"),
    ...choices.map(([value, name, checked]) => {
      const box = element("input", null, {type: "checkbox", value, checked});
      on(box, "change", () => choose(value));
      return element("label", [box, element("span", name)]);
    }),
  );
}

function drawFilters(view, columns) {
  const rows = rowsOf(view);
  for (const name of ["model", "method", "scheme"]) {
    const values = unique([...rows.map((row) => row[name]), ...state[name]]).sort();
    const title = (ticked) => (ticked ? `${name}: ${ticked} of ${values.length}` : `${name}: all`);
    drawMenu(
      `menu-${name}`,
      title,
      values.map((value) => [value, value, state[name].includes(value)]),
      (value) => update({[name]: toggled(state[name], value)}),
    );
  }
  const choices = columns
    .filter((column) => !["rank", "notes"].includes(column.key))
    .map((column) => [column.key, column.name, isShown(column)]);
  drawMenu(
    "menu-columns",
    () => "columns",
    choices,
    (key) => update({columns: toggled(state.columns, key)}),
  );
  for (const name of ["bits", "size", "search"]) if (at(name).value !== state[name]) at(name).value = state[name];
  const {index} = view;
  at("metric-label").hidden = !known(index) || evaluations[index].metrics.length < 2;
  if (known(index)) {
    at("metric").replaceChildren(...evaluations[index].metrics.map((metric) => element("option", metric.name)));
    at("metric").value = metricNow().name;
  }
}

function watchMenus() {
  const menus = [...document.querySelectorAll("details.menu")];
  on(document, "click", (event) =>
    menus
      .filter((menu) => !menu.contains(event.target))
      .forEach((menu) => {
        menu.open = false;
      }),
  );
  for (const menu of menus) {
    on(menu, "keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      menu.open = false;
      menu.querySelector("summary").focus();
    });
  }
}
