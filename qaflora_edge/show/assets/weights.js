"use strict";
{
  const tip = document.getElementById("tip");
  const rows = svg => [...svg.querySelectorAll(".row")].map(row => [...row.querySelectorAll(".cell")]);

  let shown = null;
  const hide = () => { shown = null; tip.hidden = true; };
  const show = cell => {
    shown = cell;
    tip.textContent = cell.getAttribute("aria-label");
    tip.hidden = false;
    const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect(), gap = 6;
    const x = at.left + at.width / 2 - box.width / 2;
    const above = at.top - box.height - gap;
    tip.style.left = Math.max(8, Math.min(x, innerWidth - box.width - 8)) + "px";
    tip.style.top = (above >= 0 ? above : at.bottom + gap) + "px";
  };

  for (const svg of document.querySelectorAll("svg.map")) {
    const grid = rows(svg);
    for (const cell of grid.flat()) {
      // The title would show a second tip of the browser's own.
      const title = cell.querySelector("title");
      cell.setAttribute("aria-label", title.textContent);
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("tabindex", "-1");
      title.remove();
    }
    for (const row of svg.querySelectorAll(".row")) row.setAttribute("role", "row");
    svg.setAttribute("role", "grid");
    if (grid.length) grid[0][0].setAttribute("tabindex", "0");

    // On the element around it: a listener for focus makes an svg itself focusable.
    const around = svg.parentElement;
    around.addEventListener("pointerover", event => {
      if (event.target.matches(".cell")) show(event.target);
    });
    around.addEventListener("pointerout", event => {
      if (event.pointerType !== "touch") hide();
    });
    // Not every browser gives focus to a shape that is tapped.
    around.addEventListener("click", event => {
      if (event.target.matches(".cell")) event.target.focus();
    });
    around.addEventListener("focusin", event => {
      if (!event.target.matches(".cell")) return;
      svg.querySelector(".cell[tabindex='0']").setAttribute("tabindex", "-1");
      event.target.setAttribute("tabindex", "0");
      show(event.target);
    });
    around.addEventListener("focusout", hide);
    around.addEventListener("keydown", event => {
      const row = grid.findIndex(cells => cells.includes(event.target));
      if (row < 0) return;
      const column = grid[row].indexOf(event.target), last = grid[row].length - 1;
      const moves = {
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        Home: [row, 0], End: [row, last],
      };
      if (event.key === "Escape") hide();
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const next = (grid[move[0]] || [])[move[1]];
      if (next) next.focus();
    });
  }

  // Walking to a cell may scroll it into view: its tip goes with it.
  addEventListener("scroll", () => { if (shown) show(shown); }, { passive: true, capture: true });
  // A page on paper cannot be opened up.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open], .item, .items)")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
}
