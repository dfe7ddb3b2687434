/* What is said of a node or an edge: in the panel, beside the pointer, and to screen readers. */

const about = document.getElementById("about");
const tip = document.getElementById("tip");
const PORT_WORDS = { q: "query", k: "key", v: "value" };

const strength = (edge) => Math.abs(edge.score ?? 0);
const strongestFirst = (list) => [...list].sort((a, b) => strength(b) - strength(a) || a.id - b.id);
const liveOnly = (list) => list.filter((edge) => view.live[edge.id]);
const shareOf = (list) => (TOTAL_EFFECT ? list.reduce((sum, edge) => sum + strength(edge), 0) / TOTAL_EFFECT : 0);
const percent = (share) => (100 * share).toPrecision(share >= 0.1 ? 3 : 2) + " %";

function effectOf(edge) {
  if (edge.score === null) return "not scored";
  const interval = edge.low === undefined ? "" : ` [${say(edge.low, true)}, ${say(edge.high, true)}]`;
  return say(edge.score, DATA.measure === "effect") + interval;
}

/** The kind of a node in words. */
function kindOf(node) {
  if (node.kind === "head") return `attention head, ${node.block}`;
  if (node.kind === "part") return `piece of an attention head, ${node.block}`;
  if (node.kind === "mlp") return node.block;
  return node.out.length ? "what enters the first layer" : "what the circuit explains";
}

function inputOf(edge) {
  return edge.port ? `${PORT_WORDS[edge.port] ?? edge.port} of ${nodes[edge.to].name}` : nodes[edge.to].name;
}

/** Facts as [word, value] pairs, for the tip and the panel alike. */
function factsOf({ node, edge, bundle }) {
  if (bundle) {
    const own = liveOnly(bundle.edges), facts = [["edges", own.length.toLocaleString("en")]];
    for (const sign of SIGNS) {
      const some = own.filter((each) => each.sign === sign);
      if (TOTAL_EFFECT && some.length) facts.push([sign, `${plural(some.length, "edge")}, ${percent(shareOf(some))} of all ${DATA.measure}s`]);
    }
    return facts;
  }
  if (edge) {
    const facts = [[DATA.measure, effectOf(edge)]];
    if (edge.score !== null) {
      facts.push(["meaning", DATA.meanings[edge.sign]]);
      if (DATA.measure === "effect") facts.push(["share", `${percent(shareOf([edge]))} of all effects`]);
      facts.push(["rank", `${(edges.length - edge.id).toLocaleString("en")} of ${edges.length.toLocaleString("en")}`]);
    }
    facts.push(["into", inputOf(edge)]);
    if (GROUPS > 1) facts.push(["tokens", DATA.groups[edge.group]]);
    return facts;
  }
  const into = liveOnly(node.into), out = liveOnly(node.out);
  const said = node.label ? [["label", node.label]] : [];
  const facts = [...said, ["edges", `${into.length} in, ${out.length} out`]];
  if (TOTAL_EFFECT) facts.push(["share", `${percent(shareOf([...into, ...out]))} of all ${DATA.measure}s`]);
  return facts;
}

/** The nearest nodes by the strength of the edges to them, such as "input, m3, a2.h0 and 4 more". */
function neighbourWords(list, end) {
  const names = [...new Set(strongestFirst(list).map((edge) => nodes[edge[end]].name))];
  if (!names.length) return "none";
  return names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
}

function neighboursOf({ node, edge, bundle }) {
  if (bundle) return [["strongest", strongestFirst(liveOnly(bundle.edges))[0].name]];
  if (node) return [["from", neighbourWords(liveOnly(node.into), "from")], ["to", neighbourWords(liveOnly(node.out), "to")]];
  const beside = liveOnly(nodes[edge.to].into).filter((other) => other !== edge && other.port === edge.port);
  return [["same input", neighbourWords(beside, "from")]];
}

const nameOf = (item) => (item.node ?? item.edge ?? item.bundle).name;

/* Beside the pointer */

function showTip(item, x, y) {
  tip.replaceChildren();
  make("strong", {}, nameOf(item), tip);
  if (item.node) make("div", { class: "muted" }, kindOf(item.node), tip);
  addFacts([...factsOf(item), ...neighboursOf(item)], tip);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - width - 6)) + "px";
  tip.style.top = Math.max(4, y + 18 + height > innerHeight ? y - height - 10 : y + 18) + "px";
}

function addFacts(facts, parent) {
  const list = make("dl", {}, undefined, parent);
  for (const [word, value] of facts) {
    make("dt", {}, word, list);
    make("dd", {}, value, list);
  }
}

/* In the panel */

/** A button for an edge, a node or a connection: pointing at it highlights, pressing it focuses. */
function linkTo(item, words, parent) {
  const button = make("button", { type: "button", class: "link" }, undefined, parent);
  make("span", {}, words, button);
  const { edge, bundle } = item;
  if (bundle) make("span", {}, plural(bundle.edges.length, "edge"), button);
  if (edge && edge.score !== null) make("span", { class: edge.sign + "-ink" }, say(edge.score, DATA.measure === "effect"), button);
  for (const [event, target] of [["pointerenter", item], ["focus", item], ["pointerleave", null], ["blur", null]])
    button.addEventListener(event, () => hover(target));
  button.addEventListener("click", () => focusOn(item));
  return button;
}

