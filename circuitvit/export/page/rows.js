/* Where rows and columns are. With every edge shown they are as far apart as the layout has them, for the curves
   between them; else they move together. A block of layers can be folded: then each of its rows is a line of names. */

const FOLDED = 17; // height of a row of a folded block
const ROW_GAPS = { folded: 4, near: 20, between: 16 };
const LANES = { boxes: 16, dots: 36, outer: 12, narrow: 40 }; // between columns; a dot is narrow, its label is not
const MANY_LAYERS = 6; // up to so many, each is a block of its own
const BLOCK = 4; // layers in a block otherwise
const SMALL = matchMedia("(max-width: 860px)").matches;
const MARGIN = { left: SMALL ? 84 : 92, top: 14, lane: SMALL ? 88 : 128, right: 12, bottom: 30 };

/** Consecutive layers as blocks, from the input up: {name, layers, rows, folded}. */
const blocks = (() => {
  const found = [...new Set(DATA.rowBlocks.filter((name) => name !== null))];
  const numbered = found.filter((name) => /^layer \d+$/.test(name)), others = found.filter((name) => !numbered.includes(name));
  const size = numbered.length > MANY_LAYERS ? BLOCK : 1, chunks = [];
  for (let at = 0; at < numbered.length; at += size) chunks.push(numbered.slice(at, at + size));
  return [...chunks, ...others.map((name) => [name])].map((names) => ({
    name: names.length === 1 ? names[0] : `layers ${names[0].slice(6)}\u2013${names[names.length - 1].slice(6)}`,
    layers: names,
    rows: DATA.rows.map((_, row) => row).filter((row) => names.includes(DATA.rowBlocks[row])),
    folded: false,
  }));
})();
const blockOfRow = DATA.rows.map((_, row) => blocks.find((block) => block.rows.includes(row)) ?? null);
const isFolded = (row) => blockOfRow[row] !== null && blockOfRow[row].folded;
const rowNodes = DATA.rows.map((_, row) => nodes.filter((node) => node.row === row && node.box));

/** A deep model starts folded: all of it at a glance. */
function foldDeep() {
  const deep = blocks.some((block) => block.layers.length > 1);
  for (const block of blocks) block.folded = deep;
}

/** Pairs of where something is in the layout and where it is now, upwards: of heights, and of what is across. */
let heights = [], across = [];

function findRows() {
  let y = 0;
  heights = [];
  for (let row = DATA.rows.length - 1; row >= 0; row--) {
    const [top, bottom] = DATA.rows[row];
    if (row + 1 < DATA.rows.length) y += gapAbove(row, top - DATA.rows[row + 1][1]);
    heights.push([top, y]);
    y += isFolded(row) ? (rowNodes[row].length ? FOLDED : 2) : bottom - top;
    heights.push([bottom, y]);
  }
}

/** Left and right of each column: of boxes and dots that overlap. */
const columns = (() => {
  const spans = nodes.map((node) => (node.box ? [node.box[0], node.box[0] + node.box[2]] : [node.dot[0] - 3.5, node.dot[0] + 3.5]));
  const found = [];
  for (const [left, right] of spans.sort((one, other) => one[0] - other[0])) {
    const last = found[found.length - 1];
    if (last && left <= last[1]) last[1] = Math.max(last[1], right);
    else found.push([left, right]);
  }
  return found;
})();

function findColumns() {
  let x = 0, before = 0;
  across = [[0, 0]];
  columns.forEach(([left, right], index) => {
    const narrow = [columns[index - 1], columns[index]].some((column) => column && column[1] - column[0] < LANES.narrow);
    const least = index === 0 ? LANES.outer : narrow ? LANES.dots : LANES.boxes;
    x += state.allEdges ? left - before : Math.min(left - before, least);
    across.push([left, x], [right, (x += right - left)]);
    before = right;
  });
  across.push([DATA.size[0], x + (state.allEdges ? DATA.size[0] - before : Math.min(DATA.size[0] - before, LANES.outer))]);
}

function gapAbove(row, drawn) {
  const block = blockOfRow[row], other = blockOfRow[row + 1];
  if (block !== null && block === other && block.folded) return ROW_GAPS.folded;
  if (state.allEdges) return drawn;
  return Math.min(drawn, block === other ? ROW_GAPS.near : ROW_GAPS.near + ROW_GAPS.between);
}

