/* Painting: values of patches as colours, alone or over the image. */

const canvas = document.getElementById("image");
const photos = []; // of each image: {photo, grey}, or undefined where there is none
const SIGNS = [[0, 114, 178], [213, 94, 0]]; // above and below 0, where a pattern is signed
const OBLONG = DATA.images[0].words.length ? 2.5 : 1; // words are wider than high
const GROUND = [13, 8, 53];
const table = Uint8Array.from({ length: 256 * 3 }, (_, at) => Math.round(rampColour(Math.floor(at / 3) / 255)[at % 3]));

async function loadPhotos(image) {
  if (photos[image] || !DATA.images[image].picture) return;
  const photo = new Image();
  photo.src = DATA.images[image].picture;
  await photo.decode();
  photos[image] = { photo, grey: greyOf(photo) };
}

/** The value at the end of the ramp: few patches are far above all others, and even attention shall look dull. */
function endOf(values) {
  const sizes = values.slice(PREFIX), [cut, leastCut, timesMean] = DATA.rampEnd;
  let sum = 0;
  for (let at = 0; at < sizes.length; at += 1) sum += sizes[at] = Math.abs(sizes[at]);
  sizes.sort();
  return Math.max(quantile(sizes, cut), leastCut * sizes[sizes.length - 1], (timesMean * sum) / sizes.length);
}

/** One pixel for each patch; over an image small values are clear. */
function paintPatches(pen, values, end, signed, over) {
  const pixels = pen.createImageData(COLUMNS, ROWS), { data } = pixels;
  for (let patch = 0, at = 0; patch < ROWS * COLUMNS; patch += 1, at += 4) {
    const value = values[PREFIX + patch], share = end > 0 ? Math.min(1, Math.abs(value) / end) : 0;
    const opacity = share ** 0.6, colour = SIGNS[value < 0 ? 1 : 0], entry = 3 * Math.round(255 * share);
    for (let channel = 0; channel < 3; channel += 1) {
      const pure = signed ? colour[channel] : table[entry + channel];
      data[at + channel] = signed && !over ? GROUND[channel] + opacity * (pure - GROUND[channel]) : pure;
    }
    data[at + 3] = over ? 255 * opacity : 255;
  }
  pen.putImageData(pixels, 0, 0);
}

const small = new OffscreenCanvas(COLUMNS, ROWS), smallPen = small.getContext("2d");
const pen = canvas.getContext("2d", { alpha: false });

/** The large map: the image, grey as far as the heat is strong, the heat, and frames around patches. */
function paintMap(values, end, { image, strength, marks, signed }) {
  const { width, height } = canvas, kept = photos[image];
  pen.globalAlpha = 1;
  pen.fillStyle = "#222";
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingEnabled = true;
  if (kept) {
    pen.drawImage(kept.photo, 0, 0, width, height);
    pen.globalAlpha = strength;
    pen.drawImage(kept.grey, 0, 0, width, height);
  }
  if (values) {
    paintPatches(smallPen, values, end, signed, Boolean(kept));
    pen.globalAlpha = kept ? strength : 1;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, width, height);
    if (kept && DATA.images[image].words.length) { // which stay on top of the heat
      pen.globalAlpha = 1;
      pen.imageSmoothingEnabled = true;
      pen.globalCompositeOperation = "multiply";
      pen.drawImage(kept.photo, 0, 0, width, height);
      pen.globalCompositeOperation = "source-over";
    }
  }
  pen.globalAlpha = 1;
  paintFrames(width, height);
  for (const [token, colours] of marks) if (token >= PREFIX) markPatch(token - PREFIX, colours, width, height);
}

/** A hair between the frames of a clip. */
function paintFrames(width, height) {
  const [high, wide] = DATA.frame;
  pen.fillStyle = "#888";
  for (let column = wide; column < COLUMNS; column += wide) pen.fillRect((column * width) / COLUMNS - 1, 0, 2, height);
  for (let row = high; row < ROWS; row += high) pen.fillRect(0, (row * height) / ROWS - 1, width, 2);
}

/** A frame that can be seen on any ground: a light line in a dark one, or the other way round. */
function markPatch(patch, [outer, inner], width, height) {
  const across = width / COLUMNS, down = height / ROWS;
  const box = [(patch % COLUMNS) * across, Math.floor(patch / COLUMNS) * down, across, down];
  for (const [colour, line] of [[outer, 6], [inner, 2.5]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(...box);
  }
}

/** Gives the large canvas the shape of the image, sharp also on fine screens. */
function sizeMap() {
  const most = 640, scale = Math.min(most / COLUMNS, most / ROWS), wide = Math.max(1, COLUMNS / ROWS / 2);
  canvas.width = Math.round(scale * wide * COLUMNS * OBLONG);
  canvas.height = Math.round(scale * wide * ROWS);
}

function paintRamp(signed) {
  const ramp = document.getElementById("ramp"), brush = ramp.getContext("2d"), pixels = brush.createImageData(256, 1);
  for (let at = 0; at < 256; at += 1) {
    const size = signed ? Math.abs(at - 127.5) / 127.5 : at / 255, opacity = size ** 0.6;
    for (let channel = 0; channel < 3; channel += 1)
      pixels.data[4 * at + channel] = signed
        ? GROUND[channel] + opacity * (SIGNS[at < 128 ? 1 : 0][channel] - GROUND[channel])
        : table[3 * at + channel];
    pixels.data[4 * at + 3] = 255;
  }
  brush.putImageData(pixels, 0, 0);
}
