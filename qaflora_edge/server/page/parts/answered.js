// An answer's nodes as elements of the page, whole or while it grows.
const ELEMENTS = {
  p: "p", ul: "ul", ol: "ol", li: "li", blockquote: "blockquote", hr: "hr", br: "br",
  strong: "strong", em: "em", s: "s", code: "code",
  table: "table", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td",
  // The page's own headings stand above those of an answer.
  h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6",
};

// A formula as MathML, or its source: where a part of it is unknown or refers to another formula, and where Temml itself fails.
const formula = ({ latex, isDisplay }, source) => {
  const made = el("span");
  try {
    temml.render(latex, made, { displayMode: isDisplay, throwOnError: true, maxSize: [50, 50] });
    made.firstChild.setAttribute("alttext", latex.trim());
  } catch {
    return document.createTextNode(source);
  }
  for (const labelled of made.querySelectorAll("[id]")) labelled.removeAttribute("id"); // they are the page's
  return made.querySelector("a") ? document.createTextNode(source) : made;
};

const build = node => {
  if (typeof node === "string") return document.createTextNode(node);
  const [tag, attributes, nodes] = node;
  if (tag === "math") return formula(attributes, nodes[0]);
  if (tag === "pre") return codeBlock(attributes.lang, nodes[0]);
  const children = nodes.map(build);
  if (tag === "link") return linkText(attributes.address, children);
  if (!Object.hasOwn(ELEMENTS, tag)) throw new Error(`No element ${tag} is known.`);
  const made = el(ELEMENTS[tag], {}, ...children);
  if (tag === "ol") made.start = attributes.start;
  if (["right", "center"].includes(attributes.align)) made.classList.add(attributes.align);
  return tag === "table" ? el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" }, made) : made;
};

// Colours of code in any language: comments, texts, numbers, common keywords, what is called.
const MAX_COLOURED = 50000; // characters
const CODE = new RegExp([
  String.raw`(?<comment>\/\*[^]*?\*\/|(?:\/\/|(?<![\w$])#(?![\da-f]{3})|--\s).*)`,
  String.raw`(?<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')`,
  String.raw`(?<number>\b\d[\w.]*)`,
  String.raw`(?<keyword>\b(?:and|as|async|await|break|case|catch|class|const|continue|def|del|do|done|elif|else|end|enum|except|export|fi|finally|fn|for|from|func|function|if|impl|import|in|is|lambda|let|match|new|not|null|or|package|pass|pub|raise|return|self|static|struct|switch|then|this|throw|trait|try|type|use|var|void|while|with|yield|True|False|None|true|false|SELECT|FROM|WHERE|JOIN|ON|GROUP|ORDER|BY|INSERT|UPDATE|DELETE)\b)`,
  String.raw`(?<function>[A-Za-z_]\w*(?=\())`,
].join("|"), "g");

const coloured = text => {
  if (text.length > MAX_COLOURED) return [text];
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(CODE)) {
    const [kind] = Object.entries(found.groups).find(([, part]) => part !== undefined);
    nodes.push(text.slice(end, found.index), el("span", { className: kind }, found[0]));
    end = found.index + found[0].length;
  }
  return [...nodes, text.slice(end)];
};

const codeBlock = (language, text) => {
  const code = el("code", {}, ...(language ? coloured(text) : [text]));
  return el("div", { className: "code" },
    el("div", { className: "code-head" }, el("span", {}, language || "text"),
      copyButton("Copy this code", () => code.textContent)),
    el("pre", { tabIndex: 0, role: "region", "aria-label": `Code, ${language || "text"}` }, code));
};

// A link of a model leads nowhere: its address can be read and copied.
const linkText = (address, children) => {
  const label = el("span", { className: "link" }, ...children);
  const isShown = label.textContent === address;
  return isShown ? label : el("span", {}, label, el("span", { className: "address" }, ` (${address})`));
};

// What is said aloud of an element: formulas as their source, for their letters alone lose fractions.
const spokenText = element => {
  if (!element.querySelector("math")) return element.innerText;
  const copied = element.cloneNode(true);
  for (const formula of copied.querySelectorAll("math")) formula.replaceWith(formula.getAttribute("alttext"));
  for (const end of copied.querySelectorAll("p, li, td, br")) end.after("\n");
  return copied.textContent;
};

const elementsOf = rows => blocksOf(rows).map(block => build(block.node));

const REDRAW_MS = 60, LOAD = 4; // a redraw is followed by a pause of so many times its own time

// An answer that grows. Blocks that are settled stay the elements that they are.
const markdownView = onSettled => {
  const settled = el("div", { className: "part" }), live = el("div", { className: "part" });
  const element = el("div", { className: "markdown", dir: "auto" }, settled, live);
  let rest = "", timer = null, drawn_ms = 0;

  const drawRest = isWhole => {
    const rows = rowsOf(rest), n = isWhole ? rows.length : settledRows(rows);
    const nodes = elementsOf(rows.slice(0, n)), growing = elementsOf(rows.slice(n));
    settled.append(...nodes);
    live.replaceChildren(...growing);
    rest = rows.slice(n).join("\n");
    onSettled(nodes.map(spokenText).join("\n"));
  };

  // What cannot be drawn is shown as it was written: one mistake here would hide the whole chat.
  const draw = isWhole => {
    const start = performance.now();
    clearTimeout(timer);
    timer = null;
    try {
      drawRest(isWhole);
    } catch {
      live.replaceChildren(el("p", { className: "as-written" }, rest));
    }
    drawn_ms = performance.now() - start;
  };

  return {
    element,
    feed: text => {
      rest += text;
      timer ||= setTimeout(draw, Math.max(REDRAW_MS, LOAD * drawn_ms), false);
    },
    finish: () => draw(true),
    restart: text => {
      settled.replaceChildren();
      rest = text;
      draw(false);
    },
  };
};
