/* The image beside the diagram: clean or corrupt, with the attention of the chosen node over it. */

const KINDS = { pattern: "attention", score: "score", value: "value-weighted" };
const canvas = document.getElementById("image");
let pointed = null; // the patch under the pointer or the keyboard, {row, column}

/** The node whose map is shown: what is pointed at, else what is in focus; of an edge, its sender. */
function figureNode() {
  for (const item of [state.hover, state.focus]) {
    const node = item && (item.node ?? (item.edge && nodes[item.edge.from]));
    if (node && sides[state.side].nodes[node.name]) return node;
  }
  return null;
}

function tokenName(token) {
  if (token < MAPS.prefix.length) return MAPS.prefix[token] === "cls" ? "the class token" : `${MAPS.prefix[token]} token ${token}`;
  const said = sides[state.side] && sides[state.side].words[token];
  if (said) return `\u201c${said}\u201d`;
  const { row, column } = patchOf(token), [rows, columns] = MAPS.frame; // of a clip, frames lie side by side
  const frame = Math.floor(row / rows) * (MAPS.grid[1] / columns) + Math.floor(column / columns) + 1;
  const named = `patch row ${(row % rows) + 1}, column ${(column % columns) + 1}`;
  return String(MAPS.frame) === String(MAPS.grid) ? named : `frame ${frame}, ${named}`;
}

const queryName = () => (state.query !== null ? tokenName(state.query) : HAS_CLASS_TOKEN ? "the class token" : `the average ${sides[state.side].words.length ? "word" : "patch"}`);

function paintFigure() {
  if (!MAPS || !sides[state.side]) return;
  const { image } = sides[state.side], pen = canvas.getContext("2d");
  const node = figureNode(), map = node && mapOf(state.side, node.name, state.kind, state.query);
  canvas.width = canvas.height = 600;
  canvas.height = Math.round((600 * image.naturalHeight) / image.naturalWidth);
  pen.imageSmoothingEnabled = image.naturalWidth > 200;
  pen.drawImage(map ? sides[state.side].grey : image, 0, 0, canvas.width, canvas.height);
  if (map) {
    pen.globalAlpha = 0.45; // some colour of the image, so that it is recognised under the heat
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 1;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(heatOf(map, 0.85), 0, 0, canvas.width, canvas.height);
    inkOver(pen, sides[state.side]);
  }
  if (state.query !== null) outline(pen, patchOf(state.query), "#fff", "#6639ba");
  if (pointed) outline(pen, pointed, "#fff", "#000");
  sayFigure(node, map);
}

const patchOf = (token) => {
  const patch = token - MAPS.prefix.length;
  return { row: Math.floor(patch / MAPS.grid[1]), column: patch % MAPS.grid[1] };
};
const tokenOf = ({ row, column }) => MAPS.prefix.length + row * MAPS.grid[1] + column;

