// The mix of an answer: a bar of the adapters' shares, which opens into what decided.
const N_HUE = 8;
const hue = (name, adapters) => `hue-${Math.max(0, adapters.indexOf(name)) % N_HUE}`;
const hueOf = (name, adapters) => adapters.includes(name) ? hue(name, adapters) : "hue-base";
const entry = (name, adapters, ...more) => el("span", { className: `entry ${hueOf(name, adapters)}` }, el("i"), el("bdi", {}, name), ...more);

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

// A draft: dimmed and named, so that nobody takes it for the answer.
const draftView = adapters => {
  const title = el("p", { className: "facts" }), text = el("div", { dir: "auto" });
  const element = el("div", { className: "draft", id: unique("draft"), hidden: true }, title, text);
  const show = (heading, said, name) => {
    element.className = `draft ${hueOf(name, adapters)}`;
    title.textContent = heading;
    text.textContent = said;
  };
  return { element, show, isOpened: false };
};

const shareOf = (name, adapters, weight) => {
  const part = el("span", { className: hueOf(name, adapters) });
  part.style.flexGrow = Math.abs(weight);
  return part;
};

// [bar, legend] of the adapters' shares, and of what is left to the base.
const sharesDrawn = (weights, adapters) => {
  const parts = whoSpoke(weights), isBase = parts.every(([name]) => name === "base");
  const rest = Math.max(0, 1 - sum(parts.map(([, weight]) => weight)));
  const bar = [...parts, ["base", rest]].map(([name, weight]) => shareOf(name, adapters, weight));
  const named = parts.length > N_ALL ? parts.slice(0, N_TOP) : parts;
  const legend = named.flatMap(([name, weight]) => [entry(name, adapters, " ", isBase ? "" : el("b", {}, weightText(weight))), " "]);
  return [el("span", { className: "bar" }, ...bar), el("span", { className: "legend" }, ...legend, ...othersText(parts, named))];
};

// The same of a relay: its knower drafts, and its writer answers with the draft in view.
const relayDrawn = ({ knower, writer }, adapters) => [
  el("span", { className: "bar relay" }, shareOf(knower, adapters, 1), shareOf(writer, adapters, 1)),
  el("span", { className: "legend" }, entry(knower, adapters, " ", el("b", {}, "drafts")), el("span", {}, "→"), entry(writer, adapters, " ", el("b", {}, "writes"))),
];

// Of an answer that an adapter is not sure of.
const LEAST_SURE = .5;
const doubts = ({ sure }) => sure < LEAST_SURE ? [el("b", { className: "doubt", title: `${Math.round(100 * sure)} % sure` }, "may be made up")] : [];

// fusion: {strategy, weights: {name: mean}, layers: {name: [n_layer]}, of a relay {relay}, of a draft that was read {sure}, and where no layer differs
// because, why: {name: {scores: {place: number}, thresholds, taken_as}}}; adapters: all of the bundle
// draft: a draftView that opens with it
const mixView = (fusion, adapters, draft) => {
  const { relay } = fusion, names = Object.keys(fusion.weights), isBase = whoSpoke(fusion.weights).every(([name]) => name === "base");
  const [bar, legend] = relay ? relayDrawn(relay, adapters) : sharesDrawn(fusion.weights, adapters);
  const rows = Object.values(fusion.layers ?? {}), isLayered = rows.some(row => row.some(weight => weight !== row[0]));
  const isTold = names.length > 0 && names.every(name => fusion.why?.[name]), hasReasons = rows.length > 0 && (isTold || !isBase);
  if (!hasReasons && !relay) return el("div", { className: "mix", role: "img", "aria-label": `Mix: ${spokeText(fusion.weights)}` },
    bar, el("span", { className: "line" }, legend, ...doubts(fusion)));

  const map = el("div", { className: "map", id: unique("map"), hidden: true });
  const title = relay ? "The draft, and why" : isLayered ? "Weights by layer" : "Why this mix";
  const toggle = el("button", {
    type: "button", className: "mix", title, "aria-expanded": "false", "aria-controls": `${map.id} ${draft.element.id}`,
    onclick: () => {
      if (!map.childElementCount && hasReasons) map.append(...(isLayered ? heatmap(names, fusion, adapters) : reasonTable(names, fusion)));
      map.hidden = !map.hidden;
      draft.isOpened = !map.hidden;
      draft.element.hidden = map.hidden || !relay;
      toggle.setAttribute("aria-expanded", String(!map.hidden));
    },
  }, bar, el("span", { className: "line" }, legend, ...doubts(fusion), el("span", { className: "unseen" }, title), drawn("open")));
  return el("div", {}, toggle, map);
};

