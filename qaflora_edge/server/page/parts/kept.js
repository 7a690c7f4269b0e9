// The chat of this tab, and where it is kept: in the database, and in the tab until that is done.
// turns: [{question, answers: [{model, strategy, thought, text, state, isEdited, error, fusion, usage, timings}], chosen}]
// revision, written: the last change, and the last one that the database has
const newChat = (turns = []) => ({ id: newId(), revision: "", written: "", turns });

let chat = newChat();

let isTold = Boolean(forTab.getItem("told"));
const tellOnce = text => {
  if (!isTold) fail(text);
  isTold = true;
  forTab.setItem("told", "yes");
};

const keepInTab = value => {
  try {
    forTab.setItem("chat", JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
};

// Keep what has changed. isGone: it was deleted while an answer came
const keepChat = async (own = chat) => {
  own.revision = newId();
  await writeChat(own);
};

const writeChat = async own => {
  if (own.isGone) return;
  const isInTab = own === chat && keepInTab(own);
  if (!settings.isKeeping || !own.turns.length) {
    if (own === chat && !isInTab) tellOnce("This chat is too long for the browser to keep over a reload.");
    return;
  }
  try {
    const stored = await putChat(own);
    if (own === chat) keepInTab({ id: own.id });
    noteKept(stored);
  } catch (error) {
    tellOnce(`The browser keeps no chats of this page: ${error.message.replace(/\.?$/, ".")} This one lives in its tab; save it as a file.`);
  }
};

// Take a chat as this tab's, as it was found in the tab or in the database.
const adopt = found => {
  chat = { ...newChat(), written: found.revision ?? "", ...found };
  // An answer that was still being written when the page went away.
  for (const answer of chat.turns.flatMap(turn => turn.answers)) {
    if (["waiting", "writing"].includes(answer.state)) answer.state = "cancelled";
  }
};

// Take the chat that this tab had before a reload. One that lives in the tab goes into the database.
const readChat = async () => {
  const found = read(forTab, "chat", {});
  if (Array.isArray(found.turns)) {
    adopt(found);
    await writeChat(chat);
  } else if (found.id) {
    const kept = await getChat(found.id).catch(() => undefined);
    if (kept) adopt(kept);
  }
};
