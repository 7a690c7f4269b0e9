// A chat as a file.
const download = (name, type, text) => {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
};

const chosenAnswer = turn => turn.answers[turn.chosen];

// The messages that stand before a turn; questions without an answer are left out.
const messagesBefore = end => {
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const turn of chat.turns.slice(0, end)) {
    const { text } = chosenAnswer(turn);
    if (text) messages.push({ role: "user", content: contentOf(turn) }, { role: "assistant", content: text });
  }
  return messages;
};

// Those that a turn is asked with.
const messagesOf = turn => [...messagesBefore(chat.turns.indexOf(turn)), { role: "user", content: contentOf(turn) }];

// The last messages of an answer that goes on. A relay's writer has the draft in view again, where the server puts it.
const messagesToGoOn = (turn, { text, fusion }) => {
  const draft = fusion?.relay?.draft, asked = contentOf(turn);
  return [{ role: "user", content: draft ? `(${draft})\n\n${asked}` : asked }, { role: "assistant", content: text }];
};

// Judgements are items of the metric "choice": is the better answer the likelier one under a strategy?
const JUDGED = { task: { name: "judged", metric: "choice" } };
const isJudged = ({ judged = [] }, better, worse) =>
  judged.some(({ choices }) => choices[0] === better.text && choices[1] === worse.text);

// Note which of two versions was better, or take that back.
const setJudged = (turn, better, worse) => {
  const isTaken = isJudged(turn, better, worse);
  turn.judged = (turn.judged ?? []).filter(({ choices }) => ![better, worse].every(({ text }) => choices.includes(text)));
  if (isTaken) return;
  const messages = [...messagesBefore(chat.turns.indexOf(turn)), { role: "user", content: contentOf(turn) }];
  turn.judged.push({ messages, choices: [better.text, worse.text], answer: 0, strategies: [titleOf(better), titleOf(worse)] });
};

// Those of all chats that are kept, and of this one.
const asTask = async () => {
  const chats = [...(await listChats().catch(() => [])).filter(({ id }) => id !== chat.id), chat];
  const lines = chats.flatMap(({ turns }) => turns.flatMap(({ judged = [] }) => judged));
  if (!lines.length) throw new Error("No answer is marked as the better one yet. Ask for another version of an answer, and choose.");
  return [JUDGED, ...lines].map(line => `${JSON.stringify(line)}\n`).join("");
};

const mixLine = ({ model, strategy, fusion }) =>
  `*${[model, strategy || fusion?.strategy, fusion?.relay ? `${fusion.relay.knower} → ${fusion.relay.writer}` : fusion && spokeText(fusion.weights)].filter(Boolean).join(" · ")}*`;

const asMarkdown = () => [
  ...(settings.system.trim() ? ["## System", settings.system.trim()] : []),
  ...chat.turns.flatMap(turn => [
    "## Question", contentOf(turn),
    ...turn.answers.flatMap(answer => ["## Answer", mixLine(answer), answer.text.trim()]),
  ]),
].join("\n\n") + "\n";

const fileName = (ending, name = "chat") => `${name}-${new Date().toISOString().slice(0, 16).replace(/[:T]/g, "-")}.${ending}`;
