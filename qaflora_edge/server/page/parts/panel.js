// The settings: how adapters are weighed, and how an answer is made.
const helps = JSON.parse(byId("helps").textContent);
const bundles = new Map(); // name -> {adapters, strategies, meta}

// Of the ids BUNDLE and BUNDLE:base; a bundle's strategies stand in its meta.
const readModels = models => {
  for (const { id, meta = {} } of models) {
    const { adapters = [], strategies = [] } = meta;
    if (!id.endsWith(":base")) bundles.set(id, { adapters, strategies, meta });
  }
  if (!bundles.has(settings.bundle)) settings.bundle = [...bundles.keys()][0] ?? "";
};

const adaptersOf = bundle => bundles.get(bundle)?.adapters ?? [];
const ownStrategy = () => bundles.get(settings.bundle)?.meta.strategy ?? "";
const ownName = () => ownStrategy() ? `the bundle's own (${ownStrategy()})` : "the bundle's own";
const isSingle = strategy => strategy.startsWith("single:");
const strategyName = strategy => isSingle(strategy) ? `only ${strategy.slice(7)}` : strategy;
const helpOf = strategy => {
  const [name] = (strategy || ownStrategy()).split(":");
  return Object.hasOwn(helps, name) ? helps[name] : { help: "", is_each: false };
};
const strategyHelp = strategy => {
  const { help } = helpOf(strategy);
  return help && `${help[0].toUpperCase()}${help.slice(1)}.`;
};

// Where many adapters are asked one by one before an answer: how long that will take, as far as it is known.
const LONG_MS = 3000;
const weighingHint = strategy => {
  const { is_each } = helpOf(strategy), n = adaptersInUse().length, each_ms = settings.weighed[settings.bundle];
  if (!is_each || n < 2 || (each_ms ? n * each_ms < LONG_MS : n <= N_ALL)) return "";
  const time = each_ms ? `about ${duration(n * each_ms)}, by the last answer` : "that may take long";
  return `Before each answer the ${n} adapters in use are asked one by one: ${time}. Take fewer, or another strategy.`;
};
const noteWeighing = ({ model, strategy, fusion }) => {
  const n = Object.keys(fusion?.weights ?? {}).length;
  if (!n || !fusion.probe_ms || !helpOf(strategy).is_each) return;
  settings.weighed[model] = fusion.probe_ms / n;
  keep();
  drawWeighing();
};
// Wherever the page says it.
const drawWeighing = () => {
  for (const hint of document.querySelectorAll(".weighing")) {
    hint.textContent = weighingHint(settings.strategy);
    hint.hidden = !hint.textContent;
  }
};

const adaptersInUse = () => {
  const off = settings.off[settings.bundle] ?? [];
  return adaptersOf(settings.bundle).filter(name => !off.includes(name));
};

// What a question asks of the server under one strategy.
const requestOf = strategy => {
  const { bundle } = settings, fusion = { return: "layers" }, names = adaptersOf(bundle), used = adaptersInUse();
  if (strategy === "manual") {
    fusion.weights = Object.fromEntries(names.map(name => [name, weightOf(name)]));
  } else if (isChosen(strategy) && names.length && !used.length) {
    fusion.strategy = "base"; // none is ticked
  } else {
    if (strategy) fusion.strategy = strategy;
    if (isChosen(strategy) && used.length < names.length) fusion.adapters = used;
  }
  const request = { model: bundle, fusion };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (settings[name] !== "") request[name] = Number(settings[name]);
  }
  return request;
};

// What an answer asks for that goes on: the mix that it has, which is weighed anew only where that is not known.
const requestToGoOn = ({ model, strategy, fusion }) => {
  const { layers = {} } = fusion ?? {}, names = adaptersOf(model).filter(name => Object.hasOwn(layers, name));
  const request = { ...requestOf(strategy), model };
  if (!names.length || names.length < Object.keys(layers).length) return request;
  return { ...request, fusion: { adapters: names, weights: names.map(name => layers[name]), return: "none" } };
};

// Whether a strategy mixes the adapters that are ticked.
const isChosen = strategy => strategy !== "manual" && strategy !== "base" && !isSingle(strategy);
// Whether it weighs them anew for each question.
const isProbed = strategy => isChosen(strategy) && strategy !== "static";
const weightOf = name => settings.weights[settings.bundle]?.[name] ?? 0.5;

