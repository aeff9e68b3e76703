"use strict";
(() => {
  const page = JSON.parse(document.getElementById("charts").textContent);
  // `ast` makes Vega interpret its expressions: the page's policy forbids evaluating text.
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: page.config,
    logLevel: 1,
    tooltip: {disableDefaultStyle: true},
  };
  for (const node of document.querySelectorAll("[data-chart]")) {
    vegaEmbed(node, page.charts[node.dataset.chart], options).catch((error) => {
      node.textContent = `This chart could not be drawn: ${error.message}`;
    });
  }

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : typeof a !== typeof b ? (typeof a === "number" ? -1 : 1)
      : a.localeCompare(b, undefined, {numeric: true});
  for (const head of document.querySelectorAll("thead th")) {
    head.querySelector("button").addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const body = head.closest("table").tBodies[0];
      const rows = [...body.rows];
      rows.sort((a, b) => sign * compare(value(a, head.cellIndex), value(b, head.cellIndex)));
      body.append(...rows);
    });
  }
})();
