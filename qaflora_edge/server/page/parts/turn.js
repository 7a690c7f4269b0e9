// A question with its answers: one, or two side by side of which one is gone on with.
// on: {edit(turn, text), retry(turn), choose(turn, index)}
const turnView = (turn, adaptersOf, on) => {
  const element = el("section", { className: "turn", "aria-label": "Question and answer" });
  const question = el("div", { className: "question" });
  const answers = el("div", { className: "answers" });
  element.append(question, answers);

  const show = () => {
    const text = el("p", { className: "said", dir: "auto" }, turn.question);
    question.replaceChildren(text, el("div", { className: "actions" },
      copyButton("Copy the question", () => turn.question),
      button("Edit the question", "edit", edit)));
  };

  const edit = () => {
    const area = el("textarea", { rows: 1, value: turn.question, dir: "auto", "aria-label": "Edit the question", oninput: () => grow(area) });
    const leave = () => {
      show();
      question.querySelector(".actions button:last-child").focus();
    };
    const send = () => { if (area.value.trim()) on.edit(turn, area.value.trim()); };
    area.addEventListener("keydown", event => {
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
      if (isSending(event)) { event.preventDefault(); send(); }
    });
    question.replaceChildren(area, el("div", { className: "row" },
      el("button", { type: "button", onclick: leave }, "Cancel"),
      el("button", { type: "button", className: "main", onclick: send }, "Ask again")));
    grow(area);
    area.focus();
  };

  const isPair = turn.answers.length > 1;
  element.classList.toggle("pair", isPair);
  const views = turn.answers.map(answer => answerView(answer, adaptersOf(answer.model), { isNamed: isPair }));
  answers.append(...views.map(view => view.element));

  const choices = views.map((view, index) => el("button", {
    type: "button", className: "choice", onclick: () => { turn.chosen = index; mark(); on.choose(turn, index); },
  }, "Go on with this"));
  const mark = () => views.forEach((view, index) => {
    const isChosen = turn.chosen === index;
    choices[index].setAttribute("aria-pressed", String(isChosen));
    view.element.classList.toggle("chosen", isChosen);
  });
  if (isPair) {
    views.forEach((view, index) => view.actions.append(choices[index]));
    mark();
  }
  const retry = button("Ask again, with the settings as they are now", "retry", () => on.retry(turn));
  const setLast = isLast => {
    retry.remove();
    if (isLast) views.at(-1).actions.children[0].after(retry);
  };
  show();
  return { turn, element, views, edit, setLast };
};

// Enter sends; not while an input method composes a word, nor with Shift.
const isSending = event => event.key === "Enter" && !event.shiftKey && !event.isComposing;
