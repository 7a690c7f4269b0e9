// Adapters that are dropped on the page. The server checks, converts and measures them.
const MAX_UPLOAD_BYTES = 2 ** 30;  // the server's limit: it is told before all is sent
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
  if ((isPeft ? weights : gguf).size > MAX_UPLOAD_BYTES) {
    throw new Error(`${title} has more than 1 GiB. Put it into the server's folder of adapters.`);
  }
  const plain = title.normalize("NFKD").replace(/\p{M}|\.gguf$/gu, "");
  const name = (plain.match(/[A-Za-z0-9][A-Za-z0-9._-]*/g) ?? ["adapter"]).join("-").slice(0, 64);
  const query = { model: settings.bundle, lora_name: name, config_bytes: isPeft ? config.size : 0 };
  await call(`upload?${new URLSearchParams(query)}`, isPeft ? new Blob([config, weights]) : gguf);
  return name;
};

// Title and files of each, or what promises them. What is chosen meanwhile comes after.
const toAdd = [];
let isAdding = false;

const addAdapters = async adapters => {
  toAdd.push(...adapters);
  if (isAdding) return;
  isAdding = true;
  const note = byId("adding");
  fail("");
  while (toAdd.length) {
    const [title, files] = toAdd.shift();
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
  isAdding = false;
};

// A file that was mended has the same name: with a value left, it would be no change.
const takeChosen = event => {
  const files = [...event.target.files];
  event.target.value = "";
  addAdapters(files.map(file => [file.name, [file]]));
};

const adapterField = () => field("Add an adapter", el("input", {
  type: "file", accept: ".gguf", id: "adapter-file",
  onchange: takeChosen,
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
