// Markdown as models write it: a text becomes nodes, and nodes become these elements only.
// A node is a text, or [tag, attributes, nodes]. No text is ever read as HTML.
//
// Less is markup than elsewhere, for no number and no formula may lose a sign: a star is emphasis
// neither inside a word nor beside a digit, `__` never is, and a backslash that is LaTeX's stays.
// `#### 72` is the answer of a data set and stays as it is. Temml draws formulas.
// HTML, images, underlined headings and definitions of links stay text.
const MAX_NESTED = 32; // quotes and lists in each other; deeper ones are text
const MAX_OPEN = 100; // runs of stars that wait for their end

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(\S*)/;
const HEADING = /^ {0,3}(?!####(?: [^\p{L}]*)?$)(#{1,6})(?=[ \t]|$)(.*)$/u;
const RESULT = /^ {0,3}####(?: ([^\p{L}]*))?$/u; // as GSM8K ends an answer: no heading
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-+*]|\d{1,9}[.)])( *)(.*)$/;
const DELIMITERS = /^[ \t]*:?-+:?[ \t]*$/;

const isBlank = line => !line.trim();
const indentOf = line => line.length - line.trimStart().length;

// An item's mark: how far its text is indented. Null for what begins none.
const itemAt = line => {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line) || (found[4] && !found[3])) return null;
  const [, before, mark, space, text] = found;
  const width = before.length + mark.length;
  const isPlain = !text || space.length > 4; // the text is empty, or code
  return { kind: mark.at(-1), number: parseInt(mark, 10), isEmpty: !text, indent: width + (isPlain ? 1 : space.length) };
};

// Whether a line ends the paragraph above it.
const breaks = line => {
  if (FENCE.test(line) || HEADING.test(line) || RESULT.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = itemAt(line);
  return item !== null && !item.isEmpty && !(item.number !== 1 && /[.)]/.test(item.kind));
};

