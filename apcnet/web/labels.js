/* Computes what stands between a photo's pixels, the network and the labels, as apcnet.predict does on a CPU.

  viewSize([H, W], testScale, mostPixels)   the size [h, w] at which the network sees an image, and the ratio to it
  planes(rgba, [H, W], [h, w])              RGB levels (3, h, w) of a resized image, equal to apcnet's to the bit
  new Scores(logits, shape, view, size, alignCorners)
    .labels()                               the class of every pixel: logits are resized to the network's input (view),
                                            then to the photo (size), and never stored at either size
    .at(x, y)                               the probabilities of all classes at a pixel

Positions are computed in integers: output d of an axis reads the source at n / denominator, n = max(0, d·step + start)
(apc_kernels/ops/interpolation.py).
*/

export function viewSize(size, testScale, mostPixels) {
  const whole = view(size, testScale, 1), pixels = whole[0] * whole[1];
  if (pixels <= mostPixels) return {size: whole, ratio: 1};
  const ratio = Math.floor(1e4 * Math.sqrt(mostPixels / pixels)) / 1e4;
  return {size: view(size, testScale, ratio), ratio};
}

function view(size, testScale, ratio) { // apcnet.data.augment.view_sizes
  const times = (sides, factor) => sides.map(side => Math.floor(side * factor + 0.5));
  const bounds = testScale ? testScale.map(side => Math.trunc(side * ratio)) : times(size, ratio);
  const scale = Math.min(Math.max(...bounds) / Math.max(...size), Math.min(...bounds) / Math.min(...size));
  return times(size, scale).map(side => Math.max(side, 1));
}

function axis(source, size, alignCorners) {
  const [step, start, denominator] = alignCorners
    ? [size > 1 ? source - 1 : 0, 0, Math.max(size - 1, 1)] : [2 * source, source - size, 2 * size];
  const first = new Int32Array(size), second = new Int32Array(size), rest = new Float64Array(size);
  for (let d = 0; d < size; d++) {
    const n = Math.max(0, d * step + start);
    first[d] = Math.floor(n / denominator);
    second[d] = Math.min(first[d] + 1, source - 1);
    rest[d] = n - first[d] * denominator;
  }
  return {first, second, rest, denominator};
}

export function planes(rgba, [height, width], [h, w]) {
  const out = new Uint8Array(3 * h * w);
  const rows = axis(height, h, false), columns = axis(width, w, false);
  const in256 = ({rest, denominator}) => Int32Array.from(rest, r => Math.floor((r * 256 + denominator / 2) / denominator));
  const down = in256(rows), right = in256(columns);
  for (let y = 0; y < h; y++) {
    const above = 4 * width * rows.first[y], below = 4 * width * rows.second[y];
    for (let x = 0; x < w; x++) {
      const before = 4 * columns.first[x], after = 4 * columns.second[x];
      for (let channel = 0; channel < 3; channel++) {
        const [a, b] = [before + channel, after + channel];
        const left = rgba[above + a] * 256 + (rgba[below + a] - rgba[above + a]) * down[y];
        const other = rgba[above + b] * 256 + (rgba[below + b] - rgba[above + b]) * down[y];
        out[(channel * h + y) * w + x] = (left * 256 + (other - left) * right[x] + 32768) >> 16;
      }
    }
  }
  return out;
}

export class Scores {
  constructor(logits, [count, height, width], view, size, alignCorners) {
    this.classes = Math.max(count, 2); // a single logit z stands for the two logits 0 and z
    Object.assign(this, {source: [height, width], view, size});
    const values = new Float32Array(height * width * this.classes), shift = this.classes - count;
    for (let k = 0; k < count; k++)
      for (let i = 0, plane = k * height * width; i < height * width; i++)
        values[i * this.classes + k + shift] = logits[plane + i];
    this.values = values; // (h, w, classes): the scores of a place lie side by side
    const stages = view[0] === size[0] && view[1] === size[1] ? [size] : [view, size];
    this.stages = stages.map(([h, w], i) => {
      const [from, across] = i ? view : this.source;
      return {rows: axis(from, h, alignCorners), columns: axis(across, w, alignCorners), width: w, kept: new Map()};
    });
  }

  labels() {
    const [height, width] = this.size, last = this.stages.length - 1, K = this.classes;
    const labels = K > 256 ? new Uint16Array(height * width) : new Uint8Array(height * width);
    const {first, second, rest, denominator} = this.stages[last].columns, possible = new Int32Array(K);
    for (let y = 0; y < height; y++) {
      const row = this.#between(last, y);
      for (let x = 0, count = 0, interval = -1; x < width; x++) {
        const a = first[x] * K, b = second[x] * K, t = rest[x] / denominator;
        if (first[x] !== interval) { // leave out the classes that cannot win between these two places
          interval = first[x];
          let floor = -Infinity;
          for (let k = 0; k < K; k++) floor = Math.max(floor, Math.min(row[a + k], row[b + k]));
          count = 0;
          for (let k = 0; k < K; k++) if (Math.max(row[a + k], row[b + k]) >= floor) possible[count++] = k;
        }
        let best = -Infinity, label = 0;
        for (let i = 0; i < count; i++) {
          const k = possible[i], score = row[a + k] + t * (row[b + k] - row[a + k]);
          if (score > best) [best, label] = [score, k];
        }
        labels[y * width + x] = label;
      }
    }
    return labels;
  }

  at(x, y) {
    const last = this.stages.length - 1, {first, second, rest, denominator} = this.stages[last].columns, K = this.classes;
    const row = this.#between(last, y), a = first[x] * K, b = second[x] * K, t = rest[x] / denominator;
    const scores = Array.from({length: K}, (_, k) => row[a + k] + t * (row[b + k] - row[a + k]));
    const most = Math.max(...scores), powers = scores.map(score => Math.exp(score - most));
    const sum = powers.reduce((total, power) => total + power);
    return powers.map(power => power / sum);
  }

  /* Returns row y of a stage, resized along its rows but not yet along its columns. */
  #between(stage, y) {
    const {first, second, rest, denominator} = this.stages[stage].rows, t = rest[y] / denominator;
    const above = this.#row(stage - 1, first[y]), below = this.#row(stage - 1, second[y]);
    const row = new Float32Array(above.length);
    for (let i = 0; i < row.length; i++) row[i] = above[i] + t * (below[i] - above[i]);
    return row;
  }

  /* Returns a whole row of a stage; -1 are the logits. Two rows are kept: the next row of labels reads them again. */
  #row(stage, y) {
    if (stage < 0) {
      const length = this.source[1] * this.classes;
      return this.values.subarray(y * length, (y + 1) * length);
    }
    const {columns: {first, second, rest, denominator}, width, kept} = this.stages[stage], K = this.classes;
    if (kept.has(y)) return kept.get(y);
    const source = this.#between(stage, y), row = new Float32Array(width * K);
    for (let x = 0; x < width; x++) {
      const a = first[x] * K, b = second[x] * K, t = rest[x] / denominator;
      for (let k = 0; k < K; k++) row[x * K + k] = source[a + k] + t * (source[b + k] - source[a + k]);
    }
    if (kept.size > 1) kept.delete(kept.keys().next().value);
    kept.set(y, row);
    return row;
  }
}
