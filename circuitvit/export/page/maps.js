/* Attention patterns and sizes of writes: unpacking them, and painting them as heat over the image. */

const MAPS = DATA.maps;
const TOKENS = MAPS ? MAPS.prefix.length + MAPS.grid[0] * MAPS.grid[1] : 0;
const HAS_CLASS_TOKEN = MAPS !== null && MAPS.prefix[0] === "cls";

/** A share that stands for none: rows of logarithms end there. */
const NOTHING = 2e-7;

/** What has been unpacked: for each image its element, its grey base, its rows and the full patterns. */
const sides = {};

/** Unpacks the images and the rows that are shown by default. */
async function unpackMaps() {
  for (const [name, packed] of Object.entries(MAPS.sides)) {
    const image = new Image();
    image.src = packed.image;
    const [rows] = await Promise.all([inflate(packed.rows), image.decode()]);
    const starts = new Map();
    let at = 0;
    for (const [node, scale] of Object.entries(packed.nodes)) {
      starts.set(node, at);
      at += "top" in scale ? 3 * TOKENS : TOKENS; // a head: pattern, weights, largest score of each query
    }
    sides[name] = { image, grey: greyOf(image), rows, starts, words: packed.words, nodes: packed.nodes, packed: packed.full, full: new Map() };
  }
}

/** Unpacks the full patterns of one image, once a query token has been asked for. */
async function unpackQueries(name) {
  const side = sides[name];
  for (const [node, text] of Object.entries(side.packed))
    if (!side.full.has(node)) side.full.set(node, await inflate(text));
}

/** Numbers from 0 to 1 out of one of a node's rows. */
function stored(side, node, index) {
  const start = side.starts.get(node) + index * TOKENS;
  return Float64Array.from(side.rows.subarray(start, start + TOKENS), (byte) => byte / 255);
}

/**
 * What a node shows: {values, unit}, one value for each token; null where it has no map, or not for this query.
 * A row of logarithms is a pattern after a softmax, and the scores once the query's largest score is added.
 */
function mapOf(sideName, node, kind, query) {
  const side = sides[sideName], scale = side && side.nodes[node];
  if (!scale) return null;
  if ("norm" in scale) return { values: stored(side, node, 0).map((share) => share * scale.norm), unit: "norm of the write" };
  if ("most" in scale) return { values: stored(side, node, 0).map((share) => scale.least + share * (scale.most - scale.least)), unit: "activation" };
  if (query !== null && !side.full.has(node)) return null;
  const logs = query === null
    ? stored(side, node, 0).map((share) => -share * 255 * MAPS.fineStep)
    : Float64Array.from(side.full.get(node).subarray(query * TOKENS, (query + 1) * TOKENS), (level) => -level * MAPS.roughStep);
  if (kind === "score") {
    const top = query === null ? scale.top : scale.low + stored(side, node, 2)[query] * (scale.high - scale.low);
    const averaged = query === null && !HAS_CLASS_TOKEN; // an average of patterns has no scores of its own
    return { values: logs.map((log) => log + top), unit: averaged ? "logarithm of the attention" : "score before the softmax" };
  }
  const powers = logs.map(Math.exp), sum = powers.reduce((a, b) => a + b, 0);
  const pattern = powers.map((power) => (power / sum < NOTHING ? 0 : power / sum));
  if (kind === "pattern") return { values: pattern, unit: "attention" };
  const weights = stored(side, node, 1);
  return { values: pattern.map((value, token) => value * weights[token] * scale.weight), unit: "attention \u00d7 size of the value" };
}

/* Painting */

/** Patch values as shares of the colour ramp: attention and activations from 0, scores and norms, which are never near 0, from the least. */
function sharesOf({ values, unit }) {
  const patches = values.slice(MAPS.prefix.length), isAttention = unit.startsWith("attention");
  const least = isAttention || unit === "activation" ? 0 : Math.min(...patches);
  const [cut, leastCut, timesMean] = DATA.rampEnd, sorted = Float64Array.from(patches).sort();
  // A few patches are far above all others; they share the end of the ramp, so that the rest can be seen.
  const enough = leastCut * (sorted[sorted.length - 1] - least);
  // Attention that is spread evenly shall look dull, not bright.
  const spread = isAttention ? (timesMean * patches.reduce((sum, value) => sum + value, 0)) / patches.length : 0;
  const range = Math.max(quantile(sorted, cut) - least, enough, spread);
  return patches.map((value) => (range > 0 ? Math.max(0, Math.min(1, (value - least) / range)) : 0));
}

/** Heat of a map as a small canvas of one pixel for each patch. */
function heatOf(map, strength = 1) {
  const [rows, columns] = MAPS.grid, canvas = new OffscreenCanvas(columns, rows), pen = canvas.getContext("2d");
  const pixels = pen.createImageData(columns, rows);
  sharesOf(map).forEach((share, patch) => {
    const opacity = Math.min(1, share ** 0.6) * strength;
    pixels.data.set([...rampColour(share), 255 * opacity], 4 * patch);
  });
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

/** Words stay on top of the heat. */
function inkOver(pen, side) {
  if (!side.words.length) return;
  pen.imageSmoothingEnabled = true;
  pen.globalCompositeOperation = "multiply";
  pen.drawImage(side.image, 0, 0, pen.canvas.width, pen.canvas.height);
  pen.globalCompositeOperation = "source-over";
}

const thumbCanvas = document.createElement("canvas");

/** A map over the grey image, as a data URI for the diagram. */
function thumbOf(sideName, map) {
  const [width, height] = DATA.thumb.map((side) => Math.round(2 * side)), pen = thumbCanvas.getContext("2d");
  Object.assign(thumbCanvas, { width, height });
  pen.drawImage(sides[sideName].grey, 0, 0, width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(heatOf(map), 0, 0, width, height);
  inkOver(pen, sides[sideName]);
  return thumbCanvas.toDataURL();
}
