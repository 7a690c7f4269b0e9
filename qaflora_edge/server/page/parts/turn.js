// A question with its versions: answers under several strategies, of which one or two are shown.
// on: {edit(turn, text), ask(view, strategy), goOn(view, version), change()}
const turnView = (turn, on) => {
  const element = el("section", { className: "turn", "aria-label": "Question and answer" });
  const question = el("div", { className: "question" });
  const answers = el("div", { className: "answers" });
  const chips = el("span", { className: "chips", role: "group", "aria-label": "Versions that are shown" });
  const views = [];

  const show = () => {
    const text = el("p", { className: "said", dir: "auto" }, turn.question);
    question.replaceChildren(...filesOf(turn).map(file => fileChip(file)), text, el("div", { className: "actions" },
      copyButton("Copy the question", () => turn.question),
      button("Edit the question", "edit", edit)));
  };

  const edit = () => {
    const leave = () => {
      show();
      question.querySelector(".actions button:last-child").focus();
    };
    const editor = editorOf({
      label: "Edit the question", text: turn.question, act: "Ask again", isSent: isSending, leave, save: text => on.edit(turn, text),
    });
    question.replaceChildren(editor.element);
    editor.begin();
  };

  // The chosen version, with which the chat goes on, and the one beside it.
  const isShown = index => index === turn.chosen || index === turn.beside;
  const draw = () => {
    const isPair = turn.beside !== undefined;
    const shown = views.filter((_, index) => isShown(index));
    const texts = shown.map(view => view.answer.text.trim());
    element.classList.toggle("pair", isPair);
    answers.replaceChildren(...shown.map(view => view.element));
    chips.hidden = views.length < 2;
    views.forEach((view, index) => {
      view.chip.textContent = `${index + 1} · ${strategyName(titleOf(view.answer))}`;
      view.chip.setAttribute("aria-pressed", String(isShown(index)));
      view.setNamed(isPair);
      view.element.classList.toggle("chosen", isPair && index === turn.chosen);
      view.better.hidden = !isPair || !texts.every(Boolean);
      view.better.disabled = new Set(texts).size < 2;
      view.better.title = view.better.disabled ? "Both say the same" : "The chat goes on with it; Save writes it down for qaflora eval";
      view.better.setAttribute("aria-pressed", String(isPair && isJudged(turn, view.answer, otherOf(index))));
    });
  };
  const otherOf = index => turn.answers[index === turn.chosen ? turn.beside : turn.chosen];

  const toggle = index => {
    if (isShown(index)) {
      if (index === turn.chosen) turn.chosen = turn.beside ?? index;
      turn.beside = undefined;
    } else turn.beside = index;
    draw();
    on.change();
  };

  const judge = index => {
    const other = turn.answers.indexOf(otherOf(index));
    setJudged(turn, turn.answers[index], turn.answers[other]);
    [turn.chosen, turn.beside] = [index, other];
    draw();
    on.change();
  };

  // An answer that cannot be drawn, as its plain text.
  const viewOf = (index, actions) => {
    const answer = turn.answers[index], names = adaptersOf(answer.model);
    try {
      return answerView(answer, names, actions);
    } catch {
      const { model, strategy, text } = answer;
      turn.answers[index] = { model, strategy, text: String(text), state: "stop" };
      return answerView(turn.answers[index], names, actions);
    }
  };

  const append = index => {
    const view = viewOf(index, { change: () => { draw(); on.change(); }, goOn: () => on.goOn(made, view), messages: () => messagesOf(turn) });
    view.chip = el("button", { type: "button", className: "chip", onclick: () => toggle(index) });
    view.better = el("button", { type: "button", className: "chip", onclick: () => judge(index) }, "This one was better");
    view.actions.append(view.better);
    chips.append(view.chip);
    views.push(view);
    return view;
  };

  // Add a version beside the chosen one, in place of a last one that came to nothing.
  const add = answer => {
    if (turn.answers.length && !turn.answers.at(-1).text) {
      turn.answers.pop();
      views.pop().chip.remove();
    }
    turn.chosen = Math.max(0, Math.min(turn.chosen, views.length - 1));
    turn.beside = views.length || undefined;
    const view = append(turn.answers.push(answer) - 1);
    draw();
    return view;
  };

  const retry = button("Ask again, with the settings as they are now", "retry", () => on.ask(made, settings.strategy));
  const ways = chooserOf({ label: "Another version", title: "Another version", className: "another", offered: () => {
    const names = strategyNames(), n_single = names.filter(isSingle).length;
    const rest = n_single > N_ALL ? names.splice(N_TOP - n_single) : [];
    return [names, rest].map(some => some.map(strategy => [strategyLabel(strategy), () => on.ask(made, strategy)]));
  } });
  const versions = el("div", { className: "versions" }, retry, chips, ways.opener, ways.choices);
  element.append(question, answers, versions);
  turn.answers.forEach((_, index) => append(index));
  show();
  draw();
  const made = { turn, element, add, draw, edit, setBusy: isBusy => {
    versions.inert = isBusy;
    views.forEach(view => view.setBusy(isBusy));
  } };
  return made;
};

// Enter sends; not while an input method composes a word, nor with Shift.
const isSending = event => event.key === "Enter" && !event.shiftKey && !event.isComposing;
