// LaTeX formulas as MathML nodes, each [tag, attributes, nodes] as in markdown.js.
// A formula with an unknown command gives null, and the page shows its source.
const MAX_FORMULA = 4000; // characters
const MAX_DEPTH = 40; // fractions, roots and groups inside each other

// "name sign name sign ..." as a Map: names such as `constructor` find nothing in it.
const signs = text => new Map(Array.from(text.matchAll(/(\S+)\s+(\S+)/g), ([, name, sign]) => [name, sign]));

const OPERATORS = signs(`
  times × cdot ⋅ div ÷ pm ± mp ∓ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ otimes ⊗ cup ∪ cap ∩ setminus ∖ wedge ∧ land ∧ vee ∨ lor ∨
  le ≤ leq ≤ leqslant ≤ ge ≥ geq ≥ geqslant ≥ ne ≠ neq ≠ lt < gt > ll ≪ gg ≫ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ propto ∝
  in ∈ notin ∉ ni ∋ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ mid ∣ nmid ∤ parallel ∥ perp ⊥ to → rightarrow → leftarrow ←
  leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ implies ⟹ iff ⟺ mapsto ↦ longrightarrow ⟶ uparrow ↑ downarrow ↓
  forall ∀ exists ∃ neg ¬ lnot ¬ therefore ∴ because ∵ angle ∠ triangle △ colon : prime ′ ldots … dots … cdots ⋯ vdots ⋮ ddots ⋱
  sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ int ∫ iint ∬ oint ∮`);
