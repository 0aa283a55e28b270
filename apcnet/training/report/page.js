"use strict";
// Adds to a page that is complete without it: values under the pointer, one preview at a time, rows or columns of the
// confusion matrix, tables in any order, and reading the page anew while a run goes on.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const add = (parent, tag, properties = {}) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const write = (value, percent) => percent ? (100 * value).toFixed(2) + " %" : Number(value.toPrecision(4)).toString();

for (const figure of all(".chart")) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const {lines, frame: [low, high, left, right], percent} = JSON.parse(figure.querySelector("script").textContent);
  const tip = add(figure, "div", {className: "tip", hidden: true});
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / box.width * wide, x = low + (at - left) / (right - left) * (high - low);
    const near = line => line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const step = near(lines[0])[0], place = left + (step - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.style.visibility = "visible";
    tip.textContent = [`step ${step.toLocaleString("en")}`, ...lines.map(line => `${line.name} ${write(near(line)[1], percent)}`)].join("\n");
    tip.hidden = false;
    const x0 = svg.offsetLeft || 0, pixel = svg.getBoundingClientRect().left - figure.getBoundingClientRect().left + place / wide * box.width;
    const flipped = pixel + tip.offsetWidth + 12 > figure.clientWidth;
    tip.style.left = Math.max(0, flipped ? pixel - tip.offsetWidth - 12 : pixel + 12) + "px";
    tip.style.top = box.top - figure.getBoundingClientRect().top + 8 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
}

for (const group of all(".previews")) {
  const steps = [...new Set(all("[data-step]", group).map(panel => Number(panel.dataset.step)))].sort((a, b) => a - b);
  const bar = document.createElement("div");
  bar.className = "card controls";
  const slider = (name, properties, show) => {
    const label = add(bar, "label", {textContent: name}), range = add(label, "input", {type: "range", ...properties});
    const text = add(label, "output"), update = () => text.textContent = show(Number(range.value));
    range.name = name; range.value = properties.value;
    range.addEventListener("input", update); update();
  };
  if (steps.length > 1) {
    slider("step", {min: 0, max: steps.length - 1, value: steps.length - 1}, at => {
      for (const panel of all("[data-step]", group)) panel.hidden = Number(panel.dataset.step) !== steps[at];
      return steps[at].toLocaleString("en");
    });
  }
  slider("labels", {min: 0, max: 100, value: 100}, share => { group.style.setProperty("--labels", share / 100); return share + " %"; });
  group.prepend(bar);
}

for (const choice of all(".choice")) {
  choice.hidden = false;
  const card = choice.parentElement, tables = all(".share", card), readout = card.querySelector(".readout");
  const show = () => tables.forEach(table => table.hidden = table.dataset.share !== choice.querySelector("input:checked").value);
  choice.addEventListener("change", show); show();
  readout.hidden = false;
  const read = event => {
    const cell = event.target.closest("td[title], td[data-title]");
    if (!cell) return;
    if (cell.title) { cell.dataset.title = cell.title; cell.removeAttribute("title"); }
    all(".at", card).forEach(other => other.classList.remove("at"));
    cell.classList.add("at");
    readout.textContent = cell.dataset.title;
  };
  card.addEventListener("pointerover", read); card.addEventListener("click", read);
}

for (const table of all(".sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  all("thead th", table).forEach((head, column) => {
    const isNumber = head.classList.contains("n");
    if (!isNumber && column) return;
    const button = document.createElement("button");
    button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      all("[aria-sort]", table).forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      const key = row => isNumber ? Number(row.cells[column].dataset.value) : rows.indexOf(row);
      body.append(...[...rows].sort((a, b) => (now === "ascending" ? 1 : -1) * (key(a) - key(b))));
    });
  });
}

for (const button of all(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
    catch { button.textContent = "selected"; }
    setTimeout(() => button.textContent = "copy", 1500);
  });
}

const seconds = Number(document.body.dataset.refresh || 0);
if (seconds) {
  const label = document.querySelector(".refresh"), box = label.querySelector("input"), key = "apcnet" + location.pathname;
  const controls = () => all(".controls input, .choice input, .refresh input");
  label.hidden = false;
  try {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    if (kept) {
      controls().forEach((input, i) => {
        const [value, checked, isLast] = kept.inputs[i] || [input.value, input.checked, false];
        if (input.type === "range" && !isLast) input.value = value;
        input.checked = checked;
      });
      controls().forEach(input => input.dispatchEvent(new Event(input.type === "range" ? "input" : "change", {bubbles: true})));
      document.documentElement.style.scrollBehavior = "auto"; scrollTo(0, kept.top); document.documentElement.style.scrollBehavior = "";
    }
  } catch { /* without storage, the page begins at its top */ }
  setInterval(() => {
    if (!box.checked || document.hidden) return;
    const inputs = controls().map(input => [input.value, input.checked, input.value === input.max]);
    try { sessionStorage.setItem(key, JSON.stringify({inputs, top: scrollY})); } catch { /* as above */ }
    location.reload();
  }, 1000 * seconds);
}
