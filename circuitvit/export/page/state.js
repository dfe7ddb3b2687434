/* What is chosen, and what follows from it: which edges are shown, alive, in focus, highlighted. */

const state = {
  allEdges: false, // or only those of what is in focus or pointed at
  shown: edges.length, // how many of the strongest edges
  side: MAPS ? Object.keys(MAPS.sides)[0] : null,
  kind: "pattern",
  query: null, // token whose attention is shown; null for the class token
  focus: null, // {node}, {edge} or {bundle}
  hover: null,
  matches: null, // of the search: {nodes, edges}, two sets of ids
  hiddenGroups: new Set(),
  hiddenPorts: new Set(),
};

/** Results of the last update, read by the panel and by the tests. */
const view = { allowed: new Uint8Array(edges.length), live: new Uint8Array(edges.length), nodes: new Set(), focus: null, bundles: [] };

const edgeClasses = new Array(edges.length).fill("");
const nodeClasses = new Array(nodes.length).fill("");

function allowedEdges() {
  const first = edges.length - state.shown;
  return Uint8Array.from(edges, (edge, id) =>
    Number(id >= first && !state.hiddenGroups.has(edge.group) && !state.hiddenPorts.has(edge.port)));
}

/** Everything again after the threshold, a filter or the focus has changed. */
function update() {
  view.allowed = allowedEdges();
  view.live = liveEdges(view.allowed);
  view.focus = state.focus ? edgesOf(state.focus) : null;
  view.nodes = new Set();
  for (const edge of edges) if (view.live[edge.id]) view.nodes.add(edge.from).add(edge.to);
  paint();
  drawBundles();
  sayStrengths();
  sayCounts();
}

/** The edges that go with what is in focus: where all are drawn, those on paths through it, else its own. */
function edgesOf({ node, edge, bundle }) {
  if (bundle) return Uint8Array.from(edges, (each) => Number(view.live[each.id] && bundle.edges.includes(each)));
  if (state.allEdges) return edgesThrough(view.live, { node, edge });
  return Uint8Array.from(edges, (each) => Number(view.live[each.id] && (each === edge || (node && (each.from === node.id || each.to === node.id)))));
}

/** Gives elements their classes; only what has changed touches the document, as there may be thousands. */
function paint() {
  const inFocus = new Set(state.focus && state.focus.node ? [state.focus.node.id] : []);
  if (view.focus) edges.forEach((edge) => view.focus[edge.id] && inFocus.add(edge.from).add(edge.to));
  for (const edge of edges) setClass(edge, edgeClasses, edgeClass(edge));
  for (const node of nodes) if (node.element) setClass(node, nodeClasses, nodeClass(node, inFocus));
}

function setClass(item, before, text) {
  if (before[item.id] === text) return;
  before[item.id] = text;
  item.element.setAttribute("class", text);
}

function edgeClass(edge) {
  const opened = state.allEdges || (view.focus && view.focus[edge.id]) || isHot(edge);
  if (!view.allowed[edge.id] || !opened) return "edge off";
  let text = "edge " + edge.sign;
  if (!view.live[edge.id]) text += " dead";
  if (state.focus && state.focus.edge === edge) text += " picked";
  if (isHot(edge)) return text + " hot";
  return view.focus && !view.focus[edge.id] ? text + " dim" : text;
}

function isHot(edge) {
  if (state.matches && state.matches.edges.has(edge.id)) return true;
  const { hover } = state;
  return hover !== null && (hover.edge === edge || (hover.bundle !== undefined && hover.bundle.edges.includes(edge)) || (hover.node !== undefined && (edge.from === hover.node.id || edge.to === hover.node.id)));
}

function nodeClass(node, inFocus) {
  let text = "node " + node.kind + (isFolded(node.row) ? " folded" : "");
  if (!view.nodes.has(node.id)) text += " off";
  if (state.focus && state.focus.node === node) text += " picked";
  else if (state.focus && !inFocus.has(node.id)) text += " dim";
  const hot = state.hover && (state.hover.node === node || (state.hover.edge && (state.hover.edge.from === node.id || state.hover.edge.to === node.id)));
  if (hot || (state.matches && state.matches.nodes.has(node.id))) text += " hot";
  return text;
}

const count = (marks) => marks.reduce((sum, mark) => sum + mark, 0);
const plural = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

/** The live counts: sizes are those of the edges on a path from input to logits. */
function sayCounts() {
  const live = count(view.live), dead = count(view.allowed) - live, weakest = edges[edges.length - state.shown];
  let text = `${plural(live, "edge")}, ${plural(view.nodes.size, "node")}`;
  if (weakest && weakest.score !== null) text += `, ${DATA.measure === "effect" ? "|effect|" : "share"} \u2265 ${say(Math.abs(weakest.score))}`;
  if (dead) text += ` (and ${dead.toLocaleString("en")} on no path from input to logits)`;
  document.getElementById("counts").textContent = text;
  document.getElementById("threshold").setAttribute("aria-valuetext", text);
  sayFaithfulness(live);
}

/* The curve of faithfulness */

/** Faithfulness at a size, between the sizes that were measured; null outside them. */
function faithfulnessAt(size) {
  const curve = DATA.curve, above = curve.findIndex(([measured]) => measured >= size);
  if (above < 0 || (above === 0 && curve[0][0] !== size)) return null;
  const [high, end] = curve[above];
  if (high === size) return { value: end, exact: true };
  const [low, start] = curve[above - 1];
  return { value: start + ((end - start) * (size - low)) / (high - low), exact: false };
}

function sayFaithfulness(size) {
  if (!DATA.curve.length) return;
  const found = faithfulnessAt(size), box = document.getElementById("faithfulness");
  box.textContent = found ? `faithfulness ${found.exact ? "" : "\u2248 "}${found.value.toFixed(2)}` : "faithfulness not measured here";
  drawCurve(found ? [size, found.value] : null);
}

function drawCurve(here) {
  const chart = document.getElementById("curve"), width = 120, height = 30;
  const most = Math.max(...DATA.curve.map(([size]) => size), 1), values = DATA.curve.map(([, value]) => value);
  const low = Math.min(0, ...values), high = Math.max(1, ...values);
  const x = (size) => ((width * size) / most).toFixed(1), y = (value) => (height - (height * (value - low)) / (high - low)).toFixed(1);
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren();
  draw("path", { class: "one", d: `M0 ${y(1)}H${width}` }, chart);
  draw("path", { d: "M" + DATA.curve.map(([size, value]) => `${x(size)} ${y(value)}`).join("L") }, chart);
  if (here) draw("circle", { cx: x(here[0]), cy: y(here[1]), r: 3.5 }, chart);
}
