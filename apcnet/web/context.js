// Shows what a head gathers from elsewhere: a tile for each scale of a pyramid, or for each codeword.
//
//   const context = new Context(section, onChoose, onPoint);
//     section   the <section class="context"> of a column
//     onChoose  (chosen) => …: a region {scale, index} or a codeword {index} was chosen; null: nothing is
//     onPoint   (box, size) => …: the pointer or focus is on a region with this box; null: on none
//   context.show(record, photo)  record: what the server sees inside the head, null if it has no context; photo: a canvas
//   context.pick(x, y, text)     shows the values of the position that a pixel lies in
//   context.choose(chosen)       marks a region or codeword as chosen
//   context.heat(chosen)         its values at all positions, {values, size, limits, rows, columns, box, one, text}, or null

import {color, heatmap, number, range, showScale} from "./heat.js";

const KINDS = {
  affinities: {
    title: "Affinities to the regions of every scale",
    note: "APCNet: the position of the ringed pixel gathers the pooled regions, weighted by these. Choose a region to see those of all positions to it.",
    one: "affinity", all: "Affinities of all positions to",
  },
  similarities: {
    title: "Pooled regions of every scale",
    note: "This head gives every position all regions, weighted by place alone. The numbers are cosines of the features at the ringed pixel and the mean of a region.",
    one: "similarity", all: "Similarity of all positions to",
  },
  assignments: {
    title: "Assignment to the codewords",
    note: "EncNet: the shares by which the position of the ringed pixel is assigned to learned codewords. Each picture shows where a codeword takes its least (dark) and its greatest share.",
    one: "share", all: "Share of all positions assigned to",
  },
};
const TILE = 240; // pixels of a tile's picture

export class Context {
  #record = null; #place = null; #buttons = new Map();

