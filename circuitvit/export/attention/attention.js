/* What is chosen and what follows from it, and the wiring of pointer, keyboard and controls. */

const state = {
  image: DATA.start.image,
  item: items.findIndex((item) => item.how === "one" && item.heads[0] === DATA.start.head),
  token: DATA.start.token, // that stays; -1 is the mean of all queries
  hover: null, // token under the pointer or the cursor
  kept: DATA.start.token >= PREFIX, // whether a token was chosen that pointing elsewhere does not change
  latent: -1,
  mode: "row",
  weighted: false,
  strength: 1,
};

const MODES = { row: "Where it looks", column: "Who looks at it" };
const KINDS = { pattern: "Attention", weighted: "Attention \u00d7 size of value" };
const byId = (name) => document.getElementById(name);

const latents = () => heads[items[state.item].heads[0]].latents;
const query = () => (state.kept || state.hover === null ? state.token : state.hover);
const lookAt = (token) => ({ image: state.image, token, mode: state.mode, weighted: state.weighted, latent: state.latent });

/** A value as people read it. */
function number(value) {
  if (state.weighted) return value.toPrecision(2);
  const size = Math.abs(value);
  return size && size < 5e-6 ? "< 0.001 %" : `${(100 * value).toPrecision(size >= 0.1 ? 3 : 2).replace("-", "\u2212")} %`;
}

/* The large map */

function paint() {
  const item = items[state.item], token = query(), values = valuesOf(item, lookAt(token));
  const end = values ? endOf(values) : 0, marks = [];
  if (!latents()) marks.push([token, ["#000", "#fff"]]);
  if (state.kept && state.hover !== null && state.hover !== token) marks.push([state.hover, ["#fff", "#000"]]);
  paintMap(values, end, { image: state.image, strength: state.strength, marks, signed: isSigned(item, lookAt(token)) });
  say(item, token, values, end);
}

const subject = (token) => (latents() ? (state.latent < 0 ? "the mean of all latents" : `latent ${state.latent}`) : nameOfToken(token));

function say(item, token, values, end) {
  const who = subject(token), column = state.mode === "column" && !latents();
  byId("map-title").textContent = `${item.name}: ${column ? `who looks at ${who}` : `where ${who} looks`}`;
  byId("about").textContent = captionOf(item);
  byId("precision").textContent = precisionOf(item);
  if (!values) {
    byId("said").textContent = "Unpacking \u2026";
    return;
  }
  const signed = isSigned(item, lookAt(token));
  paintRamp(signed);
  byId("low").textContent = signed ? number(-end) : "0";
  byId("high").textContent = number(end) + " and more";
  paintChips(values, end);
  const most = strongest(values, 3).map((each) => `${nameOfToken(each)} ${number(values[each])}`).join(", ");
  let text = column ? `Most of all from ${most}.` : `Most of all at ${most}.`;
  if (PREFIX && !column && !state.weighted && !signed) {
    let off = 0;
    for (let at = 0; at < PREFIX; at += 1) off += values[at];
    text += ` Off the image: ${number(off)}.`;
  }
  if (state.hover !== null && (state.hover !== token || latents()))
    text += ` Under the pointer: ${nameOfToken(state.hover)} ${number(values[state.hover])}.`;
  byId("said").textContent = text;
}

function strongest(values, count) {
  const best = [];
  for (let at = 0; at < values.length; at += 1) {
    if (best.length === count && Math.abs(values[at]) <= Math.abs(values[best[count - 1]])) continue;
    let place = best.length;
    while (place && Math.abs(values[best[place - 1]]) < Math.abs(values[at])) place -= 1;
    best.splice(place, 0, at);
    best.length = Math.min(best.length, count);
  }
  return best;
}

function captionOf(item) {
  const head = heads[item.heads[0]], pack = known(state.image, item.heads[0]), words = [];
  const signed = isSigned(item, lookAt(0));
  if (head.row === "rollout") words.push("Attention rollout through all layers (Abnar and Zuidema 2020): means of heads, half of each token kept; values and MLPs play no part.");
  if (latents()) words.push("The queries of a pool are latents, not tokens: this is where they look.");
  if (state.weighted && pack && !pack.weights) words.push("There is no size of values here: attention alone.");
  else if (state.weighted) words.push(`Attention times the length of what the value adds to the stream${head.gated ? ", before the head's gate or norm" : ""}.`);
  else if (state.mode === "column" && !latents()) words.push("For each patch, the share of its own attention that it pays to this one: these need not sum to 100 %.");
  else if (signed) words.push("The difference of two softmaxes: blue above 0, orange below.");
  else if (head.row !== "rollout") words.push("Shares of attention after the softmax.");
  return words.join(" ");
}

