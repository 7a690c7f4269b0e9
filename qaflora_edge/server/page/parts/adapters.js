// Adapters of the server: added by file, folder or Hub name, and removed.
const MAX_UPLOAD_BYTES = 2 ** 30; // the server's limit: it is told before all is sent
const takesAdapters = () => Boolean(bundles.get(settings.bundle)?.meta.takes_adapters);
const plainName = title => (title.normalize("NFKD").replace(/\p{M}|\.gguf$/gu, "").match(/[A-Za-z0-9][A-Za-z0-9._-]*/g) ?? ["adapter"]).join("-").slice(0, 64);

const sendAdapter = (title, files) => {
  const named = name => files.find(file => file.name === name);
  const config = named("adapter_config.json"), weights = named("adapter_model.safetensors");
  const isPeft = config && weights, gguf = files.find(file => file.name.endsWith(".gguf"));
  if (!isPeft && !gguf) {
    throw new Refused(`${title} is no adapter. Drop a PEFT folder, with adapter_config.json and adapter_model.safetensors, or a .gguf.`);
  }
  if ((isPeft ? weights : gguf).size > MAX_UPLOAD_BYTES) {
    throw new Refused(`${title} has more than 1 GiB. Put it into the server's folder of adapters.`);
  }
  const query = { model: settings.bundle, lora_name: plainName(title), config_bytes: isPeft ? config.size : 0 };
  return call(`upload?${new URLSearchParams(query)}`, isPeft ? new Blob([config, weights]) : gguf);
};

// Change an adapter, and show how far that is.
const change = async (name, text, end, send) => {
  let isDone = false;
  showWork(text);
  const timer = setInterval(async () => {
    const { stage, processed, total } = await (await call(`progress?${new URLSearchParams({ lora_name: name })}`)).json();
    if (stage && !isDone) showWork(`${text}: ${stage}`, processed, total);
  }, 300);
  try {
    await send();
    readModels((await (await call("v1/models")).json()).data);
    drawPanel();
    drawEmpty();
    succeed(text);
  } catch (error) {
    end = "";
    fail(told(error), text);
  }
  isDone = true;
  clearInterval(timer);
  endWork(end);
};
const addAdapter = (title, send) => change(plainName(title), `Adding ${title}`, `${plainName(title)} takes part from the next question on.`, send);
const askChange = (what, name, more = {}) => call(`v1/${what}_lora_adapter`, { model: settings.bundle, lora_name: name, ...more });
const removeAdapter = name => change(name, `Removing ${name}`, `${name} is removed.`, () => askChange("unload", name));

const adapterField = () => {
  const hub = el("input", { type: "text", placeholder: "owner/name", id: "hub", spellcheck: false, required: true });
  const onsubmit = event => {
    event.preventDefault();
    const ref = hub.value.trim(), name = plainName(ref.split("/")[1] ?? ref);
    addAdapter(name, () => askChange("load", name, { hub: ref }));
  };
  const made = field("Add an adapter of the Hub", hub, "Or drop a .gguf or a PEFT folder anywhere on the page.");
  hub.after(el("button", { type: "submit" }, "Add"));
  return el("form", { onsubmit, className: "add-adapter" }, made);
};
