// What a tab and a browser hold by name: settings, the API key, and the chat over a reload.
// Where the browser keeps nothing for pages, all of it is forgotten with the page.
const shelf = name => {
  try {
    return window[name];
  } catch {
    return { getItem: () => null, setItem: () => {} };
  }
};
const forTab = shelf("sessionStorage"), forBrowser = shelf("localStorage");

const read = (storage, name, fallback) => {
  try {
    return { ...fallback, ...JSON.parse(storage.getItem(name)) };
  } catch {
    return fallback;
  }
};

const settings = read(forBrowser, "settings", {
  bundle: "", strategy: "", system: "", temperature: "", max_tokens: "", seed: "",
  panels: { chats: true, panel: true }, // which stand beside a conversation
  presets: [], // system prompts under names: {name, text}
  isKeeping: true, // whether chats go into the database
  off: {}, // bundle -> names of adapters that are not in use
  weighed: {}, // bundle -> milliseconds that an adapter took, where each was asked
  weights: {}, // bundle -> adapter -> weight, of the strategy "manual"
});

const keep = () => { forBrowser.setItem("settings", JSON.stringify(settings)); };