const FENCES = signs(`{ { } } | ‖ lbrace { rbrace } langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ lvert | rvert | vert | lVert ‖ rVert ‖ Vert ‖`);
const LETTERS = signs(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π
  varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω
  infty ∞ ell ℓ hbar ℏ partial ∂ nabla ∇ emptyset ∅ varnothing ∅ aleph ℵ Re ℜ Im ℑ imath ı jmath ȷ degree ° checkmark ✓ square □`);
const CAPITALS = signs("Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω");
const BOARD = signs("R ℝ N ℕ Z ℤ Q ℚ C ℂ P ℙ");
const ACCENTS = signs("hat ^ widehat ^ bar ¯ vec → overrightarrow → tilde ~ widetilde ~ dot ˙ ddot ¨");
const SPACES = signs(", .17em : .22em > .22em ; .28em ! -.17em quad 1em qquad 2em enspace .5em thinspace .17em displaystyle 0 textstyle 0 limits 0 nolimits 0");
const FUNCTIONS = new Set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf gcd lcm det dim ker deg arg mod Pr".split(" "));
const UNDER = new Set([..."∑∏∐⋃⋂", "lim", "max", "min", "sup", "inf"]); // limits stand below and above in display style
const ALIGNED = ["aligned", "align", "align*", "split", "eqnarray", "eqnarray*"];
const CENTERED = ["gathered", "gather", "gather*", "equation", "equation*"];
const MATRICES = new Map([
  ["matrix", ""], ["smallmatrix", ""], ["array", ""], ["cases", "{"], ["pmatrix", "()"], ["bmatrix", "[]"], ["Bmatrix", "{}"],
]);

const TOKEN = /\\(?:[A-Za-z]+|[^A-Za-z])|[^]/uy;
const NUMBER = /\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+/y;
const WORD = /[^\p{ASCII}\s\p{P}\p{S}]+/uy; // such as Chinese: its letters stay together
const TEXT = /\s*\{((?:[^{}\\$]|\\[^A-Za-z])*)\}/y;
const PLAIN_NAME = /\s*\{([A-Za-z0-9 ]*)\}/y;

const matchAt = (pattern, text, at) => { pattern.lastIndex = at; return pattern.exec(text); };

class Unknown extends Error {}

// input: {text, at, depth, isDisplay}. The next token, "" at the end.
const peek = input => {
  input.at += matchAt(/\s*/y, input.text, input.at)[0].length;
  return matchAt(TOKEN, input.text, input.at)?.[0] ?? "";
};
const take = (input, pattern = null) => {
  if (!pattern) {
    const token = peek(input);
    input.at += token.length;
    return token;
  }
  const found = matchAt(pattern, input.text, input.at);
  if (!found) throw new Unknown();
  input.at += found[0].length;
  return found[1] ?? found[0];
};

const operator = (sign, attributes = {}) => ["mo", attributes, [sign]];
const space = width => ["mspace", { width }, []];
const group = nodes => nodes.length === 1 ? nodes[0] : ["mrow", {}, nodes];

// The nodes before one of the tokens `ends`, which is taken.
const row = (input, ends) => {
  const nodes = [];
  while (!ends.includes(peek(input))) nodes.push(scripted(input, nodes));
  return [nodes, take(input)];
};

const argument = input => {
  const { isDisplay } = input, token = peek(input);
  input.isDisplay = false;
  const node = /^\d$/.test(token) ? ["mn", {}, [take(input)]] : atom(input, []);
  input.isDisplay = isDisplay;
  return node;
};

// A base with what stands below and above it.
const scripted = (input, before) => {
  const base = atom(input, before), above = [], below = [];
  for (let token = peek(input); token; token = peek(input)) {
    if (token === "'") { take(input); above.push(operator("′")); }
    else if (token === "^" && above.every(node => node[0] === "mo")) { take(input); above.push(argument(input)); }
    else if (token === "_" && !below.length) { take(input); below.push(argument(input)); }
    else if (["\\limits", "\\nolimits"].includes(token)) take(input);
    else break;
  }
  if (!above.length && !below.length) return base;
  const isUnder = input.isDisplay && base[0] === "mo" && UNDER.has(base[2][0]);
  const tag = `m${below.length ? isUnder ? "under" : "sub" : ""}${above.length ? isUnder ? "over" : "sup" : ""}`;
  return [tag, {}, [base, ...(below.length ? [group(below)] : []), ...(above.length ? [group(above)] : [])]];
};

// Whether a sign such as − stands before a number, and not between two.
const isPrefix = before => {
  const last = before.findLast(node => node[0] !== "mspace");
  return !last || (last[0] === "mo" && !")]}!|′".includes(last[2][0]));
};

const atom = (input, before) => {
  if (++input.depth > MAX_DEPTH) throw new Unknown();
  const node = atomHere(input, before);
  input.depth--;
  return node;
};

const atomHere = (input, before) => {
  const token = peek(input);
  if (/^[\d.]/.test(token)) {
    const number = matchAt(NUMBER, input.text, input.at);
    if (number) return ["mn", {}, [take(input, NUMBER).replace(/[{}]/g, "")]];
  }
  if (matchAt(WORD, input.text, input.at)) return ["mtext", {}, [take(input, WORD)]];
  if (token === "^" || token === "_") return ["mrow", {}, []];
  take(input);
  if (token.length > 1 && token[0] === "\\") return command(input, token.slice(1), before);
  if (/^[A-Za-z]$/.test(token)) return ["mi", {}, [token]];
  if (token === "{") return group(row(input, ["}"])[0]);
  if ("-+±∓".includes(token) && token) return operator(token.replace("-", "−"), isPrefix(before) ? { form: "prefix" } : {});
  if ("()[]".includes(token) && token) return operator(token, { stretchy: "false" });
  if ("|/".includes(token) && token) return operator(token, { stretchy: "false", lspace: "0", rspace: "0" });
  if (token === "~") return space(".33em");
  if ("%$#@\"".includes(token) && token) return ["mtext", {}, [token]];
  if (/^[*=<>,;:!?.]$|^[^\p{ASCII}]$/u.test(token)) return operator(token.replace("*", "∗"));
  throw new Unknown();
};

// A delimiter that grows with what it holds; `.` is none.
const fence = input => {
  const token = take(input);
  if (token === ".") return space("0");
  const sign = "()[]|/<>".includes(token) ? token : FENCES.get(token.slice(1));
  if (!sign) throw new Unknown();
  return operator(sign, { stretchy: "true" });
};

const texted = input => take(input, TEXT).replace(/\\(.)/g, "$1").replace(/ /g, "\u00a0");
// A name such as km is upright; anything else is a formula.
const upright = className => input => matchAt(PLAIN_NAME, input.text, input.at)
  ? ["mtext", className ? { class: className } : {}, [take(input, PLAIN_NAME).replace(/ /g, "\u00a0")]] : argument(input);
const drawnAround = className => input => ["mrow", { class: className }, [argument(input)]];
const fraction = attributes => input => ["mfrac", attributes, [argument(input), argument(input)]];
const named = (name, input, before) => {
  const isTight = /^[([]$|^\\left$/.test(peek(input));
  return operator(name, { lspace: isPrefix(before) ? "0" : ".17em", rspace: isTight ? "0" : ".17em" });
};

const COMMANDS = new Map(Object.entries({
  frac: fraction({}), tfrac: fraction({}), dfrac: fraction({ displaystyle: "true" }), cfrac: fraction({ displaystyle: "true" }),
  binom: input => ["mrow", {}, [operator("("), fraction({ linethickness: "0" })(input), operator(")")]],
  sqrt: input => {
    if (peek(input) !== "[") return ["msqrt", {}, [argument(input)]];
    take(input);
    const index = group(row(input, ["]"])[0]);
    return ["mroot", {}, [argument(input), index]];
  },
  boxed: drawnAround("boxed"), fbox: input => ["mtext", { class: "boxed" }, [texted(input)]],
  overline: drawnAround("overline"), underline: drawnAround("underline"),
  text: input => ["mtext", {}, [texted(input)]], mbox: input => ["mtext", {}, [texted(input)]],
  textrm: input => ["mtext", {}, [texted(input)]], textit: input => ["mtext", {}, [texted(input)]],
  textbf: input => ["mtext", { class: "bold" }, [texted(input)]],
  mathrm: upright(""), mathit: upright(""), mathsf: upright(""), mathtt: upright(""), mathbf: upright("bold"),
  boldsymbol: upright("bold"), bm: upright("bold"),
  mathbb: input => {
    const sign = BOARD.get(take(input, PLAIN_NAME));
    if (!sign) throw new Unknown();
    return ["mi", {}, [sign]];
  },
  operatorname: (input, before) => {
    if (peek(input) === "*") take(input);
    return named(take(input, PLAIN_NAME), input, before);
  },
  left: input => {
    const open = fence(input), [nodes] = row(input, ["\\right"]);
    return ["mrow", {}, [open, ...nodes, fence(input)]];
  },
  begin: input => environment(input),
}));

const command = (input, name, before) => {
  if (COMMANDS.has(name)) return COMMANDS.get(name)(input, before);
  if (LETTERS.has(name)) return ["mi", {}, [LETTERS.get(name)]];
  if (CAPITALS.has(name)) return ["mi", { mathvariant: "normal" }, [CAPITALS.get(name)]];
  if (FUNCTIONS.has(name)) return named(name, input, before);
  if (name === "pm" || name === "mp") return operator(OPERATORS.get(name), isPrefix(before) ? { form: "prefix" } : {});
  if (OPERATORS.has(name)) return operator(OPERATORS.get(name));
  if (FENCES.has(name)) return operator(FENCES.get(name), { stretchy: "false" });
  if (ACCENTS.has(name)) return ["mover", { accent: "true" }, [argument(input), operator(ACCENTS.get(name))]];
  if (SPACES.has(name)) return space(SPACES.get(name));
  if ("%$#&_".includes(name)) return ["mtext", {}, [name]];
  if (!name.trim()) return space(".25em");
  if (/^[bB]igg?[lrm]?$/.test(name)) return fence(input);
  throw new Unknown();
};

// Rows of cells before the token `end`, which is taken.
const table = (input, end) => {
  const rows = [[]];
  for (;;) {
    const [nodes, by] = row(input, ["&", "\\\\", end]);
    rows.at(-1).push(nodes);
    if (by === end) break;
    if (by === "\\\\") {
      take(input, /(?:\s*\[[^\]]*\])?/y);
      rows.push([]);
    }
  }
  if (rows.length > 1 && rows.at(-1).length === 1 && !rows.at(-1)[0].length) rows.pop();
  return rows;
};

// aligns: of columns, as in "rl"; columns behind repeat them
const tableNode = (rows, aligns, attributes) => ["mtable", attributes, rows.map(cells =>
  ["mtr", {}, cells.map((nodes, i) => {
    const align = { l: "left", r: "right" }[aligns[i % (aligns.length || 1)]];
    return ["mtd", align ? { class: align } : {}, nodes];
  })])];

const LINES = { class: "lines", displaystyle: "true" };
const environment = input => {
  const name = take(input, /\s*\{([A-Za-z]+\*?)\}/y);
  const given = name === "array" ? take(input, /\s*\{([lcr| ]*)\}/y).replace(/[| ]/g, "") : "";
  const rows = table(input, "\\end");
  if (take(input, /\s*\{([A-Za-z]+\*?)\}/y) !== name) throw new Unknown();
  if (ALIGNED.includes(name)) return tableNode(rows, "rl", LINES);
  if (CENTERED.includes(name)) return tableNode(rows, "", LINES);
  if (!MATRICES.has(name)) throw new Unknown();
  const [open, close] = MATRICES.get(name), made = tableNode(rows, name === "cases" ? "l" : given, {});
  const fenced = sign => sign ? [operator(sign, { stretchy: "true" })] : [];
  return ["mrow", {}, [...fenced(open), made, ...fenced(close)]];
};

// A formula as a node; null where a part of it is unknown.
const latexNode = (text, isDisplay) => {
  if (!text.trim() || text.length > MAX_FORMULA) return null;
  try {
    const rows = table({ text, at: 0, depth: 0, isDisplay }, "");
    const nodes = rows.length === 1 && rows[0].length === 1 ? rows[0][0] : [tableNode(rows, "rl", LINES)];
    return ["math", { alttext: text.trim(), ...(isDisplay ? { display: "block" } : {}) }, nodes];
  } catch (error) {
    if (error instanceof Unknown) return null;
    throw error;
  }
};