function outline(pen, { row, column }, outer, inner) {
  const width = canvas.width / MAPS.grid[1], height = canvas.height / MAPS.grid[0];
  for (const [colour, line] of [[outer, 8], [inner, 4]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(column * width, row * height, width, height);
  }
}

/** Words under the image: whose map it is, and the value at the patch that is pointed at. */
function sayFigure(node, map) {
  const caption = document.getElementById("caption"), patch = document.getElementById("patch");
  const said = sides[state.side].words.length > 0, cell = said ? "word" : "patch";
  if (!node) caption.textContent = `${state.side} ${said ? "sentence" : "image"}`;
  else if (!map) caption.textContent = `${node.name}: only the default query is kept in this page`;
  else caption.textContent = node.name + ": " + (/^(norm|activation)/.test(map.unit) ? map.unit : `${map.unit} of ${queryName()}`);
  canvas.setAttribute("aria-label", caption.textContent);
  const words = [];
  if (pointed) {
    const token = tokenOf(pointed);
    words.push(tokenName(token) + (map ? `: ${say(map.values[token])}` : ""));
    if (MAPS.groups.length) words.push(`tokens: ${DATA.groups[MAPS.groups[token]]}`);
  } else if (map) {
    MAPS.prefix.forEach((_, token) => words.push(`${tokenName(token)}: ${say(map.values[token])}`));
    words.push(`largest ${cell}: ${say(Math.max(...map.values.slice(MAPS.prefix.length)))}`);
  } else words.push(node ? `Click a ${cell} to see where it attends.` : `Point at a head to see its attention, click a ${cell} to see where it attends.`);
  patch.textContent = words.join(" \u00b7 ");
  const reset = document.getElementById("query-reset");
  reset.hidden = state.query === null;
  reset.textContent = HAS_CLASS_TOKEN ? "Back to the class token" : "Back to the average";
}

/** Thumbnails of all nodes, for the image, the kind and the query that are chosen. */
function paintThumbs() {
  if (!MAPS || !sides[state.side]) return;
  for (const node of nodes) {
    if (!node.image) continue;
    const map = mapOf(state.side, node.name, state.kind, state.query);
    node.image.setAttribute("opacity", map ? 1 : 0.3);
    if (map) node.image.setAttribute("href", thumbOf(state.side, map));
  }
}

/** The label that a screen reader says of each node, with what it attends to in words. */
function labelNodes() {
  for (const node of nodes) {
    if (!node.element) continue;
    const facts = factsOf({ node }).map(([word, value]) => `${word}: ${value}`);
    node.element.setAttribute("aria-label", [node.name, kindOf(node), ...facts].join(", "));
  }
}

async function choose(changes) {
  Object.assign(state, changes);
  if (state.query !== null) await unpackQueries(state.side);
  for (const [box, key] of [["sides", "side"], ["kinds", "kind"]])
    for (const button of document.getElementById(box).children)
      button.setAttribute("aria-pressed", String(button.dataset.value === state[key]));
  paintThumbs();
  paintFigure();
}

function addSegments(box, values, key) {
  for (const [value, words] of values) {
    const button = make("button", { type: "button", "data-value": value, "aria-pressed": "false" }, words, document.getElementById(box));
    button.addEventListener("click", () => choose({ [key]: value }));
  }
}

function patchAt(event) {
  const box = canvas.getBoundingClientRect(), [rows, columns] = MAPS.grid;
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  return { row: Math.max(0, Math.min(rows - 1, row)), column: Math.max(0, Math.min(columns - 1, column)) };
}

function chooseQuery(patch) {
  const token = tokenOf(patch);
  return choose({ query: token === state.query ? null : token });
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function imageKey(event) {
  const step = STEPS[event.key], [rows, columns] = MAPS.grid;
  if (step) {
    const from = pointed ?? { row: rows >> 1, column: columns >> 1 };
    const row = Math.max(0, Math.min(rows - 1, from.row + step[0]));
    pointed = { row, column: Math.max(0, Math.min(columns - 1, from.column + step[1])) };
    paintFigure();
  } else if ((event.key === "Enter" || event.key === " ") && pointed) chooseQuery(pointed);
  else return;
  event.preventDefault();
}

async function startFigure() {
  await unpackMaps();
  document.getElementById("figure").hidden = false;
  addSegments("sides", Object.keys(MAPS.sides).map((name) => [name, name]), "side");
  addSegments("kinds", Object.entries(KINDS), "kind");
  canvas.addEventListener("pointermove", (event) => { pointed = patchAt(event); paintFigure(); });
  canvas.addEventListener("pointerleave", () => { pointed = null; paintFigure(); });
  canvas.addEventListener("blur", () => { pointed = null; paintFigure(); });
  canvas.addEventListener("click", (event) => chooseQuery(patchAt(event)));
  canvas.addEventListener("keydown", imageKey);
  document.getElementById("query-reset").addEventListener("click", () => choose({ query: null }));
  await choose({});
}
