/* Shows a picture with the colours of its labels, names the class under the pointer, and lists the classes' shares.

  const overlay = new Overlay(figure, {classes, palette, clear, describe, onPick});
    figure     an empty element with the class "stage"; it gets canvases, a tip and a live region
    classes    names of the classes
    palette    [[r, g, b], …], 0–255
    clear      labels that stay without colour (apcnet.draw.backgrounds)
    describe   (x, y, label) => text or promise of a text, for the tip; by default the name of the class
    onPick     (x, y, label) => …, called at a click, and at Enter or space for the pixel of the crosshair
  overlay.show(image, labels, name)  image: what drawImage takes, with width and height; labels: one integer a pixel, or
                                     null for the picture alone; name: what a screen reader calls the picture
  overlay.opacity = 0.5              share of the colours, 0 to 1
  overlay.only = label               shows one class alone; null shows all
  overlay.point(x, y)                moves the crosshair and the tip to a pixel; overlay.point(null) hides them
  overlay.fillLegend(list)           fills a <ul class="legend"> with a button for each class that occurs
  overlay.shares()                   [[label, share], …], the largest first
  overlay.picture()                  a canvas with the picture and its colours, as they are shown
  overlay.drawing                    a canvas of the picture's size above the colours, for drawings of your own

  takePhotos(area, input, onPhoto, onRefused)  hands over image files that are dropped on an element, pasted into the page
                                             or chosen in an <input type="file">; calls onRefused(text) for other files

The styles are in overlay.css, and hold for a whole page. The report of a run has the same colours and shapes.
*/

const STEP = 10; // pixels that shift and an arrow key move the crosshair by

export class Overlay {
  #labels = null; #only = null; #opacity = 0.5; #place = null; #asked = 0; #counts = [];

