// The conversation: asking, stopping, asking again; the keyboard; what is in view.
const views = [];
let running = null; // an AbortController while answers come
const question = byId("question"), send = byId("send");

const scrollDown = () => { if (chat.turns.length) scrollTo({ top: document.documentElement.scrollHeight }); };
let isFollowing = true; // whether the end of the answer stays in view while it grows
const isAtEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
const lookAround = () => {
  isFollowing = isAtEnd();
  byId("newest").hidden = isFollowing || !running;
};
addEventListener("scroll", lookAround, { passive: true });
new ResizeObserver(() => {
  if (running && isFollowing) scrollDown();
  else byId("newest").hidden = !running || isAtEnd();
}).observe(byId("turns"));
byId("newest").onclick = () => { isFollowing = true; scrollDown(); question.focus(); };

const drawState = () => {
  const isBusy = running !== null;
  send.replaceChildren(drawn(isBusy ? "stop" : "send"));
  send.title = isBusy ? "Stop" : "Send";
  send.setAttribute("aria-label", send.title);
  send.disabled = !isBusy && (!question.value.trim() || !bundles.size);
  byId("empty").hidden = chat.turns.length > 0;
  document.body.classList.toggle("is-wide", chat.turns.some(turn => turn.beside !== undefined));
  views.forEach(view => view.setBusy(isBusy));
  if (!isBusy) byId("newest").hidden = true;
};

const append = turn => {
  const view = turnView(turn, { edit: editTurn, ask: answerTurn, goOn, change: () => { drawState(); keepChat(); } });
  views.push(view);
  byId("turns").append(view.element);
  return view;
};

const stop = () => running?.abort();

const newAnswer = strategy => ({ model: settings.bundle, strategy, text: "", state: "waiting" });

// Leave this chat for another one.
const showChat = next => {
  stop();
  running = null;
  for (const view of views.splice(0)) view.element.remove();
  adopt(next);
  fail("");
  chat.turns.forEach(append);
  drawChats();
  drawState();
  scrollDown();
  question.focus();
};

const newSeed = () => Math.floor(Math.random() * 2 ** 31);
// Ask for one more version of a turn. Those under different strategies draw alike, unless the settings have a seed.
const answerTurn = (view, strategy) => {
  if (running) return;
  const { turn } = view;
  const isAgain = turn.answers.some(answer => answer.strategy === strategy && answer.text);
  const seed = isAgain ? newSeed() : turn.seed ??= newSeed();
  return run(view, view.add(newAnswer(strategy)), { seed, ...requestOf(strategy), messages: messagesOf(turn) });
};

// Let an answer go on from where it ends.
const goOn = (view, version) => {
  if (running) return;
  const { turn } = view, { answer } = version;
  const messages = [...messagesBefore(chat.turns.indexOf(turn)), ...messagesToGoOn(turn, answer)];
  version.restart();
  run(view, version, { seed: newSeed(), ...requestToGoOn(answer), messages });
};

const run = async (view, version, request) => {
  const own = chat, control = new AbortController();
  running = control;
  isFollowing = view === views.at(-1);
  byId("spoken").replaceChildren();
  fail("");
  keepChat();
  drawState();
  if (isFollowing) scrollDown();
  say("The question is read.");
  question.focus();
  await fill(version, request, control.signal);
  noteWeighing(version.answer);
  keepChat(own);
  if (running !== control) return; // another chat is shown
  running = null;
  view.draw();
  drawState();
  const { error, state } = version.answer;
  say(error || { cancelled: "Stopped.", length: "The answer was cut." }[state] || "The answer is complete.");
  if (isFollowing) scrollDown();
};

const ask = (text, files = []) => {
  const turn = { question: text, files, answers: [], chosen: 0 };
  chat.turns.push(turn);
  answerTurn(append(turn), settings.strategy);
};

const submit = () => {
  const text = question.value.trim();
  if (!text || running || !bundles.size) return;
  const files = attached;
  attached = [];
  drawFiles();
  question.value = "";
  grow(question);
  ask(text, files);
};

const editTurn = (turn, text) => {
  if (running) return;
  const at = chat.turns.indexOf(turn);
  chat.turns.length = at;
  for (const view of views.splice(at)) view.element.remove();
  ask(text, turn.files);
};