// What decided, as `qaflora weights` prints it; the weights alone where nothing was measured.
const UNMEASURED = { scores: {}, thresholds: {}, taken_as: "" };
const reasonTable = (names, { because, weights, why, relay }) => {
  const parts = relay ? [[relay.knower, "drafts"], [relay.writer, "writes"]] : []; // which no weight says
  const partOf = name => parts.filter(([other]) => other === name).map(([, part]) => part).join(", ") || "-";
  const shown = topOf(names, { weights: relay ? { ...weights, [relay.knower]: 1 } : weights, why });
  const reason = name => why?.[name] ?? UNMEASURED, { scores, thresholds } = reason(names[0]), places = Object.keys(scores);
  const needed = Object.keys(thresholds).length, isTaken = names.some(name => reason(name).taken_as);
  const number = value => value === undefined ? "" : needed ? value.toFixed(2) : String(Number(value.toPrecision(3)));
  const row = (...cells) => el("tr", {}, ...cells.map((text, i) => el(i ? "td" : "th", {}, el("bdi", {}, text))));
  const line = (name, weight, numbers, ...taken) => row(name, weight, ...places.map(place => number(numbers[place])), ...taken);
  return [
    ...(because ? [el("p", { className: "why" }, because)] : []),
    el("div", { className: "wide" }, el("table", { className: "reasons" },
      row("adapter", relay ? "part" : "weight", ...places, ...(isTaken ? ["taken as"] : [])),
      ...shown.map(name => line(name, relay ? partOf(name) : weights[name].toFixed(2), reason(name).scores, ...(isTaken ? [reason(name).taken_as || "-"] : []))),
      ...othersText(names, shown).map(text => row(text)),
      ...(needed ? [line("threshold", "", thresholds)] : []))),
  ];
};

const heatmap = (all, fusion, adapters) => {
  const names = topOf(all, fusion), rows = names.map(name => fusion.layers[name]), n_layer = rows[0].length;
  const [low, high] = leastAndMost(rows), most = Math.max(high, -low) || 1;
  const grid = el("div", { className: "grid", role: "table", "aria-label": "Weight of each adapter at each layer" });
  grid.style.setProperty("--n-layer", n_layer);
  grid.append(...names.map((name, row) => {
    const cells = rows[row].map((weight, layer) => {
      const cell = el("span", { className: `cell ${hue(name, adapters)}`, role: "cell", title: `${name}, layer ${layer}: weight ${weight.toFixed(3)}` });
      cell.style.setProperty("--w", `${(100 * Math.abs(weight) / most).toFixed(1)}%`);
      if (weight < 0) cell.classList.add("minus");
      if (rows.every((other, i) => i === row || other[layer] < weight)) cell.classList.add("lead");
      cell.setAttribute("aria-label", weight.toFixed(3));
      return cell;
    });
    return el("div", { role: "row" }, el("span", { className: "name", role: "rowheader", title: name }, el("bdi", {}, name)),
      ...cells, el("span", { className: "mean", role: "cell" }, mean(rows[row]).toFixed(2)));
  }));
  const ends = low < 0 ? `weights from ${low.toFixed(2)} to ${high.toFixed(2)}` : `weights from 0 to ${high.toFixed(2)}`;
  return [
    el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Weights by layer" }, grid),
    el("p", { className: "facts" }, `${n_layer} layers from the left, ${ends}; a dot where an adapter weighs most. ${othersText(all, names)}`),
  ];
};
