"use strict";
// Adds to a page that is complete without it: values under the pointer, one preview at a time, and rows or columns of
// the confusion matrix.
const write = (value, percent) => percent ? (100 * value).toPrecision(4) + " %" : Number(value.toPrecision(4)).toString();

for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const {lines, frame: [low, high, left, right], percent} = JSON.parse(figure.querySelector("script").textContent);
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip"; tip.hidden = true;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), wide = svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / box.width * wide, x = low + (at - left) / (right - left) * (high - low);
    const near = line => line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const step = near(lines[0])[0], place = left + (step - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.style.visibility = "visible";
    tip.textContent = `step ${step.toLocaleString()}: ` + lines.map(line => `${line.name} ${write(near(line)[1], percent)}`).join(", ");
    tip.hidden = false;
    tip.style.left = Math.max(0, Math.min(place / wide * box.width + 10, box.width - tip.offsetWidth)) + "px";
    tip.style.top = svg.offsetTop + 6 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
}

for (const group of document.querySelectorAll(".previews")) {
  const figures = [...group.querySelectorAll("figure")];
  if (figures.length < 2) continue;
  const bar = document.createElement("div"), range = document.createElement("input"), text = document.createElement("output");
  bar.className = "slider"; range.type = "range"; range.min = 0; range.max = figures.length - 1; range.value = figures.length - 1;
  range.setAttribute("aria-label", "evaluation");
  bar.append(range, text); group.prepend(bar);
  const show = () => figures.forEach((figure, i) => {
    figure.hidden = i != range.value;
    if (!figure.hidden) text.textContent = figure.querySelector("figcaption").textContent;
    figure.querySelector("figcaption").hidden = true;
  });
  range.addEventListener("input", show); show();
}

for (const choice of document.querySelectorAll(".choice")) {
  choice.hidden = false;
  const tables = [...choice.parentElement.querySelectorAll(".share")];
  const show = () => tables.forEach(table => table.hidden = table.dataset.share != choice.querySelector("input:checked").value);
  choice.addEventListener("change", show); show();
}
