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
const ownName = () => {
  const own = bundles.get(settings.bundle).meta.strategy;
  return own ? `the bundle's own (${own})` : "the bundle's own";
};
const isSingle = strategy => strategy.startsWith("single:");
const strategyName = strategy => isSingle(strategy) ? `only ${strategy.slice(7)}` : strategy;
const strategyHelp = strategy => {
  const own = strategy || bundles.get(settings.bundle).meta.strategy || "";
  const help = helps[own.split(":")[0]] ?? "";
  return help && `${help[0].toUpperCase()}${help.slice(1)}.`;
};

// What a question asks of the server under one strategy.
const requestOf = strategy => {
  const { bundle } = settings, off = settings.off[bundle] ?? [], fusion = { return: "layers" };
  const names = adaptersOf(bundle);
  if (strategy === "manual") {
    fusion.weights = Object.fromEntries(names.map(name => [name, weightOf(name)]));
  } else if (isChosen(strategy) && names.length && off.length === names.length) {
    fusion.strategy = "base"; // none is ticked
  } else {
    if (strategy) fusion.strategy = strategy;
    if (isChosen(strategy) && off.length) fusion.adapters = names.filter(name => !off.includes(name));
  }
  const request = { model: bundle, fusion };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (settings[name] !== "") request[name] = Number(settings[name]);
  }
  return request;
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

// All that the bundle can be asked under: its own first, single adapters last.
const strategyNames = () => {
  const names = bundles.get(settings.bundle)?.strategies ?? [];
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

const adapterRow = (name, isManual) => {
  const { bundle } = settings, names = adaptersOf(bundle), off = settings.off[bundle] ?? [];
  const sign = el("i", { className: hue(name, names) }), title = el("bdi", {}, name);
  if (!isManual) {
    const box = el("input", {
      type: "checkbox", checked: !off.includes(name), id: `use-${name}`,
      onchange: () => {
        settings.off[bundle] = names.filter(each => each === name ? !box.checked : off.includes(each));
        keep();
        drawPanel();
      },
    });
    const remove = takesAdapters() ? confirmed(button(`Remove ${name}`, "close", () => {}), "Really?", () => removeAdapter(name)) : null;
    return el("li", {}, el("label", { className: "adapter" }, box, sign, title), remove);
  }
  const shown = el("output", {}, weightOf(name).toFixed(2));
  const slider = el("input", {
    type: "range", min: 0, max: 1.5, step: 0.05, value: weightOf(name), id: unique("weight"),
    oninput: () => {
      (settings.weights[bundle] ??= {})[name] = Number(slider.value);
      shown.textContent = Number(slider.value).toFixed(2);
      keep();
    },
  });
  shown.htmlFor = slider.id;
  return el("li", {}, el("label", { className: "adapter", htmlFor: slider.id }, sign, title, shown), slider);
};

const drawPanel = () => {
  const panel = byId("panel"), focused = document.activeElement?.id;
  const names = adaptersOf(settings.bundle);
  const strategy = strategySelect(), isManual = settings.strategy === "manual";
  const isMixed = names.length && (isManual || isChosen(settings.strategy));
  const label = isManual ? "Weights" : "Adapters in use";
  const lists = isMixed ? [adapterList(label, names, isManual)] : [];
  const system = el("textarea", {
    rows: 3, value: settings.system, dir: "auto", id: "system",
    oninput: () => { settings.system = system.value; keep(); grow(system); },
  });
  panel.replaceChildren(
    el("div", { className: "panel-head" }, el("h2", {}, "Settings"), button("Close the settings", "close", () => openPanel(false), "quiet close-panel")),
    field("Strategy", strategy, strategyHelp(settings.strategy)),
    ...lists,
    ...(takesAdapters() ? [adapterField()] : []),
    field("System prompt", system),
    el("div", { className: "numbers" },
      numberField("Temperature", "temperature", { min: 0, max: 2, step: 0.05, placeholder: "default", id: "temperature" }),
      numberField("Longest answer", "max_tokens", { min: 1, step: 1, placeholder: "default", id: "max-tokens" }),
      numberField("Seed", "seed", { min: 0, step: 1, placeholder: "default", id: "seed" })));
  if (focused && focused !== document.activeElement?.id) byId(focused)?.focus();
};

let isOpen = false; // the list of those that are not among the first
const adapterList = (label, names, isManual) => {
  const isNone = !isManual && (settings.off[settings.bundle] ?? []).length === names.length;
  const rows = names.map(name => adapterRow(name, isManual));
  const rest = names.length > N_ALL ? rows.splice(N_TOP) : [];
  const others = el("details", { open: isOpen, ontoggle: () => { isOpen = others.open; } },
    el("summary", {}, `${rest.length} others`), el("ul", { className: "adapters" }, ...rest));
  return el("fieldset", { className: "field" },
    el("legend", {}, label),
    el("ul", { className: "adapters" }, ...rows),
    ...(rest.length ? [others] : []),
    ...(isNone ? [el("p", { className: "hint" }, "None is ticked: the base answers alone.")] : []));
};

// On a narrow window the panel lies over the page, which waits meanwhile.
const isNarrow = matchMedia("(max-width: 899px)");
const openPanel = isOpen => {
  const isOver = isOpen && isNarrow.matches;
  document.body.classList.toggle("has-panel", isOpen);
  byId("open-panel").setAttribute("aria-expanded", String(isOpen));
  byId("shade").hidden = !isOver;
  for (const part of [document.querySelector(".talk"), document.querySelector(".top")]) part.inert = isOver;
  if (isOver) byId("panel").querySelector("button").focus();
  else if (byId("panel").contains(document.activeElement)) byId("open-panel").focus();
};
