// The conversation: asking, stopping, asking again; the keyboard; what is in view.
const views = [];
let running = null; // an AbortController while answers come

const question = byId("question"), send = byId("send");

const scrollDown = () => scrollTo({ top: document.documentElement.scrollHeight });
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
  document.body.classList.toggle("is-wide", chat.turns.some(turn => turn.answers.length > 1));
  views.forEach((view, index) => view.setLast(!isBusy && index === views.length - 1));
  if (!isBusy) byId("newest").hidden = true;
};

const append = turn => {
  const view = turnView(turn, adaptersOf, { edit: editTurn, retry: retryTurn, choose: () => keepChat() });
  views.push(view);
  byId("turns").append(view.element);
  return view;
};

const truncate = n => {
  chat.turns.length = n;
  for (const view of views.splice(n)) view.element.remove();
};

const stop = () => {
  running?.abort();
  return running === null;
};

const newAnswer = strategy => ({
  model: settings.bundle, strategy, text: "", state: "waiting",
});

// Leave this chat for another one.
const showChat = next => {
  stop();
  running = null;
  for (const view of views.splice(0)) view.element.remove();
  adopt(next);
  fail("");
  chat.turns.forEach(append);
  drawState();
  scrollDown();
  question.focus();
};

const ask = async text => {
  const strategies = [settings.strategy, ...(settings.isComparing ? [settings.other] : [])];
  const messages = [...messagesBefore(chat.turns.length), { role: "user", content: text }];
  const turn = { question: text, answers: strategies.map(newAnswer), chosen: 0 };
  chat.turns.push(turn);
  const own = chat, view = append(turn), control = new AbortController();
  running = control;
  isFollowing = true;
  byId("spoken").replaceChildren();
  fail("");
  keepChat();
  drawState();
  scrollDown();
  say("The question is read.");
  // Both sides of a comparison draw alike, unless the settings have a seed.
  const seeded = strategies.length > 1 ? { seed: Math.floor(Math.random() * 2 ** 31) } : {};
  await Promise.all(view.views.map((each, i) =>
    fill(each, { ...seeded, ...requestOf(strategies[i]), messages }, control.signal)));
  keepChat(own);
  if (running !== control) return; // another chat is shown
  running = null;
  drawState();
  say(turn.answers.map(answer => answer.error || { cancelled: "Stopped.", length: "The answer was cut." }[answer.state] || "The answer is complete.").join(" "));
  if (isFollowing) scrollDown();
};

const submit = () => {
  const text = question.value.trim();
  if (!text || running || !bundles.size) return;
  question.value = "";
  grow(question);
  ask(text);
};

const askFrom = (turn, text) => {
  if (running) return;
  truncate(chat.turns.indexOf(turn));
  question.focus();
  ask(text);
};
const editTurn = (turn, text) => askFrom(turn, text);
const retryTurn = turn => askFrom(turn, turn.question);

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

const menu = byId("save-menu");
const openMenu = isOpen => {
  menu.hidden = !isOpen;
  byId("save").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) menu.firstElementChild.focus();
};
byId("save").onclick = () => openMenu(menu.hidden);
menu.onkeydown = event => {
  const items = [...menu.children], at = items.indexOf(document.activeElement);
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (move) {
    event.preventDefault();
    items[(at + move + items.length) % items.length].focus();
  }
};
const saveAs = async (ending, type, text) => {
  openMenu(false);
  byId("save").focus();
  if (!chat.turns.length) return say("There is nothing to save yet.");
  try {
    download(fileName(ending), type, await text());
  } catch (error) {
    fail(told(error));
  }
};
byId("save-markdown").onclick = () => saveAs("md", "text/markdown", asMarkdown);
byId("save-json").onclick = () => saveAs("json", "application/json", asSession);

const openFile = async file => {
  let session;
  try {
    if (file.size > MAX_SESSION_BYTES) throw new Error(`It has more than ${MAX_SESSION_BYTES} bytes.`);
    session = readSession(await file.text());
    follow(session);
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
byId("open-chat").onclick = () => { openMenu(false); chatFile.click(); };
chatFile.onchange = () => {
  const [file] = chatFile.files;
  chatFile.value = "";
  if (file && bundles.size) openFile(file);
};
addEventListener("click", event => {
  if (!menu.hidden && !event.target.closest("#save, #save-menu")) openMenu(false);
});

const beginChat = () => {
  showChat(newChat());
  keepChat();
};
byId("new").onclick = beginChat;

addEventListener("keydown", event => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!menu.hidden) {
    openMenu(false);
    byId("save").focus();
  } else if (!byId("shade").hidden) openPanel(false);
  else stop();
});
byId("open-panel").onclick = () => openPanel(!document.body.classList.contains("has-panel"));
byId("shade").onclick = () => openPanel(false);
isNarrow.addEventListener("change", () => openPanel(!isNarrow.matches));

const drawEmpty = () => {
  const names = adaptersOf(settings.bundle);
  byId("empty").replaceChildren(
    el("h2", {}, el("bdi", {}, settings.bundle)),
    el("p", { className: "legend" }, ...names.map(name => el("span", { className: `entry ${hue(name, names)}` }, el("i"), el("bdi", {}, name)))),
    el("p", {}, names.length
      ? "These adapters are weighed for every question. The bar above an answer shows its mix; open it to see why."
      : "A base without adapters."));
};

const start = async () => {
  for (const [id, icon] of [["new", "plus"], ["open-chats", "chats"], ["save", "download"], ["open-panel", "sliders"]]) {
    byId(id).append(drawn(icon));
    byId(id).setAttribute("aria-label", byId(id).title);
  }
  drawState();
  openPanel(!isNarrow.matches);
  const reading = readChat();
  try {
    const models = (await (await call("v1/models")).json()).data;
    await reading;
    readModels(models);
  } catch (error) {
    fail(told(error));
    return;
  }
  if (!bundles.size) {
    fail("The server has no bundle.");
    return;
  }
  const select = byId("bundle");
  select.append(...[...bundles.keys()].map(name => el("option", { value: name }, name)));
  select.value = settings.bundle;
  select.onchange = () => { settings.bundle = select.value; keep(); drawPanel(); drawEmpty(); };
  drawPanel();
  drawEmpty();
  chat.turns.forEach(append);
  drawState();
  scrollDown();
  if (!isNarrow.matches) question.focus();
};
start();