  constructor(figure, {classes, palette, clear = [], describe, onPick} = {}) {
    Object.assign(this, {figure, classes, palette, clear: new Set(clear), onPick});
    this.describe = describe ?? ((x, y, label) => classes[label] ?? "ignored");
    [this.photo, this.colours, this.drawing] = ["photo", "colours", "drawing"].map(name => {
      const canvas = figure.appendChild(document.createElement("canvas"));
      canvas.className = name;
      canvas.setAttribute("aria-hidden", "true");
      return canvas;
    });
    this.cross = element(figure, "div", "cross");
    this.tip = element(figure, "div", "tip");
    this.live = element(figure, "div", "unseen");
    this.live.setAttribute("aria-live", "polite");
    this.cross.hidden = this.tip.hidden = true;
    figure.tabIndex = 0;
    figure.setAttribute("role", "application"); // arrow keys reach the page through a screen reader
    figure.setAttribute("aria-roledescription", "picture with labels");
    for (const kind of ["pointermove", "pointerdown"]) figure.addEventListener(kind, event => {
      this.point(...this.#pixel(event));
      this.cross.hidden = true; // the pointer is there itself
    });
    figure.addEventListener("pointerleave", () => this.point(null));
    figure.addEventListener("blur", () => this.point(null));
    figure.addEventListener("click", () => this.#pick());
    figure.addEventListener("keydown", event => this.#key(event));
  }

  get width() { return this.photo.width; }
  get height() { return this.photo.height; }
  get opacity() { return this.#opacity; }
  set opacity(value) { this.#opacity = value; this.colours.style.opacity = value; }
  get only() { return this.#only; }
  set only(label) { if (label !== this.#only) { this.#only = label; this.#paint(); } }

  show(image, labels, name = "picture") {
    for (const canvas of [this.photo, this.colours, this.drawing]) {
      canvas.width = image.width;
      canvas.height = image.height;
    }
    this.figure.style.setProperty("--width", image.width);
    this.figure.style.setProperty("--height", image.height);
    this.photo.getContext("2d").drawImage(image, 0, 0);
    this.#labels = labels;
    this.#only = null;
    this.#counts = new Array(this.classes.length).fill(0);
    for (const label of labels ?? []) this.#counts[label]++;
    this.figure.setAttribute("aria-label", `${name}, ${image.width} × ${image.height} pixels. Arrow keys move a crosshair.`);
    this.opacity = this.#opacity;
    this.point(null);
    this.#paint();
  }

  shares() {
    const found = this.#counts.map((count, label) => [label, count / this.#labels.length]);
    return found.filter(([label, share]) => share && label < this.classes.length).sort((a, b) => b[1] - a[1]);
  }

  fillLegend(list) {
    list.classList.add("legend");
    list.replaceChildren(...this.shares().map(([label, share]) => {
      const item = document.createElement("li"), button = element(item, "button");
      const swatch = element(button, "span", this.clear.has(label) ? "swatch clear" : "swatch");
      swatch.style.color = `rgb(${this.palette[label].join()})`;
      element(button, "span", "name").textContent = this.classes[label];
      element(button, "span", "share").textContent = share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      const pinned = () => list.querySelector("[aria-pressed=true]");
      button.addEventListener("pointerenter", () => { if (!pinned()) this.only = label; });
      button.addEventListener("pointerleave", () => { if (!pinned()) this.only = null; });
      button.addEventListener("click", () => {
        const pressed = button.getAttribute("aria-pressed") === "true";
        pinned()?.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(!pressed));
        this.only = pressed ? null : label;
      });
      return item;
    }));
  }

  picture() {
    const canvas = document.createElement("canvas"), draw = canvas.getContext("2d");
    Object.assign(canvas, {width: this.width, height: this.height});
    draw.drawImage(this.photo, 0, 0);
    draw.globalAlpha = this.#opacity;
    draw.drawImage(this.colours, 0, 0);
    return canvas;
  }

  point(x, y) {
    this.cross.hidden = this.tip.hidden = x === null || !this.width;
    this.#place = this.tip.hidden ? null : [x, y];
    const asked = ++this.#asked;
    if (!this.#place) return;
    const across = (x + 0.5) / this.width, down = (y + 0.5) / this.height;
    for (const part of [this.cross, this.tip]) {
      part.style.left = `${100 * across}%`;
      part.style.top = `${100 * down}%`;
    }
    this.tip.classList.toggle("before", across > 0.5);
    this.tip.classList.toggle("above", down > 0.5);
    const label = this.#labels?.[y * this.width + x];
    Promise.resolve(label === undefined ? `${x}, ${y}` : this.describe(x, y, label)).then(text => {
      if (asked === this.#asked) this.tip.textContent = text;
      if (asked === this.#asked && document.activeElement === this.figure) this.live.textContent = text;
    });
  }

  #paint() {
    if (!this.width) return;
    const draw = this.colours.getContext("2d");
    draw.clearRect(0, 0, this.width, this.height);
    if (!this.#labels) return;
    const picture = draw.createImageData(this.width, this.height);
    const table = new Uint8Array(4 * Math.max(this.classes.length, 256)); // labels outside the classes stay clear
    this.palette.forEach((colour, label) => {
      const shown = this.#only === null ? !this.clear.has(label) : label === this.#only;
      table.set([...colour, shown ? 255 : 0], 4 * label);
    });
    const pixels = new Uint32Array(picture.data.buffer), colours = new Uint32Array(table.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = colours[this.#labels[i]];
    draw.putImageData(picture, 0, 0);
  }

  #pixel(event) {
    const box = this.photo.getBoundingClientRect();
    const along = (at, start, length, count) => Math.max(0, Math.min(count - 1, Math.floor((at - start) / length * count)));
    return [along(event.clientX, box.left, box.width, this.width), along(event.clientY, box.top, box.height, this.height)];
  }

  #pick() {
    if (this.#place) this.onPick?.(...this.#place, this.#labels?.[this.#place[1] * this.width + this.#place[0]]);
  }

  #key(event) {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.key === "Escape") this.point(null);
    else if (event.key === "Enter" || event.key === " ") this.#pick();
    else if (!moves[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    else {
      const [x, y] = this.#place ?? [this.width >> 1, this.height >> 1], step = event.shiftKey ? STEP : 1;
      const [right, down] = this.#place ? moves[event.key] : [0, 0]; // the first key shows the crosshair
      const within = (value, count) => Math.max(0, Math.min(count - 1, value));
      this.point(within(x + step * right, this.width), within(y + step * down, this.height));
    }
    event.preventDefault();
  }
}

export function takePhotos(area, input, onPhoto, onRefused = () => {}) {
  const take = files => {
    const photo = [...files].find(file => file.type.startsWith("image/"));
    if (photo) onPhoto(photo);
    else if (files.length) onRefused(`${files[0].name}: expected an image, got ${files[0].type || "a file of another kind"}`);
  };
  input.addEventListener("change", () => { take(input.files); input.value = ""; }); // the same file can be chosen again
  document.addEventListener("paste", event => take(event.clipboardData.files));
  let depth = 0; // enters minus leaves: children of the area send both as well
  const mark = change => area.classList.toggle("dropping", (depth = change ? Math.max(0, depth + change) : 0) > 0);
  area.addEventListener("dragenter", event => { event.preventDefault(); mark(1); });
  area.addEventListener("dragover", event => event.preventDefault());
  area.addEventListener("dragleave", () => mark(-1));
  area.addEventListener("drop", event => { event.preventDefault(); mark(0); take(event.dataTransfer.files); });
}

function element(parent, tag, className = "") {
  const child = parent.appendChild(document.createElement(tag));
  child.className = className;
  return child;
}
