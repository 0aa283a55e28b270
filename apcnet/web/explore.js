// Runs the page of `apcnet explore`: takes a picture, asks the server for labels and for what the heads see, shows both.
// Nothing is computed here but colours: labels, confidence, affinities and differences come from the server.

import {Context} from "./context.js";
import {enlarged, heatmap, number, showScale} from "./heat.js";
import {Overlay, takePhotos} from "./overlay.js";

const $ = id => document.getElementById(id);
const LAYERS = {
  classes: "", confidence: "The probability of every pixel's class, bright where the model is unsure.", difference: "Where the models differ, in the colours of their classes.",
};
const SMALL = 256; // pixels of the longest side: smaller pictures are enlarged without smoothing
const PAUSE = 120; // milliseconds without a move of the slider before the server is asked
const state = {photo: null, name: "", bitmap: null, side: 0, pixel: null, chosen: null, layer: "classes", seen: null};
let columns = [], asked = 0, abort = new AbortController();

// The server

async function ask(path, body) {
  const answer = await fetch(`explore/${path}`, {method: body ? "POST" : "GET", body, signal: abort.signal});
  if (answer.ok) return answer;
  const text = await answer.text();
  let error = text;
  try { error = JSON.parse(text).error ?? text; } catch { /* it is no JSON */ }
  throw new Error(error || `the server answers ${answer.status}`);
}

/** Reads a record and its arrays: 8 bytes with the length of the JSON, the JSON, and the arrays that it refers to. */
async function record(answer) {
  const buffer = await answer.arrayBuffer(), length = Number(new DataView(buffer).getBigUint64(0, true));
  const kinds = {uint8: Uint8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array, float32: Float32Array, float64: Float64Array};
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)), (_, value) => {
    if (!value?.dtype) return value;
    const count = value.shape.reduce((a, b) => a * b, 1);
    return {shape: value.shape, values: new kinds[value.dtype](buffer, 8 + length + value.start, count)};
  });
}

// Pictures and answers

async function take(photo, name) {
  const {photo: before, name: nameBefore, bitmap, side} = state;
  Object.assign(state, {photo, name, bitmap: null, side: 0});
  if (await look() === "failed" && before) Object.assign(state, {photo: before, name: nameBefore, bitmap, side}); // it is shown still
}

async function look() {
  const mine = ++asked;
  abort.abort();
  abort = new AbortController();
  report(`Labelling ${state.name} …`);
  try {
    const query = `?side=${state.side}`, isNew = !state.bitmap, seen = await record(await ask(`view${query}`, state.photo));
    const bitmap = state.bitmap ?? await decode(seen.width, seen.height);
    if (mine !== asked) return;
    Object.assign(state, {seen, bitmap});
    if (isNew) begin();
    showLabels();
    const inside = await record(await ask(`context${query}`, state.photo));
    if (mine !== asked) return;
    columns.forEach((column, i) => column.context.show(inside.models[i], column.overlay.photo));
    showChosen();
    pick(...state.pixel);
    document.body.dataset.shown = mine; // for tests: everything that was asked for is on the page
  } catch (error) {
    if (mine !== asked || error.name === "AbortError") return;
    report("", error.message);
    return "failed";
  }
}

/** Forgets what was chosen on the picture before. */
function begin() {
  const {width, height, largest} = state.seen;
  state.pixel = [Math.floor(0.36 * width), Math.floor(0.64 * height)]; // off the numbers in the tiles
  state.chosen = null;
  for (const button of $("samples").children) button.setAttribute("aria-pressed", String(button.dataset.name === state.name));
  $("times").replaceChildren();
  $("side").max = largest;
  $("columns").classList.toggle("small", Math.max(width, height) < SMALL);
  setLayer("classes", false);
}

/** Decodes the picture in the browser, or on the server if the browser cannot or turns it another way. */
async function decode(width, height) {
  const own = await createImageBitmap(state.photo).catch(() => null);
  if (own?.width === width && own.height === height) return own;
  return createImageBitmap(await (await ask("picture", state.photo)).blob());
}

function showLabels() {
  const {seen, bitmap} = state, [height, width] = seen.input;
  columns.forEach((column, i) => {
    const {labels, seconds} = seen.models[i];
    column.overlay.show(bitmap, labels.values, state.name);
    column.overlay.fillLegend(column.legend);
    column.line.textContent = `${column.about.text} · ${duration(seconds)}`;
    column.element.querySelector(".seen").hidden = false;
  });
  $("side").value = Math.max(height, width);
  $("own").disabled = !state.side;
  showSide(`${width} × ${height}`);
  showTime();
  const differing = seen.differs ? `; the models differ in ${share(seen.differs.share)} of the pixels` : "";
  report(`${state.name}, ${seen.width} × ${seen.height} pixels, seen at ${width} × ${height}${differing}`);
  paint();
}