/** Where something of the layout is now, by the pairs around it. */
function place(at, pairs = heights) {
  let end = 1;
  while (end < pairs.length - 1 && pairs[end][0] < at) end++;
  const [[low, from], [high, to]] = [pairs[end - 1], pairs[end]];
  return high === low ? from : from + ((at - low) * (to - from)) / (high - low);
}

/** A curve of the layout where it is now. */
function placed(path) {
  const moved = (at, pairs) => Math.round(10 * place(at, pairs)) / 10;
  return path.replace(/([MVCH])([^MVCH]+)/g, (_, letter, numbers) =>
    letter + numbers.split(" ").map((at, index) => moved(Number(at), letter === "V" || (letter !== "H" && index % 2) ? heights : across)).join(" "));
}

/** Puts everything in its place, after a block was folded or all edges were asked for. */
function arrange() {
  findRows();
  findColumns();
  const asLaidOut = state.allEdges && !blocks.some((block) => block.folded);
  for (const edge of edges) edge.element.setAttribute("d", asLaidOut ? edge.path : placed(edge.path));
  for (const node of nodes) {
    const [top, bottom] = DATA.rows[node.row], x = node.dot ? node.dot[0] : node.box[0] + node.box[2] / 2;
    const down = (place(top) + place(bottom) - top - bottom) / 2, right = place(x, across) - x;
    (node.element ?? node.mark).setAttribute("transform", `translate(${right.toFixed(1)} ${down.toFixed(1)})`);
    if (node.mark) node.mark.toggleAttribute("hidden", isFolded(node.row));
  }
  const width = drawnWidth(), height = drawnHeight(), right = state.allEdges ? MARGIN.right : MARGIN.lane;
  svg.setAttribute("viewBox", [-MARGIN.left, -MARGIN.top, width + MARGIN.left + right, height + MARGIN.top + MARGIN.bottom].join(" "));
  drawBackground(width, height, right);
  setZoom(zoom);
}

const drawnWidth = () => across[across.length - 1][1], drawnHeight = () => heights[heights.length - 1][1];

/** Stripes of blocks, with a button to fold each and the names of its layers, and the names of columns. */
function drawBackground(width, height, right) {
  const focused = document.activeElement && document.activeElement.block;
  layers.back.replaceChildren();
  [...blocks].reverse().forEach((block, index) => {
    const [top, bottom] = [place(DATA.rows[Math.max(...block.rows)][0]) - 7, place(DATA.rows[block.rows[0]][1]) + 7];
    if (index % 2 === 0)
      draw("rect", { class: "stripe", x: -MARGIN.left, y: top, width: width + MARGIN.left + right, height: bottom - top, "aria-hidden": "true" }, layers.back);
    const button = drawFold(block, top);
    if (block === focused) button.focus();
    if (!block.folded && block.layers.length > 1)
      for (const layer of block.layers) {
        const rows = block.rows.filter((row) => DATA.rowBlocks[row] === layer);
        const middle = (place(DATA.rows[rows[rows.length - 1]][0]) + place(DATA.rows[rows[0]][1])) / 2;
        draw("text", { class: "label", x: 22 - MARGIN.left, y: Math.max(middle + 4, top + 34), "aria-hidden": "true" }, layers.back, layer);
      }
  });
  for (const [name, x] of DATA.columns)
    draw("text", { class: "label", x: place(x, across), y: height + 20, "text-anchor": "middle", "aria-hidden": "true" }, layers.back, name);
}

function drawFold(block, top) {
  const inside = block.rows.reduce((sum, row) => sum + rowNodes[row].length, 0);
  const said = `${block.name}, ${plural(inside, "node")}`;
  const button = draw("g", { class: "fold", role: "button", tabindex: "0", "aria-expanded": String(!block.folded), "aria-label": said }, layers.back);
  draw("rect", { x: 2 - MARGIN.left, y: top + 3, width: MARGIN.left - 8, height: 19, rx: 5 }, button);
  draw("text", { x: 7 - MARGIN.left, y: top + 16.5 }, button, (block.folded ? "\u25b8 " : "\u25be ") + shortened(block.name, 80));
  button.block = block;
  return button;
}

function fold(block) {
  block.folded = !block.folded;
  rearrange();
}

/** After rows have moved: classes and connections follow. */
function rearrange() {
  arrange();
  update();
  sayAbout();
  const anyOpen = blocks.some((block) => !block.folded);
  document.getElementById("fold-all").textContent = anyOpen ? "Fold layers" : "Unfold layers";
}
