// The chats that this browser keeps: beside the conversation, found by their words, opened and deleted.
const isKeeping = byId("is-keeping"), deleteAll = byId("delete-chats"), search = byId("chats-search");
let summaries = []; // {id, time, title, text}, the newest first
let drawnChats = ""; // what the list shows

const summaryOf = ({ id, time, title, turns }) => {
  const texts = turns.flatMap(turn => [turn.question, ...turn.answers.map(answer => answer.text)]);
  return { id, time, title, text: texts.join("\n").toLowerCase() };
};

const openKept = async id => {
  const found = await getChat(id);
  if (isNarrow.matches) openPanel("chats", false);
  if (id === chat.id) return;
  if (!found) return readChats();
  showChat(found);
  keepInTab({ id });
};

// Delete some chats; the one on the page goes with them.
const remove = async (isOne, deletion) => {
  if (isOne(chat.id)) {
    chat.isGone = true;
    beginChat();
  }
  await deletion();
  await readChats();
  otherTabs.postMessage("");
  search.focus();
};

const keptRow = ({ id, time, title }) => el("li", {},
  el("button", { type: "button", className: "past", title: new Date(time).toLocaleString(), "aria-current": String(id === chat.id), onclick: () => tried(() => openKept(id)) }, el("bdi", {}, title)),
  confirmed(button(`Delete: ${title}`, "close", () => {}), "Really?", () => tried(() => remove(each => each === id, () => deleteChat(id)))));

const DAYS = ["Today", "Yesterday", "Last seven days", "Older"];
const dayOf = time => {
  const midnight = new Date().setHours(0, 0, 0, 0), n_day = Math.ceil((midnight - time) / 86_400_000);
  return DAYS[[0, 1, 7, Infinity].findIndex(most => n_day <= most)];
};

// The list stays as it is where it shows the same, so that nobody loses their place in it.
const drawChats = () => {
  const words = search.value.toLowerCase().split(/\s+/);
  const found = summaries.filter(({ title, text }) => words.every(word => text.includes(word) || title.toLowerCase().includes(word)));
  const shown = JSON.stringify([chat.id, ...found.map(({ id, title }) => [id, title])]);
  byId("chats-note").textContent = found.length ? "Only this browser has them." : summaries.length ? "No chat has these words." : "None is kept.";
  search.hidden = !summaries.length;
  deleteAll.hidden = !summaries.length;
  if (shown === drawnChats) return;
  drawnChats = shown;
  const days = DAYS.map(day => [day, found.filter(({ time }) => dayOf(time) === day)]).filter(([, some]) => some.length);
  byId("chats-list").replaceChildren(...days.flatMap(([day, some]) => [el("h3", {}, day), el("ul", {}, ...some.map(keptRow))]));
};

const readChats = async () => {
  summaries = (await listChats()).map(summaryOf);
  drawChats();
};
// Another tab writes chats, too.
const otherTabs = new BroadcastChannel("qaflora-chats");
otherTabs.onmessage = () => tried(readChats);
const noteKept = stored => {
  summaries = [summaryOf(stored), ...summaries.filter(({ id }) => id !== stored.id)];
  drawChats();
  otherTabs.postMessage("");
};

// Do something with the database, and say where it cannot be had.
const tried = async act => {
  try {
    await act();
  } catch (error) {
    byId("chats-list").replaceChildren();
    byId("chats-note").textContent = `The browser keeps no chats of this page: ${error.message}`;
    search.hidden = true;
    deleteAll.hidden = true;
  }
};

confirmed(deleteAll, "Really delete all?", () => tried(() => remove(() => true, deleteChats)));
search.oninput = drawChats;
isKeeping.checked = settings.isKeeping;
isKeeping.onchange = () => {
  settings.isKeeping = isKeeping.checked;
  keep();
  keepChat();
};