/** Adds the input's size to those that were tried, with its time and the share of pixels that differ from the first. */
function showTime() {
  const {seen, side} = state, list = $("times"), size = Math.max(...seen.input);
  let item = [...list.children].find(other => Number(other.dataset.size) === size);
  if (!item) {
    item = document.createElement("li");
    Object.assign(item.dataset, {size, first: list.children.length === 0});
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    button.addEventListener("click", () => { state.side = item.dataset.first === "true" ? 0 : size; look(); });
    list.append(item);
    list.append(...[...list.children].sort((a, b) => a.dataset.size - b.dataset.size));
  }
  if (item.dataset.first === "true") state.first = seen.models.map(model => model.labels.values);
  item.dataset.seconds = seen.models.reduce((sum, model) => sum + model.seconds, 0);
  const changed = state.first.map((first, i) => differing(first, seen.models[i].labels.values));
  const rest = item.dataset.first === "true" ? "default size" : `${changed.map(share).join(" and ")} of labels change`;
  item.firstChild.textContent = `${seen.input[1]} × ${seen.input[0]}: ${duration(item.dataset.seconds)}, ${rest}`;
  const longest = Math.max(...[...list.children].map(other => other.dataset.seconds));
  for (const other of list.children) {
    const bar = other.querySelector("i") ?? other.firstChild.appendChild(document.createElement("i"));
    other.firstChild.append(bar);
    bar.style.width = `${100 * other.dataset.seconds / longest}%`;
    other.firstChild.setAttribute("aria-current", String(other === item));
  }
  list.hidden = list.children.length < 2;
}


function differing(first, second) {
  let count = 0;
  for (let i = 0; i < first.length; i++) count += first[i] !== second[i];
  return count / first.length;
}

const share = value => (value && value < 0.001 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`);
const duration = seconds => (seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${Number(seconds).toFixed(1)} s`);

// Layers over the picture

function paint() {
  const {seen, layer, chosen} = state;
  if (!seen) return;
  columns.forEach((column, i) => {
    const {overlay, context, scale} = column, pen = overlay.drawing.getContext("2d"), model = seen.models[i];
    const heat = layer === "heat" ? context.heat(chosen) : null;
    overlay.photo.style.filter = layer === "classes" ? "" : "grayscale(1)";
    pen.clearRect(0, 0, overlay.width, overlay.height);
    scale.hidden = true;
    showChosenFrame(column);
    if (layer === "confidence") {
      pen.drawImage(heatmap(model.confidence.values, [overlay.height, overlay.width], [255, 0]), 0, 0);
      showScale(scale, [1, 0], value => `${100 * value} %`);
    } else if (layer === "difference") {
      pen.putImageData(difference(pen, overlay, seen.differs.mask.values, model.labels.values), 0, 0);
    } else if (heat) {
      pen.drawImage(enlarged(heat.values, heat.size, heat.limits, heat.rows, heat.columns), 0, 0);
      showScale(scale, heat.limits);
    }
    column.told.textContent = layer === "heat" ? heat?.text ?? "This model has no such region or codeword." : LAYERS[layer];
  });
  setOpacity();
}

function setOpacity() {
  const opacity = $("opacity").value / 100;
  document.querySelector("output[for=opacity]").textContent = `${$("opacity").value} %`;
  for (const {overlay} of columns) {
    overlay.opacity = state.layer === "classes" ? opacity : 0;
    overlay.drawing.style.opacity = opacity;
  }
}

