// A chat as the file that `qaflora chat` saves and loads. What is of this page alone stands beside.
const SESSION_FORMAT = "qaflora-session/1";
const MAX_SESSION_BYTES = 16 * 2 ** 20;
const REASONS = ["stop", "length", "cancelled"];

const strategyText = () => {
  const { bundle, strategy } = settings;
  if (strategy !== "manual") return strategy || ownStrategy();
  return `manual:${adaptersOf(bundle).map(name => `${name}=${weightOf(name)}`).join(",")}`;
};

const answerMessage = ({ model, strategy, thought, text, state, isEdited, fusion, usage, timings }) => ({
  role: "assistant", content: text, reasoning_content: thought, finish_reason: REASONS.includes(state) ? state : "cancelled",
  model, strategy, edited: isEdited, fusion, usage, timings,
});

const asSession = () => {
  const { bundle, system } = settings, names = adaptersOf(bundle);
  const { sha256 = {} } = bundles.get(bundle).meta;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of chat.turns.filter(each => chosenAnswer(each).text)) {
    const others = turn.answers.filter(answer => answer !== chosenAnswer(turn)).map(answerMessage);
    messages.push(
      { role: "user", content: contentOf(turn) },
      { ...answerMessage(chosenAnswer(turn)), ...(others.length ? { others } : {}) });
  }
  return `${JSON.stringify({
    format: SESSION_FORMAT,
    bundle: { name: bundle, base_sha256: sha256.base ?? "", adapters: sha256.adapters ?? {} },
    strategy: strategyText(),
    adapters: isChosen(settings.strategy) ? adaptersInUse() : names,
    messages,
  }, null, 1)}\n`;
};

// Reading one: it may come from anywhere, so that everything is checked and nothing else is taken.
const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = value => typeof value === "string";

const wrong = (name, value, expected) => {
  const found = value === undefined ? "missing" : JSON.stringify(value).slice(0, 80);
  return new Error(`${name} is ${found}, expected ${expected}.`);
};

const isMix = fusion => isObject(fusion?.weights) && isObject(fusion.layers) && Object.values(fusion.layers).every(Array.isArray);
const answerOf = (message, bundle) => ({
  model: isText(message.model) ? message.model : bundle,
  strategy: isText(message.strategy) ? message.strategy : "",
  text: message.content,
  ...(isText(message.reasoning_content) ? { thought: message.reasoning_content } : {}),
  state: message.finish_reason ?? "stop",
  ...(message.edited === true ? { isEdited: true } : {}),
  fusion: isMix(message.fusion) ? message.fusion : undefined,
  ...(Number.isFinite(message.usage?.completion_tokens) ? { usage: { completion_tokens: message.usage.completion_tokens } } : {}),
  ...(Number.isFinite(message.timings?.tokens_per_second) ? { timings: { tokens_per_second: message.timings.tokens_per_second } } : {}),
});

const checkMessage = (message, name, role) => {
  if (message?.role !== role) throw wrong(`${name}.role`, message?.role, `"${role}"`);
  if (!isText(message.content)) throw wrong(`${name}.content`, message.content, "a text");
  if (role === "user" && !message.content.trim()) throw wrong(`${name}.content`, message.content, "a text that is not empty");
  const reason = message.finish_reason ?? "stop";
  if (!REASONS.includes(reason)) throw wrong(`${name}.finish_reason`, reason, `one of ${REASONS.join(", ")}`);
};

const checkSession = found => {
  if (!isObject(found) || found.format !== SESSION_FORMAT) throw wrong("The field format", found?.format, `"${SESSION_FORMAT}"`);
  if (!isText(found.bundle?.name)) throw wrong("The field bundle.name", found.bundle?.name, "a text");
  if (!isText(found.strategy)) throw wrong("The field strategy", found.strategy, "a text");
  if (!Array.isArray(found.messages)) throw wrong("The field messages", found.messages, "a list");
  const n = found.messages[0]?.role === "system" ? 1 : 0;
  found.messages.forEach((message, i) =>
    checkMessage(message, `The field messages[${i}]`, i < n ? "system" : ["user", "assistant"][(i - n) % 2]));
  if ((found.messages.length - n) % 2) throw wrong("The field messages", found.messages.length, "an answer to every question");
  return n;
};

const othersOf = ({ others }) => (Array.isArray(others) ? others : []).slice(0, 15)
  .filter(each => isObject(each) && isText(each.content) && REASONS.includes(each.finish_reason));

// What a file says: {system, turns, bundle, strategy}. Throws what is wrong with it.
const readSession = text => {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("It is not JSON.");
  }
  const n = checkSession(found), { bundle, strategy, messages } = found, turns = [];
  for (let i = n; i < messages.length; i += 2) {
    const answers = [messages[i + 1], ...othersOf(messages[i + 1])];
    turns.push({
      question: messages[i].content, answers: answers.map(each => answerOf(each, bundle.name)), chosen: 0,
      ...(answers.length > 1 ? { beside: 1 } : {}),
    });
  }
  return { system: n ? messages[0].content : "", turns, bundle, strategy };
};

// The settings of a file, as far as this server can follow them.
const followSession = ({ system, bundle, strategy }) => {
  settings.system = system;
  if (bundles.has(bundle.name)) settings.bundle = bundle.name;
  settings.strategy = strategyNames().includes(strategy) ? strategy : "";
};
