// System prompts that this browser keeps under names.
const presetsField = () => {
  const select = el("select", { id: "preset", "aria-label": "System prompts that are kept" });
  const choose = name => {
    settings.system = settings.presets.find(preset => preset.name === name)?.text ?? "";
    keep();
    drawPanel();
  };
  select.onchange = () => choose(select.value);
  const remove = confirmed(button("Delete this system prompt", "close", () => {}), "Really?", () => {
    settings.presets = settings.presets.filter(preset => preset.name !== select.value);
    keep();
    drawPanel();
    byId("system").focus();
  });
  const name = el("input", { type: "text", maxLength: 60, required: true, id: "preset-name", placeholder: "Name", "aria-label": "Name of this system prompt", autocomplete: "off" });
  const onsubmit = event => {
    event.preventDefault();
    const saved = { name: name.value.trim(), text: settings.system };
    if (!saved.name) return;
    settings.presets = [...settings.presets.filter(preset => preset.name !== saved.name), saved];
    keep();
    drawPanel();
    byId("preset").focus();
  };
  const form = el("form", { className: "one-line", onsubmit }, name, el("button", { type: "submit" }, "Save"));
  const kept = el("div", { className: "one-line" }, select, remove);
  const saving = el("details", { className: "hint" }, el("summary", {}, "Keep this prompt"), form);

  const draw = () => {
    const preset = settings.presets.find(({ text }) => text === settings.system);
    const none = settings.system.trim() ? "Another prompt" : "No system prompt";
    select.replaceChildren(el("option", { value: "" }, none), ...settings.presets.map(each => el("option", { value: each.name }, each.name)));
    select.value = preset?.name ?? "";
    kept.hidden = !settings.presets.length;
    remove.hidden = !preset;
    saving.hidden = Boolean(preset) || !settings.system.trim();
  };
  draw();
  return { element: el("div", { className: "presets" }, kept, saving), draw };
};
