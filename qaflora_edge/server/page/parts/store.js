// The chat lives in its tab: a reload keeps it, closing the tab forgets it. Settings stay.
const read = (storage, name, fallback) => {
  try {
    return { ...fallback, ...JSON.parse(storage.getItem(name)) };
  } catch {
    return fallback;
  }
};

const settings = read(localStorage, "settings", {
  bundle: "", strategy: "", isComparing: false, other: "", system: "",
  temperature: "", max_tokens: "", seed: "",
  off: {}, // bundle -> names of adapters that are not in use
  weights: {}, // bundle -> adapter -> weight, of the strategy "manual"
});

// turns: [{question, answers: [{model, strategy, text, state, error, fusion, usage, timings}], chosen}]
const chat = read(sessionStorage, "chat", { turns: [] });

const keep = () => {
  localStorage.setItem("settings", JSON.stringify(settings));
  try {
    sessionStorage.setItem("chat", JSON.stringify(chat));
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
