// The mix of an answer: a bar of the adapters' shares, which opens into what decided.
const N_HUE = 8;
const hue = (name, adapters) => `hue-${Math.max(0, adapters.indexOf(name)) % N_HUE}`;

const sum = numbers => numbers.reduce((total, number) => total + number, 0);
const mean = numbers => numbers.length ? sum(numbers) / numbers.length : 0;
const leastAndMost = rows => rows.flat().reduce(([low, high], w) => [Math.min(low, w), Math.max(high, w)], [0, 0]);

// [name, weight] of who spoke, heaviest first: adapters, or the base alone.
const whoSpoke = weights => {
  const rounded = Object.entries(weights).map(([name, weight]) => [name, Math.round(100 * weight) / 100]);
  const parts = rounded.filter(([, weight]) => weight).sort((one, other) => other[1] - one[1]);
  return parts.length ? parts : [["base", 1]];
};
// Of more than N_ALL adapters the first N_TOP are shown, by weight and then by score.
const N_ALL = 12, N_TOP = 5;
const topOf = (names, { weights, why }) => {
  const rank = name => weights[name] + 1e-6 * Math.max(0, ...Object.values(why?.[name]?.scores ?? {}));
  return names.length > N_ALL ? names.toSorted((one, other) => rank(other) - rank(one)).slice(0, N_TOP) : names;
};
const othersText = (all, shown) => all.length > shown.length ? [`${all.length - shown.length} others`] : [];
const weightText = weight => `×${String(weight).replace("-", "−")}`;
const spokeText = weights => {
  const parts = whoSpoke(weights), shown = parts.length > N_ALL ? parts.slice(0, N_TOP) : parts;
  return [...shown.map(([name, weight]) => name === "base" ? name : `${name} ${weightText(weight)}`), ...othersText(parts, shown)].join(" · ");
};

// A relay: who drafted and who wrote, with the draft, an element, folded.
const relayView = ({ knower, writer }, adapters, draft) => {
  const hueOf = name => adapters.includes(name) ? hue(name, adapters) : "hue-base";
  const entry = name => el("span", { className: `entry ${hueOf(name)}` }, el("i"), el("bdi", {}, name));
  return el("details", { className: "thought relay" },
    el("summary", {}, el("span", { className: "legend" }, entry(knower), " → ", entry(writer)), " ", el("span", { className: "unseen" }, "Draft")),
    draft);
};

// fusion: {strategy, weights: {name: mean}, layers: {name: [n_layer]}, and where no layer differs
// because, why: {name: {scores: {place: number}, thresholds, taken_as}}}; adapters: all of the bundle
const mixView = (fusion, adapters) => {
  const names = Object.keys(fusion.weights), parts = whoSpoke(fusion.weights), isBase = parts.every(([name]) => name === "base");
  const rest = ["base", Math.max(0, 1 - sum(parts.map(([, weight]) => weight)))]; // of the bar
  const hueOf = name => adapters.includes(name) ? hue(name, adapters) : "hue-base";
  const bar = el("span", { className: "bar" }, ...[...parts, rest].map(([name, weight]) => {
    const part = el("span", { className: hueOf(name) });
    part.style.flexGrow = Math.abs(weight);
    return part;
  }));
  const named = parts.length > N_ALL ? parts.slice(0, N_TOP) : parts;
  const legend = el("span", { className: "legend" }, ...named.flatMap(([name, weight]) => [
    el("span", { className: `entry ${hueOf(name)}` }, el("i"), el("bdi", {}, name), " ", isBase ? "" : el("b", {}, weightText(weight))), " "]), ...othersText(parts, named));
  const rows = Object.values(fusion.layers ?? {}), isLayered = rows.some(row => row.some(weight => weight !== row[0]));
  const isTold = names.length > 0 && names.every(name => fusion.why?.[name]);
  if (isBase && !isTold || !rows.length) return el("div", { className: "mix", role: "img", "aria-label": `Mix: ${spokeText(fusion.weights)}` },
    bar, el("span", { className: "line" }, legend));

  const map = el("div", { className: "map", id: unique("map"), hidden: true });
  const title = isLayered ? "Weights by layer" : "Why this mix";
  const toggle = el("button", {
    type: "button", className: "mix", title, "aria-expanded": "false", "aria-controls": map.id,
    onclick: () => {
      if (!map.childElementCount) map.append(...(isLayered ? heatmap(names, fusion, adapters) : reasonTable(names, fusion)));
      map.hidden = !map.hidden;
      toggle.setAttribute("aria-expanded", String(!map.hidden));
    },
  }, bar, el("span", { className: "line" }, legend, el("span", { className: "unseen" }, title), drawn("open")));
  return el("div", {}, toggle, map);
};

