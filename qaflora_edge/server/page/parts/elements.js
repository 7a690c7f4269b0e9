// Elements by their names. Nothing in this page reads HTML: what a model writes is text.
const byId = id => document.getElementById(id);

// A property is set as such where the element has it, as an attribute where it has not.
const el = (tag, properties = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null));
  return made;
};

const button = (label, icon, onclick, className = "quiet") =>
  el("button", { type: "button", className, title: label, "aria-label": label, onclick }, drawn(icon));

// A button that acts when it is pressed a second time.
const confirmed = (made, question, act) => {
  const label = [...made.childNodes];
  const reset = () => made.replaceChildren(...label);
  made.onblur = reset;
  made.onclick = () => {
    if (made.textContent !== question) made.replaceChildren(question);
    else { reset(); act(); }
  };
  return made;
};

const unique = (() => {
  let n = 0;
  return name => `${name}-${++n}`;
})();

const say = text => { byId("status").textContent = text; };

// What went wrong, with what: it is said until that goes well, or something is asked.
const fail = (text, what = "") => {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
  byId("trouble").dataset.what = what;
};
const succeed = what => { if (byId("trouble").dataset.what === what) fail(""); };

// The clipboard's own call is there on https and on this machine only.
const copy = async text => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (!isDone) throw new Error("The browser does not let this page copy.");
};

const copyButton = (label, text) => {
  const made = button(label, "copy", async () => {
    try {
      await copy(text());
      made.replaceChildren(drawn("check"));
      say("Copied");
      setTimeout(() => made.replaceChildren(drawn("copy")), 1500);
    } catch (error) {
      say(error.message);
    }
  });
  return made;
};

// A button that opens choices below it; Escape closes them. Long lists begin with a part.
// offered: () => [first, rest], lists of [text, act]
const chooserOf = ({ label, title, className, offered }) => {
  const choices = el("div", { className: "chips choices", id: unique("choices"), role: "group", "aria-label": title, hidden: true });
  const open = isOpen => {
    if (isOpen) offer();
    choices.hidden = !isOpen;
    opener.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) choices.scrollIntoView({ block: "nearest" });
  };
  const opener = el("button", {
    type: "button", className: `quiet opener ${className}`, title, "aria-expanded": "false", "aria-controls": choices.id, onclick: () => open(choices.hidden),
  }, label, drawn("open"));
  const leave = event => {
    if (event.key !== "Escape" || choices.hidden) return;
    event.stopPropagation();
    open(false);
    opener.focus();
  };
  const choice = ([text, act]) => el("button", { type: "button", className: "chip", onclick: () => { open(false); opener.focus(); act(); } }, text);
  const offer = () => {
    const [first, rest] = offered();
    choices.replaceChildren(...first.map(choice));
    const showRest = event => {
      event.target.replaceWith(...rest.map(choice));
      choices.children[first.length].focus();
    };
    if (rest.length) choices.append(el("button", { type: "button", className: "chip", onclick: showRest }, `${rest.length} others`));
  };
  for (const part of [opener, choices]) part.addEventListener("keydown", leave);
  return { opener, choices };
};

// A text that is changed in place, as an element. isSent: whether a key saves it
const editorOf = ({ label, text, act, isSent, save, leave }) => {
  const area = el("textarea", { rows: 1, value: text, dir: "auto", "aria-label": label, oninput: () => grow(area) });
  const saveText = () => { if (area.value.trim()) save(area.value.trim()); };
  area.addEventListener("keydown", event => {
    if (event.key === "Escape") { event.stopPropagation(); leave(); }
    if (isSent(event)) { event.preventDefault(); saveText(); }
  });
  const element = el("div", { className: "editor" }, area, el("div", { className: "row" },
    el("button", { type: "button", onclick: leave }, "Cancel"),
    el("button", { type: "button", className: "main", onclick: saveText }, act)));
  return { element, begin: () => { grow(area); area.focus(); } };
};

// A text area that is as high as its text, up to what its style allows.
const grow = area => {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
};
