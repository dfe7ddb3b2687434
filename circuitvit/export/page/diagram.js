/* The diagram: every box, dot and curve at the place that the layout gave it. */

const MARGIN = { left: 58, top: 12, right: 12, bottom: 30 };
const svg = document.getElementById("circuit");

/** An SVG element; text goes in as text, so a name can never be markup. */
function draw(tag, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function drawBackground() {
  const [width, height] = DATA.size, group = draw("g", { "aria-hidden": "true" }, svg);
  DATA.stripes.forEach(([block, top, bottom], index) => {
    if (index % 2 === 0)
      draw("rect", { class: "stripe", x: -MARGIN.left, y: top, width: width + MARGIN.left + MARGIN.right, height: bottom - top }, group);
    draw("text", { class: "label", x: 6 - MARGIN.left, y: (top + bottom) / 2 + 4 }, group, block);
  });
  for (const [name, x] of DATA.columns)
    draw("text", { class: "label", x, y: height + 18, "text-anchor": "middle" }, group, name);
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
    const dot = draw("circle", { class: "dot", cx: node.dot[0], cy: node.dot[1], r: 1.7 }, parent);
    draw("title", {}, dot, node.name + " (outside the circuit)");
    return;
  }
  const [x, y, width, height] = node.box, middle = x + width / 2;
  node.element = draw("g", { class: "node " + node.kind, role: "button", tabindex: "-1" }, parent);
  node.element.node = node;
  draw("rect", { class: "box", x, y, width, height, rx: node.kind === "mlp" ? 10 : 4 }, node.element);
  const line = y + (node.kind === "head" || node.thumb ? 16 : height / 2 + 4);
  draw("text", { class: "name", x: middle, y: line }, node.element, shortened(node.name, width));
  if (node.thumb) {
    const [wide, high] = node.thumb, place = { x: middle - wide / 2, y: y + 21, width: wide, height: high };
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

function drawCircuit() {
  const [width, height] = DATA.size;
  const box = [-MARGIN.left, -MARGIN.top, width + MARGIN.left + MARGIN.right, height + MARGIN.top + MARGIN.bottom];
  svg.setAttribute("viewBox", box.join(" "));
  drawBackground();
  const lines = draw("g", { "aria-hidden": "true" }, svg), boxes = draw("g", {}, svg);
  edges.forEach((edge) => drawEdge(edge, lines));
  nodes.forEach((node) => drawNode(node, boxes));
}

/* Zoom */

let zoom = 1;

function setZoom(value) {
  zoom = Math.min(4, Math.max(0.2, value));
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  svg.setAttribute("width", width * zoom);
  svg.setAttribute("height", height * zoom);
}

/** As wide as there is room, but neither huge nor too small to read. */
function fitZoom(least) {
  const [, , width] = svg.getAttribute("viewBox").split(" ").map(Number);
  setZoom(Math.max(least, Math.min(1.15, (document.getElementById("diagram").clientWidth - 24) / width)));
}
