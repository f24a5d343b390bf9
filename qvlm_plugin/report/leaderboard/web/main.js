// Starts the page: each change of state is written to the address and drawn.

const plotted = {key: "", rows: []};

function draw() {
  const view = viewOf();
  const rows = rowsOf(view);
  const shown = passing(rows, filters());
  const {columns, score, sort} = columnsOf(view);
  const isNoted = rows.some((row) => row.notes.length);
  const visible = columns.filter((column) => isShown(column) && (column.key !== "notes" || isNoted));
  const order = sortNow(visible, sort);
  at("view").value = view.id;
  at("apart").hidden = !view.apart;
  drawFilters(view, columns);
  drawCount(rows, shown);
  drawTable(view, sorted(shown, order), visible, order);
  // Sorting and choosing rows leave the plots as they are.
  const key = JSON.stringify([view.id, state.metric, state.columns]);
  const {rows: last} = plotted;
  if (key !== plotted.key || shown.length !== last.length || shown.some((row, place) => row !== last[place])) {
    Object.assign(plotted, {key, rows: shown});
    drawPlots(shown, score);
  }
  at("simulated").hidden = !shown.some((row) => row.run.backend === "reference" && row.method !== "none");
  drawCompare(view);
}

function update(change) {
  const had = pairNow(viewOf()).length === 2;
  Object.assign(state, change);
  writeAddress();
  draw();
  if (!had && change.compare?.length === 2) at("compare-title").focus();
}

function start() {
  for (const [apart, label] of [
    [false, "Complete benchmarks"],
    [true, "Stand-in data or a part"],
  ]) {
    const own = VIEWS.filter((view) => view.apart === apart).map((view) =>
      element("option", view.title, {value: view.id}),
    );
    if (own.length) at("view").append(element("optgroup", own, {label}));
  }
  on(at("view"), "change", (event) =>
    update({view: event.target.value, metric: "", sort: "", columns: [], compare: []}),
  );
  on(at("metric"), "change", (event) => update({metric: event.target.value}));
  for (const name of ["bits", "size", "search"]) on(at(name), "input", (event) => update({[name]: event.target.value}));
  on(at("controls"), "submit", (event) => event.preventDefault());
  on(at("clear"), "click", () => {
    update({model: [], method: [], scheme: [], bits: "", size: "", search: ""});
    at("search").focus();
  });
  on(window, "hashchange", () => {
    readAddress();
    draw();
  });
  on(window, "resize", () => drawPlots(table.rows, columnsOf(viewOf()).score));
  watchMenus();
  watchTable();
  watchDetails();
  watchCompare();
  watchDownloads();
  for (const id of ["plot-size", "plot-speed"]) watchPlot(id);
  readAddress();
  draw();
}

start();