/** Gives the pixels that the models disagree on the colours of their classes, and darkens the others. */
function difference(pen, {width, height, palette}, mask, labels) {
  const picture = pen.createImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
  const colours = new Uint32Array(Uint8Array.from([[20, 24, 30], ...palette].flatMap(colour => [...colour, 255])).buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[mask[i] ? 1 + labels[i] : 0];
  return picture;
}

function showChosenFrame(column) {
  const heat = state.layer === "heat" ? column.context.heat(state.chosen) : null;
  showFrame(column, heat?.box, heat?.size);
}

function showFrame({frame}, box, size) {
  frame.hidden = !box;
  if (!box) return;
  const [top, left, bottom, right] = box, [rows, columns] = size;
  const place = {left: left / columns, top: top / rows, width: (right - left) / columns, height: (bottom - top) / rows};
  for (const side in place) frame.style[side] = `${100 * place[side]}%`;
}

function setLayer(layer, paints = true) {
  state.layer = layer;
  document.querySelector(`[name=layer][value=${layer}]`).checked = true;
  if (paints) paint();
}

// Pixels and regions

function describe(column, x, y) {
  const {seen, layer, chosen} = state, {labels, confidence} = seen.models[columns.indexOf(column)], at = y * seen.width + x;
  const lines = [column.about.classes[labels.values[at]], `${Math.round(confidence.values[at] / 2.55)} % sure`];
  const heat = layer === "heat" ? column.context.heat(chosen) : null;
  if (heat) lines.push(`${heat.one} ${number(heat.values[heat.rows[y] * heat.size[1] + heat.columns[x]])}`);
  if (layer === "difference" && !seen.differs.mask.values[at]) lines.push("no difference");
  return lines;
}

function pick(x, y) {
  state.pixel = [x, y];
  for (const column of columns) {
    Object.assign(column.mark.style, {left: `${100 * (x + 0.5) / state.seen.width}%`, top: `${100 * (y + 0.5) / state.seen.height}%`});
    column.mark.hidden = false;
    column.context.pick(x, y, `Pixel ${x}, ${y}: ${describe(column, x, y).slice(0, 2).join(", ")}`);
  }
}

function choose(chosen) {
  state.chosen = chosen;
  showChosen();
  setLayer(chosen ? "heat" : "classes");
}

function showChosen() {
  for (const column of columns) column.context.choose(state.chosen);
  const isThere = columns.some(column => column.context.heat(state.chosen));
  document.querySelector("[name=layer][value=heat]").disabled = !isThere;
  if (isThere) paint();
  else if (state.layer === "heat") setLayer("classes");
}

// The page

function addColumn(about) {
  const element = $("columns").appendChild($("column").content.cloneNode(true).firstElementChild);
  const part = selector => element.querySelector(selector);
  part("h2").textContent = about.name;
  part(".seen").hidden = true;
  const column = {about, element, line: part(".about"), legend: part(".legend"), scale: part(".seen .scale"), told: part(".told")};
  column.overlay = new Overlay(part(".stage"), {
    classes: about.classes, palette: about.palette, clear: about.clear,
    describe: (x, y) => {
      for (const other of columns) if (other !== column && !column.led) lead(other, x, y);
      return describe(column, x, y).join("\n");
    },
    onPick: pick,
  });
  for (const className of ["frame", "mark"]) {
    column[className] = part(".stage").appendChild(Object.assign(document.createElement("div"), {className, hidden: true}));
  }
  for (const kind of ["pointerleave", "blur"]) part(".stage").addEventListener(kind, () => columns.forEach(other => other.overlay.point(null)));
  column.context = new Context(part(".context"), choose, (box, size) => {
    if (box) showFrame(column, box, size);
    else showChosenFrame(column);
  });
  return column;
}

/** Shows the tip of another column at the same pixel. */
function lead(column, x, y) {
  column.led = true;
  column.overlay.point(x, y);
  column.led = false;
}

function report(text, problem = "") {
  $("status").textContent = text;
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
  $("status").hidden = !!problem;
}

function showSide(text) { document.querySelector("output[for=side]").textContent = text; }

function addSamples(count) {
  for (let i = 0; i < count; i++) {
    const button = $("samples").appendChild(document.createElement("button")), picture = button.appendChild(new Image());
    const name = `generated scene ${i + 1}`;
    Object.assign(button, {type: "button"}).dataset.name = name;
    Object.assign(picture, {src: `explore/samples/${i}`, alt: name});
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => take(await (await fetch(picture.src)).blob(), name));
  }
}

async function start() {
  const {models, samples} = await (await ask("models")).json();
  columns = models.map(addColumn);
  $("columns").classList.toggle("two", models.length > 1);
  $("differs").hidden = models.length < 2;
  addSamples(samples);
  takePhotos(document.body, $("file"), photo => take(photo, photo.name || "pasted picture"), problem => report("", problem));
  let timer = 0;
  $("side").addEventListener("input", () => {
    if (!state.seen) return;
    state.side = Number($("side").value);
    showSide(`${state.side} …`);
    clearTimeout(timer);
    timer = setTimeout(look, PAUSE);
  });
  $("own").addEventListener("click", () => { state.side = 0; look(); });
  $("opacity").addEventListener("input", setOpacity);
  setOpacity();
  $("layers").addEventListener("change", event => setLayer(event.target.value));
  if (samples) $("samples").firstElementChild.click();
}

start().catch(error => report("", error.message));