const LISTED = 30;

function addEdges(title, list, parent) {
  if (!list.length) return;
  make("h3", {}, `${title} (${list.length})`, parent);
  const lines = make("ul", {}, undefined, parent);
  for (const edge of strongestFirst(list).slice(0, LISTED)) linkTo({ edge }, edge.name, make("li", {}, undefined, lines));
  if (list.length > LISTED) make("p", { class: "muted" }, `and ${list.length - LISTED} weaker ones`, parent);
}

const CONNECTIONS = 8;

/** The strongest connections of layers, which the keyboard reaches here. */
function addBundles() {
  const strongest = view.bundles.slice(-CONNECTIONS).reverse();
  if (!strongest.length) return;
  make("h3", {}, "Strongest connections between layers", about);
  const lines = make("ul", {}, undefined, about);
  for (const bundle of strongest) linkTo({ bundle }, bundle.name, make("li", {}, undefined, lines));
}

/** The panel's card: what is in focus, or the strongest edges while nothing is. */
function sayAbout() {
  about.replaceChildren();
  const item = state.focus;
  if (!item) {
    make("h2", {}, "Nothing is in focus", about);
    const how = state.allEdges ? "Click a node or an edge to see the paths through it." : "Click a node or a connection to see its edges.";
    make("p", { class: "muted" }, how, about);
    if (!state.allEdges) addBundles();
    addEdges("Strongest edges", liveOnly(edges).slice(-8), about);
    return;
  }
  make("h2", {}, nameOf(item), about);
  if (item.node) make("p", { class: "muted" }, kindOf(item.node), about);
  addFacts(factsOf(item), about);
  if (state.allEdges && !item.bundle) make("p", { class: "muted" }, `${plural(count(view.focus), "edge")} on paths through it`, about);
  if (item.bundle) addEdges("Edges", liveOnly(item.bundle.edges), about);
  else if (item.node) {
    const strip = document.querySelector(`#unit-${nodes.indexOf(item.node)} .strip`);
    if (strip) {
      make("h3", {}, "Top images", about);
      about.append(strip.cloneNode(true));
    }
    addEdges("From", liveOnly(item.node.into), about);
    addEdges("To", liveOnly(item.node.out), about);
  } else {
    make("h3", {}, "Ends", about);
    for (const node of [nodes[item.edge.from], nodes[item.edge.to]]) linkTo({ node }, node.name, about);
    const beside = liveOnly(nodes[item.edge.to].into).filter((edge) => edge !== item.edge && edge.port === item.edge.port);
    addEdges("Others into the same input", beside, about);
  }
  const clear = make("button", { type: "button", id: "clear" }, "Clear focus (Esc)", about);
  clear.addEventListener("click", () => focusOn(null));
}

/* The legend */

function legendLine(words, paint) {
  const line = make("div", { class: "legend-line" }, undefined, document.getElementById("legend"));
  const sample = draw("svg", { width: 34, height: 14, "aria-hidden": "true" }, line);
  paint(sample);
  make("span", {}, words, line);
}

function sayLegend() {
  make("h2", {}, "Legend", document.getElementById("legend"));
  const line = (attributes) => (sample) => draw("path", { d: "M0 7h32", ...attributes }, sample);
  for (const sign of SIGNS.slice(1)) {
    if (edges.some((edge) => edge.sign === sign)) legendLine(DATA.meanings[sign], line({ class: sign, "stroke-width": 3 }));
  }
  if (DATA.measure === "share") legendLine(DATA.meanings.unscored, line({ class: "unscored", "stroke-width": 3 }));
  if (DATA.strongest) {
    for (const share of [1, 0.3])
      legendLine(DATA.measure + " " + say(DATA.strongest * share), line({ "stroke-width": Math.max(0.18, share) * DATA.maxWidth }));
  }
  legendLine("arc: all edges from one layer to another", (sample) => draw("path", { d: "M8 13C30 13 30 1 8 1", class: "supports", "stroke-width": 3 }, sample));
  if (DATA.strongest) legendLine(`bar: share of the ${DATA.measure}s that touch a node`, (sample) => draw("rect", { class: "bar", x: 1, y: 5, width: 24, height: 3, rx: 1.5 }, sample));
  const used = new Set(edges.map((edge) => edge.port));
  for (const port of Object.keys(PORT_WORDS).filter((port) => used.has(port)))
    legendLine(`${port}: ${PORT_WORDS[port]} input of a head`, (sample) => draw("path", { class: "mark", d: markPath(port, 16, 4) }, sample));
  if (GROUPS > 1)
    DATA.groups.forEach((group, index) => legendLine("tokens: " + group, line({ "stroke-width": 1.8, "stroke-dasharray": DATA.dashes[index] })));
  const part = `This page holds the ${edges.length} strongest of ${DATA.total} edges.`;
  if (edges.length < DATA.total) make("p", { class: "muted" }, part, document.getElementById("legend"));
}
