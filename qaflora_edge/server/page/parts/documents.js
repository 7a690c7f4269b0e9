// Files that become context: texts and PDFs, which the server reads. A file: {name, text, n_token}
let attached = []; // of the next question

const filesOf = turn => turn.files ?? [];
const contentOf = turn => [...filesOf(turn).map(({ name, text }) => `${name}:\n"""\n${text}\n"""`), turn.question].join("\n\n");

const fileChip = ({ name, n_token }, ...actions) => el("span", { className: "file" },
  el("bdi", {}, name), el("span", { className: "facts" }, `${n_token.toLocaleString("en")} tokens`), ...actions);

const drawFiles = () => {
  const { n_ctx } = bundles.get(settings.bundle)?.meta ?? {}, n_token = sum(attached.map(file => file.n_token));
  byId("files").replaceChildren(...attached.map(file => fileChip(file, button(`Leave out ${file.name}`, "close", () => {
    attached = attached.filter(each => each !== file);
    fail("");
    drawFiles();
    byId("question").focus();
  }))));
  if (n_ctx && n_token >= n_ctx) fail(`The model reads ${n_ctx.toLocaleString("en")} tokens at once, and these files have ${n_token.toLocaleString("en")}. Leave some out.`);
};

// How far something is that takes long; without a total nobody knows.
const showWork = (text, done = 0, total = 0) => {
  byId("work").hidden = false;
  byId("work-text").textContent = text;
  byId("work-bar").hidden = false;
  if (total) byId("work-bar").value = done / total;
  else byId("work-bar").removeAttribute("value");
};
const endWork = text => {
  byId("work").hidden = !text;
  byId("work-text").textContent = text;
  byId("work-bar").hidden = true;
  say(text);
};

const readFile = async file => {
  showWork(`Reading ${file.name}`);
  try {
    const response = await call(`document?${new URLSearchParams({ model: settings.bundle, name: file.name })}`, file);
    attached.push({ name: file.name, ...await response.json() });
    succeed(file.name);
    drawFiles();
    endWork("");
    say(`${file.name} goes with the next question.`);
    byId("question").focus();
  } catch (error) {
    endWork("");
    fail(told(error), file.name);
  }
};

// Files that come by any way: folders and weights are adapters, others are read.
const takeAll = async some => {
  for (const [title, promised, isFolder] of some) {
    const files = await promised;
    if (!isFolder && !/\.(gguf|safetensors)$/.test(title)) await readFile(files[0]);
    else if (takesAdapters()) await addAdapter(title, async () => sendAdapter(title, files));
    else fail("Adapters are added only by a server with --allow-adapters.");
  }
};
let queue = Promise.resolve(); // what is chosen meanwhile comes after
const takeFiles = some => { queue = queue.then(() => takeAll(some)); };
const alone = file => [file.name, [file]];

const fileInput = byId("file-input");
byId("attach").onclick = () => fileInput.click();
fileInput.onchange = () => {
  takeFiles([...fileInput.files].map(alone));
  fileInput.value = "";
};
addEventListener("paste", event => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  takeFiles([...event.clipboardData.files].map(alone));
});

const readEntries = reader => new Promise((done, failed) => reader.readEntries(done, failed));
const fileOf = entry => new Promise((done, failed) => entry.file(done, failed));

// The files of a file, or of a folder without its folders; readEntries gives some at a time.
const filesIn = async entry => {
  if (entry.isFile) return [await fileOf(entry)];
  const reader = entry.createReader(), found = [];
  for (let some; (some = await readEntries(reader)).length;) found.push(...some);
  return Promise.all(found.filter(each => each.isFile).map(fileOf));
};

// A browser would leave the page for a file that nobody takes.
const isDropped = event => event.dataTransfer.types.includes("Files");
addEventListener("dragover", event => { if (isDropped(event)) event.preventDefault(); });
addEventListener("drop", event => {
  if (!isDropped(event)) return;
  event.preventDefault();
  takeFiles([...event.dataTransfer.items].filter(item => item.kind === "file").map(item => {
    const entry = item.webkitGetAsEntry();
    return entry ? [entry.name, filesIn(entry), entry.isDirectory] : alone(item.getAsFile());
  }));
});
