// Teaching: the question of an answer belongs to an adapter, or to the base, from the next question on.
const takesTeaching = bundle => Boolean(bundles.get(bundle)?.meta.takes_teaching && adaptersOf(bundle).length);
let withdrawUndo = () => {}; // the server takes back what was taught last

// messages: () => the conversation up to the answer's question
const teachView = (answer, messages) => {
  const chooser = chooserOf({ label: "Should have been", title: "Who should have answered this question", className: "teach", offered: () => {
    const names = adaptersOf(answer.model), n_first = names.length > N_ALL ? N_TOP : names.length;
    const choices = names.map(name => [name, () => teach(name)]);
    return [[["base", () => teach("base")], ...choices.slice(0, n_first)], choices.slice(n_first)];
  } });
  const undo = el("button", { type: "button", className: "chip", title: "Take back what was taught", hidden: true, onclick: () => takeBack() }, "Undo");
  const text = el("span"), note = el("p", { className: "taught", hidden: true }, text, " ", undo);

  const tell = (words, isTrouble = false) => {
    text.textContent = words;
    note.classList.toggle("trouble", isTrouble);
    note.hidden = false;
    say(words);
  };
  let isBusy = false;
  const send = async body => {
    if (isBusy) return null;
    isBusy = true;
    try {
      return await (await call("v1/teach", { model: answer.model, ...body })).json();
    } catch (error) {
      tell(told(error), true);
      return null;
    } finally {
      isBusy = false;
    }
  };
  const teach = async name => {
    if (!isBusy) tell("Teaching …");
    const reply = await send({ messages: messages(), adapter: name });
    if (!reply) return;
    const { adapter, taught } = reply;
    withdrawUndo();
    withdrawUndo = () => { undo.hidden = true; };
    undo.hidden = false;
    tell(`From the next question on: ${adapter} (${taught} ${taught === 1 ? "example" : "examples"}).`);
  };
  const takeBack = async () => {
    const reply = await send({ undo: true });
    if (!reply) return;
    undo.hidden = true;
    tell(`Undone: ${reply.adapter}.`);
    chooser.opener.focus();
  };

  const element = el("div", { className: "teaching" }, chooser.choices, note);
  return { element, opener: chooser.opener, update: () => { chooser.opener.hidden = !takesTeaching(answer.model); } };
};
