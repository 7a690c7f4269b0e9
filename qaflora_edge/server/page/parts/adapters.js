// Adapters that are dropped on the page. The server checks, converts and measures them.
const takesAdapters = () => Boolean(bundles.get(settings.bundle)?.meta.takes_adapters);

const readEntries = reader => new Promise((done, failed) => reader.readEntries(done, failed));
const fileOf = entry => new Promise((done, failed) => entry.file(done, failed));

// The files of a file, or of a folder without its folders; readEntries gives some at a time.
const filesOf = async entry => {
  if (entry.isFile) return [await fileOf(entry)];
  const reader = entry.createReader(), found = [];
  for (let some; (some = await readEntries(reader)).length;) found.push(...some);
  return Promise.all(found.filter(each => each.isFile).map(fileOf));
};

const sendAdapter = async (title, files) => {
  const named = name => files.find(file => file.name === name);
  const config = named("adapter_config.json"), weights = named("adapter_model.safetensors");
  const isPeft = config && weights, gguf = files.find(file => file.name.endsWith(".gguf"));
  if (!isPeft && !gguf) {
    throw new Error(`${title} is no adapter. Drop a PEFT folder, with adapter_config.json and adapter_model.safetensors, or a .gguf.`);
  }
  const name = (title.replace(/\.gguf$/, "").match(/[A-Za-z0-9][A-Za-z0-9._-]*/g) ?? ["adapter"]).join("-").slice(0, 64);
  const query = { model: settings.bundle, lora_name: name, config_bytes: isPeft ? config.size : 0 };
  await call(`upload?${new URLSearchParams(query)}`, isPeft ? new Blob([config, weights]) : gguf);
  return name;
};

// One after the other: title and files, or what promises them.
const addAdapters = async adapters => {
  const note = byId("adding");
  fail("");
  for (const [title, files] of adapters) {
    note.textContent = `Adding ${title}: it is sent, checked and measured.`;
    note.hidden = false;
    try {
      const name = await sendAdapter(title, await files);
      readModels((await (await call("v1/models")).json()).data);
      drawPanel();
      drawEmpty();
      note.textContent = `${name} takes part from the next question on.`;
    } catch (error) {
      note.hidden = true;
      fail(told(error));
    }
    say(note.textContent);
  }
};

const adapterField = () => field("Add an adapter", el("input", {
  type: "file", accept: ".gguf", id: "adapter-file",
  onchange: event => addAdapters([...event.target.files].map(file => [file.name, [file]])),
}), "A .gguf. Or drop one, or a PEFT folder, anywhere on the page.");

// A browser would leave the page for a file that nobody takes.
const isDropped = event => event.dataTransfer.types.includes("Files");
addEventListener("dragover", event => { if (isDropped(event)) event.preventDefault(); });
addEventListener("drop", event => {
  if (!isDropped(event)) return;
  event.preventDefault();
  if (!takesAdapters()) {
    fail("Files are not read here, and adapters only by a server with --allow-adapters. Paste text into the question.");
    return;
  }
  const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
  addAdapters(entries.map(entry => [entry.name, filesOf(entry)]));
});
