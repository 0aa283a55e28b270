// Draws numbers as heat: the colours of matplotlib's inferno, from the first to the second of two limits.

const STOPS = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
export const GRADIENT = `linear-gradient(90deg, ${STOPS.map(stop => `rgb(${stop})`).join()})`;

const TABLE = Array.from({length: 256}, (_, level) => {
  const at = level / 255 * (STOPS.length - 1), first = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[first].map((value, channel) => Math.round(value + (at - first) * (STOPS[first + 1][channel] - value)));
});
const PIXELS = new Uint32Array(Uint8Array.from(TABLE.flatMap(colour => [...colour, 255])).buffer); // as pictures hold them

const level = (value, low, high) => (high !== low ? Math.round(255 * Math.min(1, Math.max(0, (value - low) / (high - low)))) : 128);

export function color(value, [low, high]) { return TABLE[level(value, low, high)]; }

export function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** Returns a canvas with a pixel for each value of a map (height, width). */
export function heatmap(values, [height, width], [low, high]) {
  return canvasOf(height, width, pixels => { for (let i = 0; i < pixels.length; i++) pixels[i] = PIXELS[level(values[i], low, high)]; });
}

/** Returns a canvas as large as a picture; rows and columns hold the row and column of the map for those of the picture. */
export function enlarged(values, [, width], [low, high], rows, columns) {
  return canvasOf(rows.length, columns.length, pixels => {
    let i = 0;
    for (const row of rows) for (const column of columns) pixels[i++] = PIXELS[level(values[row * width + column], low, high)];
  });
}

function canvasOf(height, width, fill) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height}), pen = canvas.getContext("2d");
  const picture = pen.createImageData(width, height);
  fill(new Uint32Array(picture.data.buffer));
  pen.putImageData(picture, 0, 0);
  return canvas;
}

export const number = value => (Math.abs(value) < 0.995 ? value.toFixed(2).replace("0.", ".") : value.toFixed(1));

/** Fills an element of three: first limit, colours, second limit. */
export function showScale(element, limits, write = number) {
  const [first, bar, second] = element.children;
  first.textContent = write(limits[0]);
  second.textContent = write(limits[1]);
  bar.style.background = GRADIENT;
  element.hidden = false;
}
