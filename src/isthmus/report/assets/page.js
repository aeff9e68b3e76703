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

  // Who said a token, and when: at once and beside it, where the browser's own title would wait.
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "said";
  for (const token of document.querySelectorAll(".talk dd span")) {
    token.dataset.said = token.title;
    token.removeAttribute("title");
  }
  document.addEventListener("pointerover", ({target}) => {
    const said = target.dataset?.said;
    tip.classList.toggle("visible", said !== undefined);
    if (said === undefined) return;
    tip.textContent = said;
    const word = target.getClientRects()[0], room = innerWidth - tip.offsetWidth - 8;
    const above = word.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, Math.min(word.left, room))}px`;
    tip.style.top = `${above < 8 ? word.bottom + 6 : above}px`;
  });
  addEventListener("scroll", () => tip.classList.remove("visible"), {passive: true});

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
