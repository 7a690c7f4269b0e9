// The chat lives in its tab: a reload keeps it, closing the tab forgets it. Settings stay.
// Where the browser keeps nothing for pages, the chat is forgotten with the page.
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
  bundle: "", strategy: "", isComparing: false, other: "", system: "",
  temperature: "", max_tokens: "", seed: "",
  off: {}, // bundle -> names of adapters that are not in use
  weights: {}, // bundle -> adapter -> weight, of the strategy "manual"
});

// turns: [{question, answers: [{model, strategy, text, state, error, fusion, usage, timings}], chosen}]
const chat = read(forTab, "chat", { turns: [] });

const keep = () => {
  forBrowser.setItem("settings", JSON.stringify(settings));
  try {
    forTab.setItem("chat", JSON.stringify(chat));
  } catch {
    say("This chat is too long for the browser to keep over a reload.");
  }
};

// An answer that was still being written when the page went away.
for (const turn of chat.turns) {
  for (const answer of turn.answers) {
    if (["waiting", "writing"].includes(answer.state)) answer.state = "cancelled";
  }
}
