// Downloads the rows shown; the file is created in the browser, so no server is needed.

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], {type}));
  const link = element("a", null, {href: url, download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function records() {
  return table.rows.map((row) => ({
    model: row.model,
    method: row.method,
    scheme: row.scheme,
    ...Object.fromEntries(
      table.columns.filter((column) => column.key !== "rank").map((column) => [column.name, column.value(row) ?? null]),
    ),
    ...Object.fromEntries(
      table.columns
        .filter((column) => column.key === "rank")
        .map((column) => [column.name, known(column.value(row)) ? column.show(column.value(row), row) : null]),
    ),
  }));
}

// Escapes text that a spreadsheet would evaluate.
function csvCell(value) {
  const text = typeof value === "string" ? value.replace(/^[=+\-@\t\r]/, "'$&") : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvText(found) {
  const names = found.length ? Object.keys(found[0]) : [];
  return (
    [names, ...found.map((record) => names.map((name) => record[name]))]
      .map((cells) => cells.map(csvCell).join(","))
      .join("\n") + "\n"
  );
}

function watchDownloads() {
  on(at("download-csv"), "click", () => save("leaderboard.csv", "text/csv", csvText(records())));
  on(at("download-json"), "click", () =>
    save("leaderboard.json", "application/json", JSON.stringify({view: viewOf().title, rows: records()}, null, 1)),
  );
}
