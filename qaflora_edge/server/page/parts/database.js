// Chats in IndexedDB. Every call may fail: private windows and full disks refuse it.
// A chat: {id, revision, time, title, turns}
const CHATS = "chats";

let database = null;
const openDatabase = () => database ??= new Promise((resolve, reject) => {
  const request = indexedDB.open("qaflora", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(CHATS, { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// The result of the request that `ask` makes of the chats, once all of it is written.
const withChats = async (mode, ask) => {
  const transaction = (await openDatabase()).transaction(CHATS, mode);
  return new Promise((resolve, reject) => {
    const request = ask(transaction.objectStore(CHATS));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? new Error("The transaction was aborted."));
  });
};

const newId = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

// Write a chat. One that another tab has changed since stays, and this one gets a new id.
const putChat = async chat => {
  let stored;
  await withChats("readwrite", store => {
    const request = store.get(chat.id);
    request.onsuccess = () => {
      const { revision } = request.result ?? chat;
      if (revision !== chat.revision && revision !== chat.written) chat.id = newId();
      chat.written = chat.revision;
      const title = chat.turns[0].question.replace(/\s+/g, " ").slice(0, 100);
      stored = { id: chat.id, revision: chat.revision, time: Date.now(), title, turns: chat.turns };
      store.put(stored);
    };
    return request;
  });
  return stored;
};

const getChat = id => withChats("readonly", store => store.get(id));
const listChats = async () => (await withChats("readonly", store => store.getAll())).sort((one, other) => other.time - one.time);
const deleteChat = id => withChats("readwrite", store => store.delete(id));
const deleteChats = () => withChats("readwrite", store => store.clear());
