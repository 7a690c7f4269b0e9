// One answer: its mix, its text while it is written, what became of it.
const STATES = {
  waiting: "Reading the question",
  writing: "",
  stop: "",
  length: "Cut at the longest answer; see the settings.",
  cancelled: "Stopped.",
};

const PATIENCE_MS = 1000; // what is quicker needs no number

// The strategy as it was asked for; the bundle's own is known when the answer begins.
const titleOf = answer => answer.strategy || answer.fusion?.strategy || "the bundle's own";

const duration = ms => ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;

const facts = (answer, isNamed) => [
  isNamed ? "" : titleOf(answer),
  answer.fusion?.probe_ms ? `weighed in ${duration(answer.fusion.probe_ms)}` : "",
  answer.isEdited ? "edited" : answer.usage ? `${answer.usage.completion_tokens} tokens` : "",
  answer.timings?.tokens_per_second ? `${answer.timings.tokens_per_second.toFixed(1)} tokens/s` : "",
].filter(Boolean).join(" · ");

const draftTitle = ({ knower, draft_tokens, draft_ms }) => [
  `Draft of ${knower}`, draft_tokens ? `${draft_tokens} tokens` : "", draft_ms ? duration(draft_ms) : "",
].filter(Boolean).join(" · ");

// What an answer waits for, with how far that is and how long it will take where that is long.
const waitingText = ({ strategy, fusion, text: begun }, progress) => {
  if (begun) return "Going on";
  if (fusion?.relay) return `${fusion.relay.knower} drafts`;
  if (progress?.stage === "drafting") return "Drafting";
  const isWeighing = progress ? progress.stage === "weighing" : !fusion && isProbed(strategy);
  const text = isWeighing ? "Weighing the adapters" : STATES.waiting;
  if (!progress || progress.time_ms < PATIENCE_MS) return text;
  const { processed, total, time_ms } = progress, left_ms = processed ? time_ms * (total - processed) / processed : 0;
  const left = left_ms >= PATIENCE_MS ? `, ${Math.round(left_ms / 1000)} s more` : "";
  return `${text} ${Math.floor(100 * processed / total)} %${left}`;
};

const isRunning = answer => ["waiting", "writing"].includes(answer.state);

// A thought before an answer, folded. What a model thinks is plain text.
const thoughtView = answer => {
  const title = el("summary"), text = el("div", { dir: "auto" }, answer.thought ?? "");
  const element = el("details", { className: "thought" }, title, text);
  const update = () => {
    const n = answer.usage?.completion_tokens_details?.reasoning_tokens;
    element.hidden = !answer.thought;
    title.textContent = isRunning(answer) && !answer.text ? "Thinking …" : n ? `Thought · ${n} tokens` : "Thought";
  };
  return { element, update, feed: more => { answer.thought = (answer.thought ?? "") + more; text.append(more); } };
};