function precisionOf(item) {
  const own = item.heads.map((head) => DATA.images[state.image].packs[head + 1]);
  const levels = Math.min(...own.map((each) => each[1])), pool = Math.max(...own.map((each) => each[2]));
  const square = pool > 1 ? ` Keys are pooled: what is shown is the mean of squares of ${pool} \u00d7 ${pool} patches.` : "";
  return `Stored values of this map are within ${(100 / levels).toPrecision(2)} % of the largest in their row.${square}`;
}

/* Tokens that are no patches, and latents */

let chips = [];

function makeChips() {
  const box = byId("chips"), count = latents();
  const wanted = count ? [-1, ...Array(Math.min(count, 32)).keys()] : [...(state.mode === "row" ? [-1] : []), ...DATA.prefix.keys()];
  const name = `${count} ${wanted}`;
  if (box.dataset.name === name) return;
  box.dataset.name = name;
  box.replaceChildren();
  chips = wanted.map((token) => {
    const button = make("button", { type: "button", "data-token": token }, undefined, box);
    make("i", { "aria-hidden": "true" }, undefined, button);
    const words = make("span", {}, undefined, button);
    button.addEventListener("click", () => (count ? choose({ latent: token }) : choose({ token, kept: token !== FIRST_TOKEN, hover: null })));
    if (!count && token >= 0) {
      for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => point(token));
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => point(null));
    }
    return { button, words, token, swatch: button.firstChild };
  });
}

function paintChips(values, end) {
  const count = latents();
  for (const { button, words, token, swatch } of chips) {
    const plain = count || token < 0;
    words.textContent = count ? (token < 0 ? "mean of latents" : `latent ${token}`) : token < 0 ? "mean of all" : `${nameOfToken(token)} ${number(values[token])}`;
    swatch.hidden = plain;
    if (!plain) {
      const share = end > 0 ? Math.min(1, Math.abs(values[token]) / end) : 0;
      const colour = isSigned(items[state.item], lookAt(0)) ? SIGNS[values[token] < 0 ? 1 : 0] : rampColour(share);
      swatch.style.backgroundColor = `rgb(${colour.map(Math.round).join(" ")})`;
    }
    button.setAttribute("aria-pressed", String(token === (count ? state.latent : query())));
  }
}

/* The overview */

const cells = items.map((item) => ({ item }));
const SMALL = heads.length * TOKENS * TOKENS <= 4e6; // all is unpacked at once, and the overview follows the pointer
let painted = null; // what the overview shows, so that nothing is painted twice
let round = 0;

function makeOverview() {
  const across = Math.max(...DATA.rows.map((row) => row.heads.length)), wide = (COLUMNS / ROWS) * OBLONG;
  const side = OBLONG > 1 ? 44 : across > 14 ? 36 : across > 8 || DATA.rows.length > 8 ? 44 : 60;
  DATA.rows.forEach((row, place) => {
    const line = make("div", { class: "head-row", role: "group", "aria-label": row.name }, undefined, byId("heads"));
    make("span", {}, row.name, line);
    for (const cell of cells.filter((each) => each.item.place === place)) {
      cell.button = make("button", { type: "button", class: "head", tabindex: "-1", "data-id": cell.item.id }, undefined, line);
      const map = make("canvas", { width: COLUMNS, height: ROWS, "aria-hidden": "true" }, undefined, cell.button);
      map.style.width = `${Math.round(side * Math.max(1, Math.min(wide, 4)))}px`;
      map.style.height = `${Math.round(side * Math.max(1, Math.min(wide, 4)) / wide)}px`;
      cell.pen = map.getContext("2d");
      make("span", {}, cell.item.how === "one" ? cell.item.name.split(".").pop() : cell.item.how, cell.button);
      cell.button.addEventListener("click", () => choose({ item: cell.item.id }));
    }
  });
}

/** Paints the overview for a token; heads that are not unpacked yet are pale. */
function paintOverview(token, label) {
  const look = lookAt(token), name = JSON.stringify(look) + unpacked.size;
  if (painted === name) return;
  painted = name;
  for (const cell of cells) {
    const values = valuesOf(cell.item, look);
    cell.button.classList.toggle("stale", !values);
    if (!values) continue;
    paintPatches(cell.pen, values, endOf(values), isSigned(cell.item, look), false);
    if (label) cell.button.setAttribute("aria-label", `${cell.item.name}, most at ${nameOfToken(strongest(values, 1)[0])}`);
  }
  const column = state.mode === "column", who = nameOfToken(token);
  byId("overview-caption").textContent = `${column ? `Who looks at ${who}` : `Where ${who} looks`}; each map on its own scale. Click one to enlarge it.`;
}

/** Unpacks all heads of the image for what is chosen; a later choice ends it. */
async function fillOverview() {
  const own = ++round, token = state.token, plain = token === FIRST_TOKEN && state.mode === "row" && !state.weighted;
  paintOverview(token, true);
  if (plain && !SMALL) return; // rows of the start are at hand; all else when it is needed
  for (let head = 0; head < heads.length; head += 1) {
    if (unpacked.has(`${state.image}-${head + 1}`)) continue;
    await ensure(state.image, head);
    if (own !== round) return;
    if (head % 8 === 7) paintOverview(token, false);
  }
  painted = null;
  paintOverview(token, true);
}

