// Talking to the server: its key, its errors, its streams.
class Refused extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

const keyring = { value: forTab.getItem("key") || "", asking: null };

// One dialog, however many calls wait for the key.
const askKey = () => keyring.asking ||= new Promise(done => {
  const dialog = byId("key-dialog"), input = byId("key");
  byId("key-wrong").hidden = !keyring.value;
  byId("key-form").onsubmit = event => {
    event.preventDefault();
    keyring.value = input.value;
    forTab.setItem("key", keyring.value);
    keyring.asking = null;
    dialog.close();
    done();
  };
  dialog.oncancel = event => event.preventDefault();
  input.value = "";
  dialog.showModal();
});

// The server's own words name options of a command, which a reader of the page cannot give.
const TOO_LONG = "This chat is longer than the model can read. Begin a new one, or ask for less at once.";

const refusal = async response => {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let message = `The server answers ${response.status} ${response.statusText}.`;
  try {
    const { error } = await response.json();
    message = error.code === "context_length_exceeded" ? TOO_LONG : error.message || message;
  } catch { /* another kind of body: its status says it */ }
  return new Refused(message, response.status, retryAfter);
};

// A response that went well. Throws Refused, or AbortError where the signal came.
const call = async (path, body, signal) => {
  for (;;) {
    const key = keyring.value;
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const isFile = body instanceof Blob;
    if (body) headers["Content-Type"] = isFile ? "application/octet-stream" : "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET", headers, signal, cache: "no-store",
        body: isFile ? body : body && JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer. Is `qaflora serve` still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (key === keyring.value) await askKey();
  }
};

// The objects of a stream of events; comments, which keep it alive, are passed over.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection to the server broke off.");
    }
    if (part.done) return;
    const lines = (text + part.value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, event.error.code);
      yield event;
    }
  }
}