// answer   {model, strategy, thought, text, state, isEdited, error, fusion, usage, timings}
// adapters all names of its bundle
// on       {change(), goOn(), messages()}: it was edited, it is to go on from where it ends, what its question was asked with
const answerView = (answer, adapters, on) => {
  let isNamed = false; // next to another
  const head = el("h2", { className: "answer-head" });
  const mix = el("div", { className: "mix-place" }), thought = thoughtView(answer);
  const draft = draftView(adapters);
  const body = markdownView(text => {
    if (text && isRunning(answer)) byId("spoken").append(el("p", {}, text));
  });
  const note = el("p", { className: "note" });
  const actions = el("div", { className: "actions" }), editPlace = el("div");
  const more = el("button", { type: "button", className: "chip more", title: "Go on from the end, under the same mix", onclick: () => on.goOn() }, "Continue");
  const about = el("span", { className: "facts" }), teaching = teachView(answer, on.messages);
  const element = el("article", { className: "answer", "aria-label": "Answer" },
    head, mix, draft.element, thought.element, body.element, editPlace, note, more, el("div", { className: "foot" }, actions, about), teaching.element);
  const copying = copyButton("Copy the answer", () => answer.text);
  const leave = () => {
    element.classList.remove("is-edited");
    editing.focus();
  };
  const edit = () => {
    const editor = editorOf({ label: "Edit the answer", text: answer.text, act: "Save", isSent: event => event.key === "Enter" && event.ctrlKey, leave, save });
    editPlace.replaceChildren(editor.element);
    element.classList.add("is-edited");
    editor.begin();
  };
  const save = text => {
    answer.isEdited ||= text !== answer.text;
    answer.text = text;
    body.restart(text);
    body.finish();
    leave();
    on.change();
  };
  const editing = button("Edit the answer", "edit", edit);
  actions.append(copying, editing, teaching.opener);

  // The draft of a relay, or what will be the answer unless other drafts decide: seen until the answer begins.
  const showDraft = expected => {
    const { relay } = answer.fusion ?? {}, isDrafting = isRunning(answer) && !answer.text;
    if (relay) draft.show(draftTitle(relay), relay.draft ?? "", relay.knower);
    else draft.show("Draft, not decided yet", expected ?? "", "");
    draft.element.hidden = relay ? !isDrafting && !draft.isOpened : !isDrafting || !expected;
  };

  // progress  what the server told last of weighing and reading, at first nothing
  const update = progress => {
    if (answer.fusion && !mix.childElementCount) mix.append(mixView(answer.fusion, adapters, draft));
    showDraft(progress?.expected);
    thought.update();
    teaching.update();
    head.hidden = !isNamed;
    head.textContent = strategyName(titleOf(answer));
    copying.hidden = !answer.text;
    editing.hidden = !answer.text;
    more.hidden = !answer.text || answer.state === "stop" && !answer.isEdited;
    note.textContent = answer.error || (answer.state === "waiting" ? waitingText(answer, progress) : STATES[answer.state]);
    note.classList.toggle("trouble", Boolean(answer.error));
    note.hidden = !note.textContent;
    element.dataset.state = answer.state;
    element.setAttribute("aria-busy", String(isRunning(answer)));
    about.textContent = isRunning(answer) ? "" : facts(answer, isNamed);
  };
  update();
  if (!isRunning(answer)) {
    body.feed(answer.text);
    body.finish();
  }
  const restart = () => {
    body.restart(answer.text);
    answer.state = "waiting";
    answer.error = undefined;
    update();
  };
  return {
    answer, element, body, thought, actions, update, restart,
    setNamed: is => { isNamed = is; update(); }, setBusy: isBusy => { more.disabled = isBusy; },
  };
};

// Ask, and fill an answer as it comes. Never throws: what went wrong is the answer's.
const fill = async (view, request, signal) => {
  const { answer, body, thought } = view, n_before = answer.usage?.completion_tokens ?? 0; // of one that goes on
  let state;
  try {
    const response = await call("v1/chat/completions", {
      ...request, stream: true, stream_options: { include_usage: true }, return_progress: true,
    }, signal);
    for await (const chunk of events(response)) {
      const { fusion } = chunk;
      if (fusion?.strategy) answer.fusion = fusion; // the last one has the whole draft
      if (fusion?.draft) {
        const { relay } = answer.fusion;
        relay.draft = fusion.strategy ? fusion.draft : relay.draft + fusion.draft;
      }
      if (chunk.usage) answer.usage = { ...chunk.usage, completion_tokens: n_before + chunk.usage.completion_tokens };
      if (chunk.timings) answer.timings = chunk.timings;
      const choice = chunk.choices?.[0];
      if (choice?.delta?.reasoning_content) {
        answer.state = "writing";
        thought.feed(choice.delta.reasoning_content);
      }
      if (choice?.delta?.content) {
        answer.text += choice.delta.content;
        answer.state = "writing";
        body.feed(choice.delta.content);
      }
      if (choice?.finish_reason) state = choice.finish_reason;
      view.update(chunk.prompt_progress);
    }
    if (!state) throw new Refused("The server ended the answer before its end.");
  } catch (error) {
    state = error.name === "AbortError" ? "cancelled" : "error";
    if (state === "error") answer.error = told(error);
  }
  body.finish();
  answer.state = state;
  view.update();
};

const told = error => error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message;
