/* Runs the network in a thread of its own, by onnxruntime-web: the page stays usable meanwhile.

It takes {photo, size, view} and returns {labels, seconds}; {x, y, id} and returns {id, shares}. It first says
{loaded, total} while the model is read, and {ready, threads}; {error} stands for anything that went wrong.
*/

import * as ort from "./onnxruntime/ort.wasm.min.mjs";
import {planes, Scores} from "./labels.js";

const MOST_THREADS = 8;
ort.env.wasm.wasmPaths = new URL("./onnxruntime/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;

let scores = null;
const opened = open();
opened.then(
  () => postMessage({ready: true, threads: ort.env.wasm.numThreads}),
  error => postMessage({error: `The model cannot be read: ${error.message}`}),
);

self.onmessage = async ({data}) => {
  if (data.id !== undefined) return postMessage({id: data.id, shares: scores.at(data.x, data.y)});
  try {
    const {session, about} = await opened, start = performance.now(), {photo, size, view} = data;
    scores = null; // its memory is free for the network
    const input = new ort.Tensor("uint8", planes(photo, size, view), [1, 3, ...view]);
    const [logits] = Object.values(await session.run({images: input}));
    const through = about.single_resize ? size : view; // logits are resized to the network's input, then to the photo
    scores = new Scores(logits.data, logits.dims.slice(1), through, size, about.align_corners);
    logits.dispose();
    const labels = scores.labels();
    postMessage({labels, seconds: (performance.now() - start) / 1000}, [labels.buffer]);
  } catch (error) {
    postMessage({error: `The network cannot label this photo: ${error.message ?? error}. A smaller size may help.`});
  }
};

async function open() {
  const [about, model] = await Promise.all([fetched("./model.json").then(r => r.json()), fetched("./model.onnx").then(bytes)]);
  return {about, session: await ort.InferenceSession.create(model, {executionProviders: ["wasm"]})};
}

async function fetched(path) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response;
}

async function bytes(response) {
  const total = Number(response.headers.get("content-length")), reader = response.body.getReader(), parts = [];
  for (let loaded = 0, part; !(part = await reader.read()).done; postMessage({loaded, total})) {
    parts.push(part.value);
    loaded += part.value.length;
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