// The cells of a row; a bar with a backslash, or in code, is a letter.
const cellsOf = line => {
  const cells = [""];
  for (const part of line.trim().match(/\\\||`[^`|]*`|\||[^\\|`]+|[\\`]/g) || []) {
    if (part === "|") cells.push("");
    else cells[cells.length - 1] += part === "\\|" ? "|" : part;
  }
  if (!cells[0].trim()) cells.shift();
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.map(cell => cell.trim());
};

const alignOf = mark => mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left";

// The table that begins at a line, and the line behind it; null where none does.
const tableAt = (lines, start) => {
  if (!/^ {0,3}\|/.test(lines[start]) || start + 1 >= lines.length) return null;
  const head = cellsOf(lines[start]), marks = cellsOf(lines[start + 1]);
  if (!lines[start + 1].includes("-") || marks.length !== head.length || !marks.every(mark => DELIMITERS.test(mark))) return null;
  const rows = [];
  let at = start + 2;
  for (; at < lines.length && !isBlank(lines[at]) && !breaks(lines[at]) && !itemAt(lines[at]); at++) {
    const cells = cellsOf(lines[at]);
    if (cells.length > head.length) break; // no cell is left out: the row is text below the table
    rows.push(cells);
  }
  const row = (tag, cells) => ["tr", {}, head.map((_, i) => [tag, { align: alignOf(marks[i]) }, inline(cells[i] || "")])];
  const body = rows.length ? [["tbody", {}, rows.map(cells => row("td", cells))]] : [];
  return [["table", {}, [["thead", {}, [row("th", head)]], ...body]], at];
};

const fenceAt = (lines, start) => {
  const [, fence, language] = FENCE.exec(lines[start]), indent = indentOf(lines[start]);
  const end = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let at = start + 1;
  while (at < lines.length && !end.test(lines[at])) at++;
  const code = lines.slice(start + 1, at).map(line => line.slice(Math.min(indent, indentOf(line))));
  return [["pre", { lang: language }, [code.join("\n")]], at + 1];
};

// The lines inside a quote or an item, without their marks: those that `inner` knows, and those
// that go on with its last paragraph (isOpen). `inner` gives a line's text, null for a foreign one.
const gathered = (lines, start, inner, isOpen = true) => {
  const found = [];
  let at = start;
  for (; at < lines.length; at++) {
    const text = inner(lines[at], at);
    const isLazy = isOpen && found.length && !isBlank(found.at(-1)) && !isBlank(lines[at]) && !breaks(lines[at]) && !itemAt(lines[at]);
    if (text === null && !isLazy) break;
    found.push(text ?? lines[at].trimStart());
  }
  return [found, at];
};

const listAt = (lines, start, depth) => {
  const first = itemAt(lines[start]), items = [];
  let at = start, isLoose = false;
  while (at < lines.length) {
    const item = itemAt(lines[at]);
    if (!item || item.kind !== first.kind) break;
    const from = at;
    const [own, next] = gathered(lines, at, (line, i) => {
      if (i === from || indentOf(line) >= item.indent) return line.slice(item.indent);
      return isBlank(line) ? "" : null;
    });
    let n = own.length;
    while (n > 1 && isBlank(own[n - 1])) n--;
    const nodes = blocksOf(own.slice(0, n), depth + 1);
    const goesOn = next < lines.length && itemAt(lines[next])?.kind === first.kind;
    isLoose ||= (n < own.length && goesOn) || nodes.some((block, i) => i && isBlank(own[block.start - 1]));
    items.push(nodes.map(block => block.node));
    at = next - (own.length - n) * !goesOn;
    if (!goesOn) break;
  }
  const shown = isLoose ? items : items.map(nodes => nodes.flatMap(node => node[0] === "p" ? node[2] : [node]));
  const nodes = shown.map(inside => ["li", {}, inside]);
  return [Number.isNaN(first.number) ? ["ul", {}, nodes] : ["ol", { start: first.number }, nodes], at];
};

// What ends the formula that a line begins or goes on with, which `closer` ends; "" behind its end.
const closerBehind = (line, closer) => {
  const text = line.trim();
  if (closer) return text.includes(closer) ? "" : closer;
  const begun = { "\\[": "\\]", "$$": "$$" }[text.slice(0, 2)];
  return begun && !text.includes(begun, 2) ? begun : "";
};

// Lines of a formula are no items and no quotes.
const paragraphAt = (lines, start) => {
  let at = start, closer = "";
  do {
    closer = closerBehind(lines[at], closer);
    at++;
  } while (at < lines.length && !isBlank(lines[at]) && (closer || (!breaks(lines[at]) && !tableAt(lines, at))));
  const text = lines.slice(start, at).map(line => line.trim()).join("\n");
  return [["p", {}, inline(text)], at];
};

const blockAt = (lines, at, depth) => {
  const line = lines[at];
  if (FENCE.test(line)) return fenceAt(lines, at);
  const heading = HEADING.exec(line);
  if (heading) return [[`h${heading[1].length}`, {}, inline(heading[2].trim().replace(/(^|[ \t])#+$/, "").trim())], at + 1];
  const result = RESULT.exec(line);
  if (result) return [["p", {}, [["strong", {}, inline((result[1] || "").trim())]]], at + 1];
  if (RULE.test(line)) return [["hr", {}, []], at + 1];
  if (depth < MAX_NESTED && QUOTE.test(line)) {
    const [own, next] = gathered(lines, at, each => QUOTE.test(each) ? each.replace(QUOTE, "") : null);
    return [["blockquote", {}, blocksOf(own, depth + 1).map(block => block.node)], next];
  }
  if (depth < MAX_NESTED && itemAt(line)) return listAt(lines, at, depth);
  if (indentOf(line) >= 4) {
    let [code, next] = gathered(lines, at, each => indentOf(each) >= 4 ? each.slice(4) : isBlank(each) ? "" : null, false);
    while (isBlank(code.at(-1))) { code.pop(); next--; }
    return [["pre", { lang: "" }, [code.join("\n")]], next];
  }
  return tableAt(lines, at) || paragraphAt(lines, at);
};

// The blocks of lines: [{node, start}], where start is a block's first line.
const blocksOf = (lines, depth = 0) => {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) { at++; continue; }
    const [node, next] = blockAt(lines, at, depth);
    found.push({ node, start: at });
    at = next;
  }
  return found;
};

const rowsOf = text => text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
const markdownNodes = text => blocksOf(rowsOf(text)).map(block => block.node);

// How many rows hold blocks that stay as they are, whatever comes behind: all but the last block.
// A row that still grows tells nothing, for `2` may yet become `2.`, an item of the list above it.
const settledRows = rows => blocksOf(rows.slice(0, -1)).at(-1)?.start || 0;

// What may stand before and behind emphasis beside blanks; scripts without blanks are such places.
const WIDE = /[\u3000-\u303f\uff00-\uff60\uffe0-\uffe6]|\p{sc=Han}|\p{sc=Hiragana}|\p{sc=Katakana}|\p{sc=Hangul}/u;
const isEdge = (sign, marks) => !sign.trim() || marks.includes(sign) || WIDE.test(sign);
const isDigit = sign => /\d/.test(sign);
const isPunctuation = sign => /[\p{P}\p{S}]/u.test(sign);

const matchAt = (pattern, text, at) => { pattern.lastIndex = at; return pattern.exec(text); };
const PLAIN = /[^`\\*_~[$\n]+/y, RUN = /`+|\*+|_+|~+/y;
const LINK = /\[([^[\]\n]*)\]\(<?((?:https?|ftp|mailto):[^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: +"[^"\n]*")?\)/iy;
const LATEX = "()[]{}\\,:;|"; // behind a backslash, LaTeX's
// A formula between single dollars touches both, on one line; $5 and $10 hold none.
const DOLLARS = /(?<![\w$])\$(?![\s$])((?:[^$\\\n]|\\[^\n])+)(?<!\s)\$(?![\w$])/y;
const PRICE = /^\d[^\\=^_]*\s\p{L}{2}/u; // words after a number
const MAX_FORMULA = 4000; // characters
const CLOSERS = { "\\(": "\\)", "\\[": "\\]", "$$": "$$" };

const formulaNode = (took, latex, isDisplay) => {
  if (!latex.trim() || latex.length > MAX_FORMULA) return took;
  const isBare = latex.includes("&") && !latex.includes("\\begin");
  return ["math", { latex: isBare ? `\\begin{aligned}${latex}\\end{aligned}` : latex, isDisplay }, [took]];
};

// The formula at a place: what it took, and its node.
// noEnd: delimiters that have no end behind this place
const formulaAt = (text, at, noEnd) => {
  const closer = CLOSERS[text.slice(at, at + 2)];
  if (!closer) {
    const found = matchAt(DOLLARS, text, at);
    return found && !PRICE.test(found[1]) ? [found[0], formulaNode(found[0], found[1], false)] : null;
  }
  if (text[at] === "$" && (text[at - 1] === "$" || text[at + 2] === "$")) return null;
  const end = noEnd.has(closer) ? -1 : text.indexOf(closer, at + 2);
  if (end < 0) noEnd.add(closer);
  if (end < 0 || text[end + 2] === "$") return null;
  const took = text.slice(at, end + 2);
  return [took, formulaNode(took, took.slice(2, -2), closer !== "\\)")];
};

// The nodes of a paragraph, a heading or a cell; a line end is one.
const inline = text => {
  const parts = [], noEnd = new Set(); // lengths of runs of `, and ends of formulas, that do not come any more
  const code = (run, at) => {
    for (let end = text.indexOf(run, at); end >= 0 && !noEnd.has(run.length); ) {
      const [found] = matchAt(/`+/y, text, end);
      if (found.length === run.length) return end;
      end = text.indexOf(run, end + found.length);
    }
    noEnd.add(run.length);
    return -1;
  };
  for (let at = 0; at < text.length;) {
    const sign = text[at], plain = matchAt(PLAIN, text, at);
    let took = (plain || matchAt(RUN, text, at) || [sign])[0], node = took;
    const link = sign === "[" ? matchAt(LINK, text, at) : null;
    const formula = sign === "\\" || sign === "$" ? formulaAt(text, at, noEnd) : null;
    if (formula) {
      [took, node] = formula;
      if (Array.isArray(node) && node[1].display) { // on lines of its own
        if (parts.at(-1)?.[0] === "br") parts.pop();
        if (text[at + took.length] === "\n") took += "\n";
      }
    }
    else if (sign === "\n") node = ["br", {}, []];
    else if (sign === "\\" && at + 1 < text.length) {
      const next = text[at + 1];
      if (next === "\n") node = "";
      else {
        took = /[!-/:-@[-`{-~]/.test(next) ? sign + next : sign;
        node = LATEX.includes(next) ? took : took.at(-1);
      }
    } else if (sign === "`") {
      const end = code(took, at + took.length);
      if (end >= 0) {
        const inside = text.slice(at + took.length, end).replace(/\n/g, " ");
        const isPadded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
        node = ["code", {}, [isPadded ? inside.slice(1, -1) : inside]];
        took = text.slice(at, end + took.length);
      }
    } else if (link) {
      [took] = link;
      node = ["link", { address: link[2] }, inline(link[1])];
    } else if ("*_~".includes(sign)) node = runOf(text, at, took);
    parts.push(node);
    at += took.length;
  }
  return joined(matched(parts));
};

// A run of stars: how many are left, the tags that it ends, and those that it begins.
const runOf = (text, at, run) => {
  const before = [...text.slice(Math.max(0, at - 2), at)].at(-1) || "", behind = [...text.slice(at + run.length, at + run.length + 2)][0] || "";
  const isText = (run.length === 1 && (isDigit(before) || isDigit(behind))) || (run[0] === "_" && run.length > 1) || (run[0] === "~" && run.length !== 2);
  const opens = !isText && isEdge(before, "([{\"'“‘«„¿¡—–*_~") && behind.trim() && (!isPunctuation(behind) || !before.trim() || isPunctuation(before));
  const closes = !isText && isEdge(behind, ")]}\"'”’»“.,;:!?…—–-*_~") && before.trim() && (!isPunctuation(before) || !behind.trim() || isPunctuation(behind));
  return { sign: run[0], size: run.length, left: run.length, opens, closes, ended: [], begun: [] };
};

// Parts with each run's tags: an end belongs to the nearest beginning of its sign.
const matched = parts => {
  let open = [];
  for (const run of parts) {
    if (typeof run === "string" || Array.isArray(run)) continue;
    while (run.closes && run.left) {
      const at = open.findLastIndex(other => other.sign === run.sign
        && !((other.closes || run.opens) && (other.size + run.size) % 3 === 0 && other.size % 3));
      if (at < 0) break;
      const start = open[at], n = Math.min(start.left, run.left, 2);
      const tag = run.sign === "~" ? "s" : n === 2 ? "strong" : "em";
      start.begun.unshift(tag);
      run.ended.push(tag);
      start.left -= n;
      run.left -= n;
      open = open.slice(0, start.left ? at + 1 : at);
    }
    if (run.opens && run.left && open.length < MAX_OPEN) open.push(run);
  }
  return parts;
};

// Nodes that hold each other, with neighbouring texts as one.
const joined = parts => {
  const stack = [[]];
  const add = node => {
    const nodes = stack.at(-1);
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + node);
    else if (node !== "") nodes.push(node);
  };
  for (const part of parts) {
    if (typeof part === "string" || Array.isArray(part)) { add(part); continue; }
    for (const tag of part.ended) { const inside = stack.pop(); add([tag, {}, inside]); }
    add(part.sign.repeat(part.left));
    for (const _ of part.begun) stack.push([]);
  }
  return stack[0];
};
