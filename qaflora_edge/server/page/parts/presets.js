// System prompts that this browser keeps under names.
const presetsField = () => {
  const { presets } = settings;
  const change = (changed, id) => {
    settings.presets = changed;
    keep();
    drawPanel();
    byId(id).focus();
  };
  const select = el("select", { id: "preset", "aria-label": "System prompts that are kept", onchange: () => {
    settings.system = presets.find(({ name }) => name === select.value)?.text ?? "";
    change(presets, "preset");
  } });
  const without = removed => presets.filter(({ name }) => name !== removed);
  const remove = confirmed(button("Delete this system prompt", "close", () => {}), "Really?", () => change(without(select.value), "system"));
  const title = el("input", { type: "text", maxLength: 60, required: true, id: "preset-name", placeholder: "Name", "aria-label": "Name of this system prompt", autocomplete: "off" });
  const onsubmit = event => {
    event.preventDefault();
    const name = title.value.trim();
    if (name) change([...without(name), { name, text: settings.system }], "preset");
  };
  const form = el("form", { className: "one-line", onsubmit }, title, el("button", { type: "submit" }, "Save"));
  const kept = el("div", { className: "one-line" }, select, remove);
  const saving = el("details", { className: "hint" }, el("summary", {}, "Keep this prompt"), form);

  const draw = () => {
    const preset = presets.find(({ text }) => text === settings.system);
    const none = settings.system.trim() ? "Another prompt" : "No system prompt";
    select.replaceChildren(el("option", { value: "" }, none), ...presets.map(({ name }) => el("option", { value: name }, name)));
    select.value = preset?.name ?? "";
    kept.hidden = !presets.length;
    remove.hidden = !preset;
    saving.hidden = Boolean(preset) || !settings.system.trim();
  };
  draw();
  return { element: el("div", {}, kept, saving), draw };
};