const field = (label, input, hint = "") => {
  input.id ||= unique("field");
  const parts = [el("label", { htmlFor: input.id }, label), input];
  if (hint) {
    const text = el("p", { className: "hint", id: unique("hint") }, hint);
    input.setAttribute("aria-describedby", text.id);
    parts.push(text);
  }
  return el("div", { className: "field" }, ...parts);
};

const numberField = (label, name, properties, hint) => field(label, el("input", {
  type: "number", value: settings[name], inputMode: "decimal", ...properties,
  onchange: event => {
    settings[name] = event.target.checkValidity() ? event.target.value : "";
    event.target.value = settings[name];
    keep();
  },
}), hint);

// All that the bundle can be asked under, each once: its own first, single adapters last.
const strategyNames = () => {
  const names = (bundles.get(settings.bundle)?.strategies ?? []).filter(name => name !== ownStrategy());
  const manual = adaptersOf(settings.bundle).length ? ["manual"] : [];
  return ["", ...names.filter(name => !isSingle(name)), ...manual, ...names.filter(isSingle)];
};
const strategyLabel = strategy => strategy ? strategyName(strategy) : ownName();
const strategySelect = () => {
  const names = strategyNames();
  if (!names.includes(settings.strategy)) settings.strategy = "";
  const select = el("select", { id: "strategy", onchange: () => { settings.strategy = select.value; keep(); drawPanel(); } },
    ...names.map(name => el("option", { value: name }, strategyLabel(name))));
  select.value = settings.strategy;
  return select;
};

// An adapter's name, and what it is for.
const adapterTitle = (name, names) => {
  const about = bundles.get(settings.bundle).meta.descriptions?.[name] ?? "";
  return [el("i", { className: hue(name, names) }),
    el("span", { className: "title" }, el("bdi", {}, name), ...(about ? [el("span", { className: "hint", dir: "auto", title: about }, about)] : []))];
};

// changed: called when it was ticked or not
const adapterBox = (name, names, changed) => {
  const box = el("input", {
    type: "checkbox", checked: adaptersInUse().includes(name), id: `use-${name}`,
    onchange: () => { use([name], box.checked); changed(); },
  });
  const remove = takesAdapters() ? confirmed(button(`Remove ${name}`, "close", () => {}), "Really?", () => removeAdapter(name)) : null;
  return el("li", {}, el("label", { className: "adapter" }, box, ...adapterTitle(name, names)), remove);
};

const use = (some, isUsed) => {
  const { bundle } = settings, off = settings.off[bundle] ?? [];
  settings.off[bundle] = adaptersOf(bundle).filter(name => some.includes(name) ? !isUsed : off.includes(name));
  keep();
};

const adapterSlider = (name, names) => {
  const shown = el("output", {}, weightOf(name).toFixed(2));
  const slider = el("input", {
    type: "range", min: 0, max: 1.5, step: 0.05, value: weightOf(name), id: unique("weight"),
    oninput: () => {
      (settings.weights[settings.bundle] ??= {})[name] = Number(slider.value);
      shown.textContent = Number(slider.value).toFixed(2);
      keep();
    },
  });
  shown.htmlFor = slider.id;
  return el("li", {}, el("label", { className: "adapter", htmlFor: slider.id }, ...adapterTitle(name, names), shown), slider);
};

let adapterFilter = ""; // by which many adapters are looked through
const N_UNFILTERED = 8;

