/* Wiring: from what the reader does to what is shown. */

function hover(item) {
  const same = nameless(item) === nameless(state.hover);
  state.hover = item;
  if (same) return;
  paint();
  paintBundles();
  paintFigure();
}

const nameless = (item) => (item ? item.node ?? item.edge ?? item.bundle.key : null);

/** Focus on a node, an edge or a connection of layers; on what is in focus already, or on null: clear. */
function focusOn(item) {
  state.focus = item && nameless(item) === nameless(state.focus) ? null : item;
  update();
  sayAbout();
  paintFigure();
  if (state.focus && state.focus.node) moveTo(state.focus.node);
}

/* The pointer */

/** What is at a point of the screen; edges are thin, so their surroundings count too. */
function itemAt(x, y) {
  const around = [[0, 0], [0, -3], [0, 3], [-3, 0], [3, 0], [-5, -5], [5, -5], [-5, 5], [5, 5]];
  for (const [dx, dy] of around) {
    const element = document.elementFromPoint(x + dx, y + dy);
    const owner = element && element.closest(".node, .edge, .bundle");
    if (owner && owner.bundle) return { bundle: owner.bundle };
    if (owner && owner.node) return { node: owner.node };
    if (owner && owner.edge) return { edge: owner.edge };
  }
  return null;
}

function startPointer() {
  svg.addEventListener("pointermove", (event) => {
    const item = itemAt(event.clientX, event.clientY);
    hover(item);
    if (item) showTip(item, event.clientX, event.clientY);
    else tip.hidden = true;
  });
  svg.addEventListener("pointerleave", () => { hover(null); tip.hidden = true; });
  svg.addEventListener("click", (event) => {
    const button = event.target.closest(".fold");
    if (button) fold(button.block);
    else focusOn(itemAt(event.clientX, event.clientY));
  });
}

/* The keyboard: one node can be reached with Tab, arrow keys go from it to its neighbours on the page */

let current = null;

function moveTo(node) {
  if (current) current.element.setAttribute("tabindex", "-1");
  current = node;
  node.element.setAttribute("tabindex", "0");
}

/** The nearest shown node in the direction of an arrow key, or null at the rim. */
function neighbour(node, key) {
  const [down, right] = STEPS[key], middle = (each) => [each.box[0] + each.box[2] / 2, each.box[1] + each.box[3] / 2];
  const [x, y] = middle(node);
  let best = null, least = Infinity;
  for (const other of nodes) {
    if (!other.box || other === node || !view.nodes.has(other.id)) continue;
    const [dx, dy] = [middle(other)[0] - x, middle(other)[1] - y];
    const along = down ? dy * down : dx * right, aside = Math.abs(down ? dx : dy);
    if (along <= 1 || (right && other.row !== node.row)) continue;
    const distance = along + 0.6 * aside;
    if (distance < least) [best, least] = [other, distance];
  }
  return best;
}

function nodeKey(event) {
  const owner = event.target.closest(".node, .fold");
  if (!owner) return;
  const pressed = event.key === "Enter" || event.key === " ";
  if (owner.block) {
    if (!pressed) return;
    fold(owner.block);
  } else if (event.key in STEPS) {
    const next = neighbour(owner.node, event.key);
    if (next) { moveTo(next); next.element.focus(); }
  } else if (pressed) focusOn({ node: owner.node });
  else return;
  event.preventDefault();
}

function startKeyboard() {
  const ends = nodes.filter((node) => node.element);
  if (ends.length) moveTo(ends[ends.length - 1]); // the logits: where reading a circuit begins
  const around = svg.parentElement; // an SVG that listens to focus would be a stop of its own
  around.addEventListener("keydown", nodeKey);
  around.addEventListener("focusin", (event) => {
    const owner = event.target.closest(".node");
    if (!owner || !owner.matches(":focus-visible")) return;
    const box = owner.getBoundingClientRect();
    hover({ node: owner.node });
    showTip({ node: owner.node }, box.right, box.top);
  });
  around.addEventListener("focusout", () => { hover(null); tip.hidden = true; });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    tip.hidden = true;
    endSearch();
    if (state.focus) focusOn(null);
  });
}

/* Controls */

function startSlider() {
  const slider = document.getElementById("threshold");
  slider.max = Math.max(1, edges.length);
  slider.value = state.shown;
  slider.disabled = edges.length < 2 || !DATA.strongest;
  slider.addEventListener("input", () => {
    state.shown = Number(slider.value);
    update();
  });
  // Lists and labels can wait until the slider rests.
  slider.addEventListener("change", () => { sayAbout(); labelNodes(); if (state.matches) search(); });
  document.getElementById("curve-box").hidden = !DATA.curve.length;
}

/** How much is shown: all edges or those asked for, and blocks of layers folded or not. */
function startDepth() {
  const all = document.getElementById("all-edges"), folder = document.getElementById("fold-all");
  all.addEventListener("change", () => {
    state.allEdges = all.checked;
    if (all.checked) for (const block of blocks) block.folded = false;
    rearrange();
    fitZoom(0.6);
  });
  folder.addEventListener("click", () => {
    const folded = blocks.some((block) => !block.folded);
    for (const block of blocks) block.folded = folded;
    rearrange();
  });
  folder.hidden = !blocks.length;
}

/** Boxes to tick for inputs of heads and for token groups, where there are several. */
function startFilters() {
  const box = document.getElementById("filters");
  const ports = Object.keys(PORT_WORDS).filter((port) => edges.some((edge) => edge.port === port));
  const choices = ports.map((port) => [`into ${port}`, state.hiddenPorts, port]);
  if (GROUPS > 1) DATA.groups.forEach((group, index) => choices.push([group, state.hiddenGroups, index]));
  if (choices.length < 2) return;
  box.hidden = false;
  make("legend", {}, "Show", box);
  for (const [words, hidden, key] of choices) {
    const label = make("label", {}, undefined, box);
    const tick = make("input", { type: "checkbox", "data-key": key }, undefined, label);
    tick.checked = true;
    label.append(words);
    tick.addEventListener("change", () => {
      if (tick.checked) hidden.delete(key); else hidden.add(key);
      update();
      sayAbout();
      labelNodes();
    });
  }
}

function startTools() {
  document.getElementById("zoom-in").addEventListener("click", () => setZoom(zoom * 1.2));
  document.getElementById("zoom-out").addEventListener("click", () => setZoom(zoom / 1.2));
  document.getElementById("zoom-fit").addEventListener("click", () => fitZoom(0.2));
  startTheme();
}

/** Sets `data-ready` on the document once everything is drawn. */
async function start() {
  drawCircuit();
  foldDeep();
  arrange();
  startTools();
  fitZoom(matchMedia("(max-width: 860px)").matches ? 1 : 0.75); // on a phone as large as can be read, to be scrolled
  startDepth();
  startSlider();
  startFilters();
  startPointer();
  startKeyboard();
  startSearch();
  rearrange();
  sayLegend();
  labelNodes();
  if (MAPS) await startFigure();
  document.documentElement.dataset.ready = "true";
}

start();
