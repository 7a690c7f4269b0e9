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
    if (text) messages.push({ role: "user", content: turn.question }, { role: "assistant", content: text });
  }
  return messages;
};

const mixLine = ({ model, strategy, fusion }) =>
  `*${[model, strategy || fusion?.strategy, fusion?.relay ? `${fusion.relay.knower} → ${fusion.relay.writer}` : fusion && spokeText(fusion.weights)].filter(Boolean).join(" · ")}*`;

const asMarkdown = () => [
  ...(settings.system.trim() ? ["## System", settings.system.trim()] : []),
  ...chat.turns.flatMap(turn => [
    "## Question", turn.question,
    ...turn.answers.flatMap(answer => ["## Answer", mixLine(answer), answer.text.trim()]),
  ]),
].join("\n\n") + "\n";

const fileName = ending => `chat-${new Date().toISOString().slice(0, 16).replace(/[:T]/g, "-")}.${ending}`;