/* Choosing */

async function choose(changes) {
  Object.assign(state, changes);
  if (state.mode === "column" && state.token < 0) state.token = PREFIX ? 0 : PREFIX + Math.floor((ROWS * COLUMNS + COLUMNS) / 2);
  if (!latents()) state.latent = -1;
  for (const [box, chosen] of [["modes", state.mode], ["kinds", state.weighted ? "weighted" : "pattern"]])
    for (const button of byId(box).children) button.setAttribute("aria-pressed", String(button.dataset.value === chosen));
  for (const cell of cells) {
    const own = cell.item.id === state.item;
    cell.button.setAttribute("aria-pressed", String(own));
    cell.button.setAttribute("tabindex", own ? "0" : "-1");
  }
  const { image } = state;
  await loadPhotos(image);
  opening[image] ??= await unpack(image, 0);
  makeChips();
  paint();
  const filled = fillOverview();
  for (const head of items[state.item].heads) await ensure(image, head);
  paint();
  await filled;
}

let waiting = false;

/** What is pointed at; painted at most once a frame. */
function point(token) {
  if (state.hover === token) return;
  state.hover = token;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    paint();
    if (SMALL) paintOverview(query(), false);
  });
}

function keep(token) {
  const again = state.kept && state.token === token;
  return choose(again ? { kept: false, token: FIRST_TOKEN } : { kept: true, token });
}

function letGo() {
  if (state.kept) choose({ kept: false, token: FIRST_TOKEN });
}

function tokenAt(event) {
  const box = canvas.getBoundingClientRect(), within = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
  const row = within((event.clientY - box.top) / box.height, ROWS), column = within((event.clientX - box.left) / box.width, COLUMNS);
  return PREFIX + row * COLUMNS + column;
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function mapKey(event) {
  const step = STEPS[event.key];
  if (step) {
    const from = [state.hover, query()].find((token) => token !== null && token >= PREFIX);
    const patch = from === undefined ? Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2) : from - PREFIX;
    const row = Math.floor(patch / COLUMNS) + (from === undefined ? 0 : step[0]), column = (patch % COLUMNS) + (from === undefined ? 0 : step[1]);
    if (row >= 0 && row < ROWS && column >= 0 && column < COLUMNS) point(PREFIX + row * COLUMNS + column);
  } else if ((event.key === "Enter" || event.key === " ") && state.hover !== null && !latents()) keep(state.hover);
  else return;
  event.preventDefault();
}

/** The head beside the one that is chosen, in the direction of a key. */
function headKey(event) {
  const step = STEPS[event.key];
  if (!step) return;
  const { place } = items[state.item], line = (at) => items.filter((item) => item.place === at);
  const own = line(place), column = own.indexOf(items[state.item]) + step[1], next = step[0] ? line(place + step[0]) : own;
  const found = next[step[0] ? Math.min(column, next.length - 1) : column];
  event.preventDefault();
  if (!found) return;
  choose({ item: found.id });
  cells[found.id].button.focus();
}

/* Wiring */

function addSegments(box, values, changes) {
  for (const [value, words] of Object.entries(values)) {
    const button = make("button", { type: "button", "data-value": value, "aria-pressed": "false" }, words, byId(box));
    button.addEventListener("click", () => choose(changes(value)));
  }
}

function wire() {
  addSegments("modes", MODES, (mode) => (mode === "row" && !state.kept ? { mode, token: FIRST_TOKEN } : { mode }));
  addSegments("kinds", KINDS, (kind) => ({ weighted: kind === "weighted" }));
  DATA.images.forEach(({ name }, image) => make("option", { value: image }, name, byId("images")));
  byId("images").value = state.image;
  byId("image-box").hidden = DATA.images.length < 2;
  byId("images").addEventListener("change", (event) => choose({ image: Number(event.target.value) }));
  byId("strength-box").hidden = !DATA.images[0].picture;
  byId("strength").addEventListener("input", (event) => {
    state.strength = Number(event.target.value) / 100;
    byId("strength-value").textContent = `${event.target.value} %`;
    paint();
  });
  canvas.addEventListener("pointermove", (event) => point(tokenAt(event)));
  for (const event of ["pointerleave", "blur"]) canvas.addEventListener(event, () => point(null));
  canvas.addEventListener("click", (event) => { if (!latents()) keep(tokenAt(event)); });
  canvas.addEventListener("keydown", mapKey);
  byId("heads").addEventListener("keydown", headKey);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") letGo(); });
}

/** Sets `data-ready` on the document once everything is drawn. */
async function start() {
  startTheme();
  sizeMap();
  makeOverview();
  wire();
  await choose({});
  cells[state.item].button.scrollIntoView({ block: "nearest" });
  document.documentElement.dataset.ready = "true";
}

start();
