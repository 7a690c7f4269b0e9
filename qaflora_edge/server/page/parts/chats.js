// The list of kept chats: open one, delete one or all, keep none.
const chatsDialog = byId("chats"), isKeeping = byId("is-keeping"), deleteAll = byId("delete-chats");

const openKept = async id => {
  const found = await getChat(id);
  chatsDialog.close();
  if (id === chat.id || !found) return;
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
  await drawChats();
  byId("close-chats").focus();
};

const keptRow = ({ id, time, title }) => el("li", {},
  el("button", { type: "button", className: "past", "aria-current": String(id === chat.id), onclick: () => tried(() => openKept(id)) },
    el("bdi", {}, title), el("span", { className: "facts" }, new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }))),
  confirmed(el("button", { type: "button", "aria-label": `Delete: ${title}` }, "Delete"), "Really?",
    () => tried(() => remove(each => each === id, () => deleteChat(id)))));

const drawChats = async () => {
  const found = await listChats();
  byId("chats-list").replaceChildren(...found.map(keptRow));
  byId("chats-note").textContent = found.length ? "Only this browser has them." : "None is kept.";
  deleteAll.hidden = !found.length;
};

// Do something with the database, and say where it cannot be had.
const tried = async act => {
  try {
    await act();
  } catch (error) {
    byId("chats-list").replaceChildren();
    byId("chats-note").textContent = `The browser keeps no chats of this page: ${error.message}`;
    deleteAll.hidden = true;
  }
};

confirmed(deleteAll, "Really delete all?", () => tried(() => remove(() => true, deleteChats)));
isKeeping.checked = settings.isKeeping;
isKeeping.onchange = async () => {
  settings.isKeeping = isKeeping.checked;
  keep();
  await keepChat();
  tried(drawChats);
};
byId("close-chats").onclick = () => chatsDialog.close();
byId("open-chats").onclick = () => {
  chatsDialog.showModal();
  tried(drawChats);
};
