// Markdown comes from the server as a tree; only these elements are made of it.
const ELEMENTS = {
  p: "p", ul: "ul", ol: "ol", li: "li", blockquote: "blockquote", hr: "hr", br: "br",
  strong: "strong", em: "em", s: "s", code: "code",
  table: "table", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td",
  // The page's own headings stand above those of an answer.
  h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6",
};
const KINDS = ["comment", "keyword", "function", "type", "number", "string"];

const build = node => {
  if (typeof node === "string") return document.createTextNode(node);
  const [tag, attributes, nodes] = node;
  const children = nodes.map(build);
  if (tag === "pre") return codeBlock(attributes.lang, children);
  if (tag === "link") return linkText(attributes.address, children);
  if (tag === "span") {
    const kind = KINDS.includes(attributes.kind) ? attributes.kind : "";
    return el("span", { className: kind }, ...children);
  }
  if (!Object.hasOwn(ELEMENTS, tag)) throw new Error(`No element ${tag} is known.`);
  const made = el(ELEMENTS[tag], {}, ...children);
  if (tag === "ol") made.start = Number(attributes.start);
  if (["right", "center"].includes(attributes.align)) made.classList.add(attributes.align);
  return tag === "table" ? el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" }, made) : made;
};

const codeBlock = (language, children) => {
  const code = el("code", {}, ...children);
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

const REDRAW_MS = 60, LOAD = 4; // a redraw is followed by a pause of so many times its own time

// An answer that grows. Blocks that are settled stay the elements that they are.
const markdownView = onSettled => {
  const settled = el("div", { className: "part" }), live = el("div", { className: "part" });
  const element = el("div", { className: "markdown", dir: "auto" }, settled, live);
  let rest = "", fresh = "", isWhole = false, drawing = null;

  const draw = async () => {
    while (fresh || isWhole) {
      const start = performance.now(), text = rest + fresh, last = isWhole;
      [rest, fresh] = [text, ""];
      const reply = await (await call("page/blocks", { text, is_whole: last })).json();
      const nodes = reply.settled.map(build);
      settled.append(...nodes);
      live.replaceChildren(...reply.live.map(build));
      rest = reply.rest;
      onSettled(nodes.map(node => node.innerText).join("\n"));
      if (last) return;
      const pause = Math.max(REDRAW_MS, LOAD * (performance.now() - start));
      await new Promise(done => setTimeout(done, isWhole ? 0 : pause));
    }
  };

  // Should reading it fail, the letters are there all the same.
  const plain = error => {
    live.replaceChildren(el("p", { className: "plain" }, rest + fresh));
    throw error;
  };
  const run = () => drawing ||= draw().catch(plain).finally(() => { drawing = null; });

  return {
    element,
    feed: text => { fresh += text; run().catch(() => {}); },
    finish: () => { isWhole = true; return run(); },
  };
};
