/* What all pages share: elements, the theme, unpacking, and the colours of heat maps. */

/** An HTML element; text goes in as text. */
function make(tag, attributes = {}, text = undefined, parent = null) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

/** The button that goes through the themes; the first is that of the system. */
function startTheme() {
  const themes = ["auto", "light", "dark"], button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = 0;
  const apply = () => {
    const name = themes[chosen] === "auto" ? (dark.matches ? "dark" : "light") : themes[chosen];
    document.documentElement.dataset.theme = name;
    button.textContent = "Theme: " + themes[chosen];
  };
  button.addEventListener("click", () => { chosen = (chosen + 1) % themes.length; apply(); });
  dark.addEventListener("change", apply);
  apply();
}

/** Bytes out of base64 letters, compressed as zlib does. */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The image in dark grey, on which heat can be seen. */
function greyOf(image) {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height), data = pixels.data;
  for (let at = 0; at < data.length; at += 4) {
    const grey = 0.55 * (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]);
    data[at] = data[at + 1] = data[at + 2] = grey;
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

/** The colour of a share from 0 to 1, between the stops of the ramp. */
function rampColour(share) {
  const at = share * (DATA.ramp.length - 1), low = Math.min(Math.floor(at), DATA.ramp.length - 2), part = at - low;
  return DATA.ramp[low].map((value, channel) => value + part * (DATA.ramp[low + 1][channel] - value));
}

/** A quantile of sorted values, between neighbours as numpy has it. */
function quantile(sorted, share) {
  const at = share * (sorted.length - 1), low = Math.floor(at), high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
}
