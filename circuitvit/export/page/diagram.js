/* The diagram: boxes, dots and curves, drawn once where the layout has them; `rows.js` moves them up and down. */

const svg = document.getElementById("circuit");

/** An SVG element; text goes in as text, so a name can never be markup. */
function draw(tag, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function drawEdge(edge, parent) {
  edge.element = draw("path", { d: edge.path, class: "edge " + edge.sign, "stroke-width": edge.width, "stroke-opacity": edge.opacity }, parent);
  if (DATA.dashes[edge.group]) edge.element.setAttribute("stroke-dasharray", DATA.dashes[edge.group]);
  edge.element.edge = edge;
}

/** The mark where edges enter: a disc for queries, a square for keys, an arrow head for all others. */
function markPath(port, x, y) {
  if (port === "q") return `M${x - 3.4} ${y + 3.4}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z`;
  if (port === "k") return `M${x - 3} ${y}h6v6h-6Z`;
  return `M${x - 4} ${y + 6}L${x} ${y}L${x + 4} ${y + 6}Z`;
}

function drawNode(node, parent) {
  if (node.dot) {
    node.mark = draw("circle", { class: "dot", cx: node.dot[0], cy: node.dot[1], r: 1.7 }, parent);
    draw("title", {}, node.mark, node.name + " (outside the circuit)");
    return;
  }
  const [x, y, width, height] = node.box, middle = x + width / 2;
  node.element = draw("g", { class: "node " + node.kind, role: "button", tabindex: "-1" }, parent);
  node.element.node = node;
  draw("rect", { class: "box", x, y, width, height, rx: node.kind === "mlp" ? 10 : 4 }, node.element);
  node.bar = draw("rect", { class: "bar", x: x + 3, y: y + 1.5, width: 0, height: 3, rx: 1.5 }, node.element);
  const line = y + (node.kind === "head" || node.thumb || node.label ? 16 : height / 2 + 4);
  draw("text", { class: "name", x: middle, y: line }, node.element, shortened(node.name, width));
  if (node.label) draw("text", { class: "said", x: middle, y: line + 11.5 }, node.element, shortened(node.label, width * 1.25));
  if (node.thumb) {
    const [wide, high] = node.thumb, place = { x: middle - wide / 2, y: y + (node.label ? 33 : 21), width: wide, height: high };
    node.image = draw("image", { ...place, preserveAspectRatio: "none" }, node.element);
    draw("rect", { class: "frame", ...place }, node.element);
  }
  for (const [port, at, used] of node.ports) {
    if (node.kind === "head") draw("text", { class: used ? "port used" : "port", x: at, y: y + height - 4 }, node.element, port);
    if (used) draw("path", { class: "mark", d: markPath(port, at, y + height) }, node.element);
  }
}

/** A name that fits its box; the whole of it is in the details. */
function shortened(name, width) {
  const letters = Math.max(4, Math.floor(width / 6.4));
  return name.length <= letters ? name : name.slice(0, letters - 1) + "\u2026";
}

/** The same node as a line of its name, for where its layers are folded. */
function drawChip(node) {
  const [x, y, width, height] = node.box, chip = draw("g", { class: "chip" }, node.element);
  const wide = Math.min(width, 64), left = x + (width - wide) / 2, top = y + (height - FOLDED) / 2;
  draw("rect", { class: "box", x: left, y: top, width: wide, height: FOLDED, rx: 4 }, chip);
  node.chipBar = draw("rect", { class: "bar", x: left + 2, y: top + FOLDED - 3.5, width: 0, height: 2.5, rx: 1 }, chip);
  draw("text", { class: "name", x: x + width / 2, y: top + 11 }, chip, shortened(node.name, wide + 14));
  node.room = [width - 6, wide - 4];
}

/** Bars as long as the share of all effects in the edges of a node that are shown. */
function sayStrengths() {
  const sums = new Float64Array(nodes.length);
  for (const edge of edges) if (view.live[edge.id]) for (const end of [edge.from, edge.to]) sums[end] += strength(edge);
  const most = Math.max(...sums, 1e-30);
  for (const node of nodes) {
    if (!node.element) continue;
    node.bar.setAttribute("width", ((node.room[0] * sums[node.id]) / most).toFixed(1));
    node.chipBar.setAttribute("width", ((node.room[1] * sums[node.id]) / most).toFixed(1));
  }
}

const layers = {}; // of the drawing, from the back to the front

function drawCircuit() {
  for (const [name, hidden] of [["back", false], ["bundles", true], ["lines", true], ["boxes", false]])
    layers[name] = draw("g", hidden ? { "aria-hidden": "true" } : {}, svg);
  edges.forEach((edge) => drawEdge(edge, layers.lines));
  for (const node of nodes) {
    drawNode(node, layers.boxes);
    if (node.box) drawChip(node);
  }
}

/* Zoom */

let zoom = 1;

function setZoom(value) {
  zoom = Math.min(4, Math.max(0.2, value));
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  svg.setAttribute("width", width * zoom);
  svg.setAttribute("height", height * zoom);
}

/** As large as there is room for, all of it while only nodes are shown; but not too small to read. */
function fitZoom(least) {
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number), box = document.getElementById("diagram");
  const wide = (box.clientWidth - 24) / width, high = state.allEdges ? Infinity : (box.clientHeight - 20) / height;
  setZoom(Math.max(least, Math.min(1.7, wide, Math.max(1, high))));
  box.scrollLeft = (box.scrollWidth - box.clientWidth) / 2;
}