send.onclick = () => { if (running) stop(); else submit(); };
question.oninput = () => { grow(question); drawState(); };
question.onkeydown = event => {
  if (isSending(event)) {
    event.preventDefault();
    submit();
  }
  if (event.key === "ArrowUp" && !question.value && !running && views.length) {
    event.preventDefault();
    views.at(-1).edit();
  }
};

const saveAs = async (ending, type, text, name) => {
  byId("save-menu").hidePopover();
  try {
    if (!chat.turns.length && text !== asTask) throw new Error("There is nothing to save yet.");
    download(fileName(ending, name), type, await text());
  } catch (error) {
    fail(told(error));
  }
};
byId("save-markdown").onclick = () => saveAs("md", "text/markdown", asMarkdown);
byId("save-json").onclick = () => saveAs("json", "application/json", asSession);
byId("save-judged").onclick = () => saveAs("jsonl", "application/jsonl", asTask, "judged");

const openFile = async file => {
  let session;
  try {
    if (file.size > MAX_SESSION_BYTES) throw new Error(`It has more than ${MAX_SESSION_BYTES} bytes.`);
    session = readSession(await file.text());
    followSession(session);
  } catch (error) {
    fail(`Cannot open ${file.name}: ${error.message} Choose a file that this page or \`qaflora chat\` has saved.`);
    return;
  }
  keep();
  byId("bundle").value = settings.bundle;
  drawPanel();
  drawEmpty();
  showChat(newChat(session.turns));
  keepChat();
};
const chatFile = byId("chat-file");
byId("open-chat").onclick = () => { byId("save-menu").hidePopover(); chatFile.click(); };
chatFile.onchange = () => {
  const [file] = chatFile.files;
  chatFile.value = "";
  if (file && bundles.size) openFile(file);
};

const beginChat = () => { showChat(newChat()); keepChat(); };
byId("new").onclick = beginChat;

addEventListener("keydown", event => {
  if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
  if (!byId("shade").hidden) closePanels();
  else stop();
});

const drawEmpty = () => {
  const names = adaptersOf(settings.bundle), shown = names.length > N_ALL ? names.slice(0, N_TOP) : names;
  const { descriptions = {}, questions = [], note = "" } = bundles.get(settings.bundle).meta;
  const suggested = text => el("button", { type: "button", className: "chip", dir: "auto", onclick: () => { if (!running) ask(text); } }, text);
  byId("empty").replaceChildren(
    el("h2", {}, el("bdi", {}, settings.bundle)),
    el("p", {}, names.length
      ? "These adapters are weighed for every question. The bar above an answer shows its mix; open it to see why."
      : "A base without adapters."),
    el("p", { className: "hint" }, note),
    el("p", { className: "hint weighing" }),
    el("ul", { className: "about" },
      ...shown.map(name => el("li", {}, entry(name, names), " ", descriptions[name] ?? "")),
      ...othersText(names, shown).map(text => el("li", {}, text))),
    el("div", { className: "chips" }, ...questions.slice(0, 3).map(suggested)));
  drawWeighing();
};

const start = async () => {
  for (const [id, icon] of [["attach", "attach"], ["new", "plus"], ["open-chats", "chats"], ["close-chats", "close"], ["save", "download"], ["open-panel", "sliders"]]) {
    byId(id).append(drawn(icon));
    byId(id).setAttribute("aria-label", byId(id).title);
  }
  drawState();
  openPanels();
  const reading = readChat();
  try {
    const models = (await (await call("v1/models")).json()).data;
    await reading;
    readModels(models);
    if (!bundles.size) throw new Error("The server has no bundle.");
  } catch (error) {
    fail(told(error));
    return;
  }
  const select = byId("bundle");
  select.append(...[...bundles.keys()].map(name => el("option", { value: name }, name)));
  select.value = settings.bundle;
  select.onchange = () => { settings.bundle = select.value; keep(); drawPanel(); drawEmpty(); };
  drawPanel();
  drawEmpty();
  chat.turns.forEach(append);
  tried(readChats);
  drawState();
  scrollDown();
  if (!isNarrow.matches) question.focus();
};
start();