  constructor(section, onChoose, onPoint) {
    Object.assign(this, {section, onChoose, onPoint});
    [this.title, this.note, this.picked, this.tiles] = ["h3", ".note", ".picked", ".tiles"].map(part => section.querySelector(part));
    this.tiles.addEventListener("keydown", event => this.#key(event));
    this.tiles.addEventListener("focusin", event => this.#stop(event.target.closest("button")));
  }

  get kind() { return this.#record && KINDS[this.#record.kind]; }

  show(record, photo) {
    this.#record = record;
    this.section.hidden = false;
    this.#buttons.clear();
    this.tiles.replaceChildren();
    this.title.textContent = this.kind?.title ?? "Nothing to see inside";
    this.note.textContent = this.kind?.note ?? "This head pools no regions and has no codewords: a position sees what its convolutions reach.";
    if (!record) return;
    this.tiles.className = record.kind === "assignments" ? "tiles words" : "tiles";
    if (record.kind === "assignments") this.#addWords();
    else for (const part of record.scales) this.#addScale(part, photo);
    for (const group of this.#groups()) this.#stop(group.querySelector("button"));
  }

  pick(x, y, text) {
    this.picked.textContent = text;
    if (!this.#record || y >= this.#record.rows.values.length || x >= this.#record.columns.values.length) return; // of a picture before
    const {size, rows, columns, scales} = this.#record, at = [rows.values[y], columns.values[x]];
    this.#place = at[0] * size[1] + at[1];
    this.picked.textContent += `. Position ${at[1]}, ${at[0]} of ${size[1]} × ${size[0]}`;
    if (this.#record.kind === "assignments") return this.#fillWords();
    for (const {scale, maps} of scales) this.#fillScale(scale, maps.values, (x + 0.5) / columns.values.length, (y + 0.5) / rows.values.length);
  }

  choose(chosen) {
    for (const [key, button] of this.#buttons) button.setAttribute("aria-pressed", String(!!chosen && key === keyOf(chosen)));
  }

  heat(chosen) {
    if (!this.#record || !chosen || !this.#buttons.has(keyOf(chosen))) return null;
    const {size, rows, columns, scales, codewords} = this.#record, count = size[0] * size[1];
    const part = chosen.scale ? scales.find(({scale}) => scale === chosen.scale) : null;
    const values = (part?.maps ?? codewords).values.subarray(chosen.index * count, (chosen.index + 1) * count);
    return {
      values, size, limits: range(values), rows: rows.values, columns: columns.values,
      box: part?.boxes[chosen.index], one: this.kind.one, text: `${this.kind.all} ${nameOf(chosen)}`,
    };
  }

  #addScale({scale, boxes}, photo) {
    const {size: [height, width]} = this.#record, figure = add(this.tiles, "figure", "tile");
    const caption = add(figure, "figcaption");
    add(caption, "span").textContent = `${scale} × ${scale} region${scale > 1 ? "s" : ""}`;
    const board = add(figure, "div", "board"), canvas = add(board, "canvas");
    board.setAttribute("role", "group");
    board.setAttribute("aria-label", `${this.kind.title}: ${scale} × ${scale}`);
    board.style.setProperty("--scale", scale);
    board.style.setProperty("--width", photo.width);
    board.style.setProperty("--height", photo.height);
    const shrunk = Math.min(1, TILE / Math.max(photo.width, photo.height));
    Object.assign(canvas, {width: Math.ceil(photo.width * shrunk), height: Math.ceil(photo.height * shrunk)});
    canvas.getContext("2d").drawImage(photo, 0, 0, canvas.width, canvas.height);
    boxes.forEach(([top, left, bottom, right], index) => {
      const button = this.#addButton(board, {scale, index});
      Object.assign(button.style, {left: percent(left / width), top: percent(top / height), width: percent((right - left) / width), height: percent((bottom - top) / height)});
    });
    add(board, "div", "mark").hidden = true;
    const bar = add(figure, "div", "scale");
    for (const tag of ["span", "i", "span"]) add(bar, tag);
  }

  #fillScale(scale, values, across, down) {
    const count = this.#record.size[0] * this.#record.size[1];
    const its = Array.from({length: scale * scale}, (_, index) => values[index * count + this.#place]), limits = range(its);
    its.forEach((value, index) => {
      const button = this.#buttons.get(keyOf({scale, index}));
      button.style.backgroundColor = `rgba(${color(value, limits)}, .66)`;
      button.textContent = number(value);
      button.dataset.value = value;
      button.setAttribute("aria-label", `${nameOf({scale, index})}, ${this.kind.one} ${number(value)}`);
    });
    const figure = this.#buttons.get(keyOf({scale, index: 0})).closest(".tile"), mark = figure.querySelector(".mark");
    Object.assign(mark.style, {left: percent(across), top: percent(down)});
    mark.hidden = false;
    showScale(figure.querySelector(".scale"), limits);
  }

  #addWords() {
    const {size, codewords} = this.#record, count = size[0] * size[1];
    this.tiles.setAttribute("role", "group");
    this.tiles.setAttribute("aria-label", this.kind.title);
    for (let index = 0; index < codewords.shape[0]; index++) {
      const button = this.#addButton(this.tiles, {index}), values = codewords.values.subarray(index * count, (index + 1) * count);
      const canvas = button.appendChild(heatmap(values, size, range(values))), text = add(button, "span");
      canvas.setAttribute("aria-hidden", "true");
      add(text, "b").textContent = index + 1;
      add(text, "span");
      add(button, "i");
    }
  }

  #fillWords() {
    const {size, codewords} = this.#record, count = size[0] * size[1];
    const its = Array.from({length: codewords.shape[0]}, (_, index) => codewords.values[index * count + this.#place]), most = Math.max(...its);
    its.forEach((value, index) => {
      const button = this.#buttons.get(keyOf({index})), text = `${(100 * value).toFixed(1)} %`;
      button.querySelector("span > span").textContent = text;
      button.querySelector("i").style.width = percent(value / most);
      button.dataset.value = value;
      button.setAttribute("aria-label", `${nameOf({index})}, ${this.kind.one} ${text}`);
    });
  }

  #addButton(parent, chosen) {
    const button = add(parent, "button");
    Object.assign(button, {type: "button", tabIndex: -1});
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", nameOf(chosen));
    button.addEventListener("click", () => this.onChoose(button.getAttribute("aria-pressed") === "true" ? null : chosen));
    const box = this.#record.scales.find(({scale}) => scale === chosen.scale)?.boxes[chosen.index];
    for (const kind of ["pointerenter", "focus"]) button.addEventListener(kind, () => this.onPoint(box ?? null, this.#record.size));
    for (const kind of ["pointerleave", "blur"]) button.addEventListener(kind, () => this.onPoint(null));
    this.#buttons.set(keyOf(chosen), button);
    return button;
  }

  // A tile is one stop of the tabulator; arrow keys move within it.

  #groups() { return this.#record.kind === "assignments" ? [this.tiles] : [...this.tiles.querySelectorAll(".board")]; }

  #stop(button) {
    if (!button) return;
    for (const other of button.parentElement.querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  }

  #key(event) {
    const button = event.target.closest("button"), group = button?.parentElement, all = [...group?.querySelectorAll("button") ?? []];
    const across = group?.style.getPropertyValue("--scale") || all.filter(other => other.offsetTop === all[0].offsetTop).length;
    const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: +across}[event.key];
    if (!move) return;
    event.preventDefault();
    all[all.indexOf(button) + move]?.focus();
  }
}

const percent = share => `${100 * share}%`;
const keyOf = ({scale = 0, index}) => `${scale}:${index}`;
const nameOf = ({scale, index}) => scale
  ? `region in row ${Math.floor(index / scale) + 1}, column ${index % scale + 1} of ${scale} × ${scale}` : `codeword ${index + 1}`;

function add(parent, tag, className = "") {
  return parent.appendChild(Object.assign(document.createElement(tag), {className}));
}
