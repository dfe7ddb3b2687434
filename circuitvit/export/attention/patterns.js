/* Patterns: unpacking a head when it is asked for, and rows and columns of it as numbers. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const TOKENS = DATA.tokens;
const PREFIX = DATA.prefix.length;
const [ROWS, COLUMNS] = DATA.grid;
const KEPT = 160e6; // bytes of unpacked patterns that are kept, the last used ones

/** All heads in order: {name, row, latents, gated}. */
const heads = DATA.rows.flatMap((row) => row.heads.map((name) => ({ ...row, name, row: row.name })));

/** What the overview shows: each head, and of rows of several heads their mean and their maximum. */
const items = [];
{
  let first = 0;
  DATA.rows.forEach((row, place) => {
    const own = row.heads.map((_, head) => first + head);
    own.forEach((head) => items.push({ name: heads[head].name, place, heads: [head], how: "one" }));
    if (own.length > 1)
      for (const how of ["mean", "max"]) items.push({ name: `${how} of ${row.name}`, place, heads: own, how });
    first += own.length;
  });
}
items.forEach((item, id) => { item.id = id; });

const unpacked = new Map(); // by "image-place", least recently used first
const asked = new Map();

/** Codes as shares of the largest value of their row, signed where the pattern is. */
function sharesOfCodes(levels, signed) {
  return Float32Array.from({ length: signed ? 2 * levels + 1 : levels + 1 }, (_, code) => {
    const root = (code - (signed ? levels : 0)) / levels;
    return Math.sign(root) * root * root;
  });
}

/** A pack in numbers: the largest value of each query, the size of each key's value, and codes. */
async function unpack(image, place) {
  const [queries, levels, pool, signed, weighs] = DATA.images[image].packs[place];
  const bytes = await inflate(document.getElementById(`pack-${image}-${place}`).textContent);
  const shares = sharesOfCodes(levels, signed), blocks = DATA.blocks[pool], start = 4 * (queries + weighs * TOKENS);
  const width = Math.max(...blocks.slice(-ROWS * COLUMNS)) + 1;
  let codes = bytes.subarray(start);
  if (shares.length <= 16) {
    const nibbles = codes;
    codes = new Uint8Array(2 * nibbles.length);
    for (let at = 0; at < nibbles.length; at += 1) {
      codes[2 * at] = nibbles[at] >> 4;
      codes[2 * at + 1] = nibbles[at] & 15;
    }
  }
  return {
    queries, levels, pool, signed, shares, blocks, width, codes,
    largest: new Float32Array(bytes.buffer, 0, queries),
    weights: weighs ? new Float32Array(bytes.buffer, 4 * queries, TOKENS) : null,
  };
}

/** A head that has been unpacked, or undefined. */
function known(image, head) {
  const name = `${image}-${head + 1}`, found = unpacked.get(name);
  if (found) unpacked.delete(name), unpacked.set(name, found);
  return found;
}

/** Unpacks a head, once; the ones that were not used for longest make room. */
function ensure(image, head) {
  const name = `${image}-${head + 1}`;
  if (unpacked.has(name)) return Promise.resolve();
  if (!asked.has(name))
    asked.set(name, unpack(image, head + 1).then((found) => {
      asked.delete(name);
      unpacked.set(name, found);
      let size = 0;
      for (const each of unpacked.values()) size += each.codes.length;
      for (const [old, each] of unpacked) {
        if (size <= KEPT || old === name) break;
        unpacked.delete(old);
        size -= each.codes.length;
      }
    }));
  return asked.get(name);
}

/** One row: what a query gives to each key. */
function rowOf(pack, query) {
  const values = new Float32Array(TOKENS), start = query * pack.width, { codes, shares, blocks } = pack;
  const largest = pack.largest[query];
  for (let key = 0; key < TOKENS; key += 1) values[key] = largest * shares[codes[start + blocks[key]]];
  return values;
}

/** The mean of all rows. */
function meanRow(pack) {
  const sums = new Float64Array(pack.width), { codes, shares, largest, width } = pack;
  for (let query = 0, at = 0; query < pack.queries; query += 1)
    for (let block = 0; block < width; block += 1, at += 1) sums[block] += largest[query] * shares[codes[at]];
  return Float32Array.from(pack.blocks, (block) => sums[block] / pack.queries);
}

/** One column: what each query gives to a key. */
function columnOf(pack, key) {
  const { codes, shares, largest, width } = pack, block = pack.blocks[key];
  return largest.map((most, query) => most * shares[codes[query * width + block]]);
}

/**
 * What one head shows: a value for each token, or null while it is not unpacked.
 * look: {image, token, mode, weighted, latent}; token -1 is the mean of all queries, and so is latent -1.
 */
function valuesOfHead(head, look) {
  const { latents } = heads[head], pack = known(look.image, head);
  const query = latents ? look.latent : look.token, by = latents ? "row" : look.mode;
  if (!pack) {
    const first = opening[look.image], shown = latents ? -1 : FIRST_TOKEN;
    return first && by === "row" && query === shown && !look.weighted ? rowOf(first, head) : null;
  }
  if (by === "column") {
    const values = columnOf(pack, look.token);
    return look.weighted && pack.weights ? values.map((value) => Math.abs(value) * pack.weights[look.token]) : values;
  }
  if (query >= pack.queries) return null;
  const values = query < 0 ? (pack.mean ??= meanRow(pack)) : rowOf(pack, query);
  return look.weighted && pack.weights ? values.map((value, key) => Math.abs(value) * pack.weights[key]) : values;
}

/** What an item shows: of several heads their mean, or of each value the largest in size. */
function valuesOf(item, look) {
  if (item.how === "one") return valuesOfHead(item.heads[0], look);
  const each = item.heads.map((head) => valuesOfHead(head, look));
  if (each.includes(null)) return null;
  const found = new Float32Array(TOKENS);
  for (const values of each)
    for (let key = 0; key < TOKENS; key += 1) {
      if (item.how === "mean") found[key] += values[key] / each.length;
      else if (Math.abs(values[key]) > Math.abs(found[key])) found[key] = values[key];
    }
  return found;
}

/** Whether an item may be negative: a difference of two softmaxes. */
const isSigned = (item, look) => !look.weighted && item.heads.some((head) => DATA.images[look.image].packs[head + 1][3]);

/** Row 0 of the overview's pack of each image is that of the first head, and so on. */
const opening = [];
const FIRST_TOKEN = DATA.prefix[0] === "cls" ? 0 : -1;

/** The name of a token: "cls", a word, or a patch by row and column, of a clip with its frame first. */
function nameOfToken(token) {
  if (token < 0) return "the mean of all tokens";
  if (token < PREFIX) return DATA.prefix[token];
  const said = DATA.images[state.image].words[token];
  if (said) return `\u201c${said}\u201d`;
  const [high, wide, across, frames] = DATA.frame, patch = token - PREFIX;
  const row = Math.floor(patch / COLUMNS), column = patch % COLUMNS;
  const frame = Math.floor(row / high) * across + Math.floor(column / wide);
  const place = [row % high, column % wide];
  return `patch (${(frames > 1 ? [frame, ...place] : place).join(", ")})`;
}