// The adapters with their boxes or weights; of many those that a text is found in.
const adapterList = (names, isManual) => {
  const { descriptions = {} } = bundles.get(settings.bundle).meta, isFiltered = names.length > N_UNFILTERED;
  const filter = el("input", { type: "search", value: isFiltered ? adapterFilter : "", id: "adapter-filter", placeholder: `Filter ${names.length} adapters`, "aria-label": "Filter the adapters", autocomplete: "off", oninput: () => { adapterFilter = filter.value; look(); } });
  const isShown = name => `${name} ${descriptions[name] ?? ""}`.toLowerCase().includes(filter.value.trim().toLowerCase());
  const rows = new Map(names.map(name => [name, isManual ? adapterSlider(name, names) : adapterBox(name, names, () => tell())]));
  const legend = el("legend"), hint = el("p", { className: "hint" });
  const tell = () => {
    const n = adaptersInUse().length;
    legend.textContent = isManual ? "Weights" : `Adapters in use: ${n} of ${names.length}`;
    hint.textContent = !names.some(isShown) ? "No adapter is found." : isManual || n ? "" : "None is ticked: the base answers alone.";
    hint.hidden = !hint.textContent;
    drawWeighing();
  };
  const look = () => {
    for (const [name, row] of rows) row.hidden = !isShown(name);
    tell();
  };
  const useShown = isUsed => {
    use(names.filter(isShown), isUsed);
    for (const [name, row] of rows) row.querySelector("input").checked = adaptersInUse().includes(name);
    tell();
  };
  const choose = (text, isUsed) => el("button", {
    type: "button", className: "chip", title: isFiltered ? "Of those that are shown" : "", onclick: () => useShown(isUsed),
  }, text);
  look();
  return el("fieldset", { className: "field" }, legend,
    ...(isFiltered ? [filter] : []),
    ...(isManual || names.length < 2 ? [] : [el("div", { className: "chips" }, choose("All", true), choose("None", false))]),
    el("ul", { className: "adapters" }, ...rows.values()), hint);
};

const drawPanel = () => {
  const panel = byId("panel"), focused = document.activeElement?.id;
  const names = adaptersOf(settings.bundle);
  const strategy = strategySelect(), isManual = settings.strategy === "manual";
  const isMixed = names.length && (isManual || isChosen(settings.strategy));
  const lists = isMixed ? [adapterList(names, isManual)] : [];
  const system = el("textarea", {
    rows: 3, value: settings.system, dir: "auto", id: "system",
    oninput: () => { settings.system = system.value; keep(); grow(system); presets.draw(); },
  });
  const presets = presetsField(), systemField = field("System prompt", system);
  system.after(presets.element);
  panel.replaceChildren(
    el("div", { className: "panel-head" }, el("h2", {}, "Settings"), button("Close the settings", "close", closePanels, "quiet close-panel")),
    field("Strategy", strategy, strategyHelp(settings.strategy)),
    el("p", { className: "hint weighing", role: "status" }),
    ...lists,
    ...(takesAdapters() ? [adapterField()] : []),
    systemField,
    el("div", { className: "numbers" },
      numberField("Temperature", "temperature", { min: 0, max: 2, step: 0.05, placeholder: "default", id: "temperature" }),
      numberField("Longest answer", "max_tokens", { min: 1, step: 1, placeholder: "default", id: "max-tokens" }),
      numberField("Seed", "seed", { min: 0, step: 1, placeholder: "default", id: "seed" })));
  drawWeighing();
  if (focused && focused !== document.activeElement?.id) byId(focused)?.focus();
};

// Two panels stand beside the conversation. On a narrow window one lies over it, and the conversation waits.
const isNarrow = matchMedia("(max-width: 899px)"), isWide = matchMedia("(min-width: 1200px)");
const PANELS = ["chats", "panel"];
const isPanelOpen = id => document.body.classList.contains(`has-${id}`);
const openPanel = (id, isOpen) => {
  const isOver = isOpen && isNarrow.matches, opener = byId(`open-${id}`);
  document.body.classList.toggle(`has-${id}`, isOpen);
  opener.setAttribute("aria-expanded", String(isOpen));
  byId("shade").hidden = !isOver;
  for (const part of [document.querySelector(".talk"), document.querySelector(".top")]) part.inert = isOver;
  if (isOver) byId(id).querySelector("button").focus();
  else if (byId(id).contains(document.activeElement)) opener.focus();
};
const closePanels = () => PANELS.filter(isPanelOpen).forEach(id => openPanel(id, false));
// As this browser had them, where the window has room.
const openPanels = () => {
  closePanels();
  openPanel("panel", !isNarrow.matches && settings.panels.panel);
  openPanel("chats", isWide.matches && settings.panels.chats);
};
for (const id of PANELS) byId(`open-${id}`).onclick = () => {
  openPanel(id, !isPanelOpen(id));
  if (isNarrow.matches) return;
  settings.panels[id] = isPanelOpen(id);
  keep();
};
byId("shade").onclick = closePanels;
byId("close-chats").onclick = closePanels;
isNarrow.addEventListener("change", openPanels);