// What decided, as `qaflora weights` prints it; the weights alone where nothing was measured.
const UNMEASURED = { scores: {}, thresholds: {}, taken_as: "" };
const reasonTable = (names, { because, weights, why }) => {
  const shown = topOf(names, { weights, why });
  const reason = name => why?.[name] ?? UNMEASURED, { scores, thresholds } = reason(names[0]), places = Object.keys(scores);
  const needed = Object.keys(thresholds).length, isTaken = names.some(name => reason(name).taken_as);
  const number = value => value === undefined ? "" : needed ? value.toFixed(2) : String(Number(value.toPrecision(3)));
  const row = (...cells) => el("tr", {}, ...cells.map((text, i) => el(i ? "td" : "th", {}, el("bdi", {}, text))));
  const line = (name, weight, numbers, ...taken) => row(name, weight, ...places.map(place => number(numbers[place])), ...taken);
  return [
    ...(because ? [el("p", { className: "why" }, because)] : []),
    el("div", { className: "wide" }, el("table", { className: "reasons" },
      row("adapter", "weight", ...places, ...(isTaken ? ["taken as"] : [])),
      ...shown.map(name => line(name, weights[name].toFixed(2), reason(name).scores, ...(isTaken ? [reason(name).taken_as || "-"] : []))),
      ...othersText(names, shown).map(text => row(text)),
      ...(needed ? [line("threshold", "", thresholds)] : []))),
  ];
};

const heatmap = (all, fusion, adapters) => {
  const names = topOf(all, fusion), rows = names.map(name => fusion.layers[name]), n_layer = rows[0].length;
  const [low, high] = leastAndMost(rows), most = Math.max(high, -low) || 1;
  const grid = el("div", { className: "grid", role: "grid", "aria-label": "Weight of each adapter at each layer" });
  grid.style.setProperty("--n-layer", n_layer);
  const cells = names.map((name, row) => {
    const line = el("div", { role: "row" }, el("span", { className: "name", role: "rowheader", title: name }, el("bdi", {}, name)));
    const made = rows[row].map((weight, layer) => {
      const cell = el("span", { className: `cell ${hue(name, adapters)}`, role: "gridcell", tabIndex: -1 });
      cell.style.setProperty("--w", `${(100 * Math.abs(weight) / most).toFixed(1)}%`);
      if (weight < 0) cell.classList.add("minus");
      if (rows.every((other, i) => i === row || other[layer] < weight)) cell.classList.add("lead");
      cell.setAttribute("aria-label", `${name}, layer ${layer}: weight ${weight.toFixed(3)}`);
      return cell;
    });
    line.append(...made, el("span", { className: "mean", role: "gridcell" }, mean(rows[row]).toFixed(2)));
    grid.append(line);
    return made;
  });
  const axis = el("div", { className: "axis", "aria-hidden": "true" }, el("span"));
  const step = n_layer > 48 ? 10 : 5;
  for (let layer = 0; layer < n_layer; layer++) {
    const isNamed = layer % step === 0 && layer + 2 < n_layer || layer === n_layer - 1;
    axis.append(el("span", { className: "tick" }, isNamed ? String(layer) : ""));
  }
  axis.append(el("span", { className: "mean" }, "mean"));
  grid.append(axis);
  cells[0][0].tabIndex = 0;
  walk(grid, cells);
  const ends = low < 0 ? `weights from ${low.toFixed(2)} to ${high.toFixed(2)}` : `weights from 0 to ${high.toFixed(2)}`;
  return [
    el("div", { className: "wide" }, grid),
    el("p", { className: "facts" }, `${n_layer} layers from the left, ${ends}; a dot where an adapter weighs most. ${othersText(all, names)}`),
  ];
};

// Pointing at a cell, tapping it or walking to it with the arrow keys shows what it says.
const walk = (grid, cells) => {
  const tip = byId("tip");
  const hide = () => { tip.hidden = true; };
  const show = cell => {
    tip.textContent = cell.getAttribute("aria-label");
    tip.hidden = false;
    const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect(), gap = 6;
    const left = at.left + at.width / 2 - box.width / 2;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
    tip.style.top = `${at.top - box.height - gap >= 0 ? at.top - box.height - gap : at.bottom + gap}px`;
  };
  const isCell = target => target.classList.contains("cell");
  grid.addEventListener("pointerover", event => { if (isCell(event.target)) show(event.target); });
  grid.addEventListener("pointerout", event => { if (event.pointerType !== "touch") hide(); });
  grid.addEventListener("click", event => { if (isCell(event.target)) event.target.focus(); });
  grid.addEventListener("focusout", hide);
  grid.addEventListener("focusin", event => {
    if (!isCell(event.target)) return;
    for (const cell of cells.flat()) cell.tabIndex = -1;
    event.target.tabIndex = 0;
    show(event.target);
  });
  grid.addEventListener("keydown", event => {
    const row = cells.findIndex(line => line.includes(event.target));
    if (row < 0) return;
    const layer = cells[row].indexOf(event.target);
    const moves = {
      ArrowLeft: [row, layer - 1], ArrowRight: [row, layer + 1],
      ArrowUp: [row - 1, layer], ArrowDown: [row + 1, layer],
      Home: [row, 0], End: [row, cells[row].length - 1],
    };
    if (event.key === "Escape") hide();
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    cells[move[0]]?.[move[1]]?.focus();
  });
};
addEventListener("scroll", () => { byId("tip").hidden = true; }, { passive: true });
