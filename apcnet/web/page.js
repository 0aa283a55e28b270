/* Takes a photo, lets the worker label it, and shows, explains and saves the result. */

import {Overlay, takePhotos} from "./overlay.js";
import {labelsPng} from "./png.js";
import {viewSize} from "./labels.js";

const LISTED = 3; // classes in a tip
const element = id => document.getElementById(id), number = value => value.toLocaleString("en");

element("unserved").hidden = true;
element("main").hidden = false;
const about = await fetch("model.json").then(response => response.json()).catch(error => { // apcnet/web/__init__.py writes it
  say(`model.json cannot be read: ${error.message}`, true);
  throw error;
});
const worker = new Worker("worker.js", {type: "module"}), answers = new Map();
let waiting = null, running = null, shown = null, isReady = false; // photos to label, being labelled and shown

document.title = element("name").textContent = about.name;
const overlay = new Overlay(element("stage"), {...about, describe});
overlay.opacity = 0.5;
for (const side of about.sides) element("size").add(new Option(`up to ${side} × ${side} pixels`, side * side, false, side === about.side));

takePhotos(document.body, element("file"), take, text => say(text, true));
element("sample").addEventListener("click", async () => take(new File([await (await fetch("sample.png")).blob()], "sample.png")));
element("size").addEventListener("change", () => { const photo = waiting ?? running ?? shown; if (photo) label({...photo}); });
element("opacity").addEventListener("input", event => {
  overlay.opacity = event.target.value / 100;
  element("percent").textContent = `${event.target.value} %`;
});
element("save-labels").addEventListener("click", async () =>
  save(await labelsPng(shown.labels, shown.size[1], shown.size[0], about.palette), ".png"));
element("save-overlay").addEventListener("click", () => overlay.picture().toBlob(blob => save(blob, "_overlay.png")));

worker.addEventListener("message", ({data}) => {
  if (data.id !== undefined) return answers.get(data.id)?.(data.shares);
  if (data.loaded !== undefined) return progress(data.total ? data.loaded / data.total : null);
  if (data.ready) {
    isReady = true;
    element("about").textContent += ` ${about.classes.length} classes, ${data.threads} thread${data.threads > 1 ? "s" : ""}.`;
  }
  if (data.labels) show({...running, ...data});
  if (data.error) say(data.error, true);
  if (data.ready && !waiting) say("Ready.");
  running = null;
  progress(undefined);
  next();
});
worker.addEventListener("error", event => { say(`The network cannot be started: ${event.message ?? "a file is missing"}`, true); progress(undefined); });
progress(null);

async function take(file) {
  try {
    const options = {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none"};
    label({name: file.name || "pasted picture", bitmap: await createImageBitmap(file, options)});
  } catch {
    say(`${file.name}: this browser cannot decode it.`, true);
  }
}

function label({name, bitmap}) {
  const size = [bitmap.height, bitmap.width];
  const view = viewSize(size, about.test_scale, Number(element("size").value));
  waiting = {name, bitmap, size, view: view.size, ratio: view.ratio};
  if (!shown) reveal(waiting);
  next();
}

function next() {
  if (!isReady || running || !waiting) return;
  [running, waiting] = [waiting, null];
  const {size: [height, width], view, bitmap, name} = running;
  const draw = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  draw.drawImage(bitmap, 0, 0);
  const photo = draw.getImageData(0, 0, width, height).data;
  running.isOpaque = new Uint32Array(photo.buffer).every(pixel => pixel >>> 24 === 255);
  const expected = shown ? ` about ${Math.ceil(shown.seconds * view[0] * view[1] / (shown.view[0] * shown.view[1]))} s` : "";
  say(`Labelling ${name}, ${width} × ${height} …${expected}`);
  progress(null);
  answers.clear(); // the worker answers for the next photo from now on
  worker.postMessage({photo, size: running.size, view}, [photo.buffer]);
}

function reveal({bitmap, labels = null, name}) {
  element("empty").hidden = true;
  element("stage").hidden = false;
  overlay.show(bitmap, labels, name);
}

function show(photo) {
  shown = photo;
  reveal(photo);
  overlay.fillLegend(element("legend"));
  element("save-labels").disabled = element("save-overlay").disabled = false;
  const {name, size: [height, width], view, ratio, seconds, isOpaque} = photo;
  const resized = view[0] !== height || view[1] !== width;
  const seen = resized ? `, which the network saw at ${view[1]} × ${view[0]}` : "";
  say(`${name}: ${width} × ${height}${seen}, labelled in ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s.`);
  const flags = [...(about.test_scale ? ["--test-scale", ...about.test_scale] : []), ...(about.single_resize ? ["--single-resize"] : []),
    ...(ratio < 1 ? ["--ratios", ratio] : [])];
  const shrunk = ratio < 1 ? `Shrunk to ${number(view[0] * view[1])} pixels. ` : "";
  const same = isOpaque ? `The labels are those of ${["apcnet predict", ...flags].join(" ")}.`
    : "The network saw black in transparent parts, where apcnet predict sees the colours that the file has there.";
  element("seen").textContent = shrunk + same;
}

async function describe(x, y, label) {
  const own = about.classes[label];
  if (running || !shown) return own; // the worker is busy, and its scores are gone
  const id = answers.size + 1;
  const shares = await new Promise(resolve => { answers.set(id, resolve); worker.postMessage({id, x, y}); });
  const best = shares.map((share, k) => [share, k]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, LISTED);
  return best.map(([share, k]) => `${about.classes[k]} ${(100 * share).toFixed(1)} %`).join("\n");
}

function say(text, isBad = false) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", isBad);
}

function progress(share) { // undefined: nothing goes on; null: how long it takes is not known
  element("progress").classList.toggle("busy", share !== undefined);
  if (share) element("progress").value = share;
  else element("progress").removeAttribute("value");
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = shown.name.replace(/\.[^.]*$/, "") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
