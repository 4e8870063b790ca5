"use strict";
// Values under the pointer. Without this script the page only lacks them.
for (const figure of document.querySelectorAll("figure.chart")) {
  const area = figure.querySelector(".area");
  const data = JSON.parse(figure.querySelector("script.points").textContent);
  const [left, right] = data.range;
  const [low, high, log] = data.scale;
  const rule = document.createElement("div");
  const tip = document.createElement("div");
  rule.className = "rule";
  tip.className = "tip";
  rule.hidden = tip.hidden = true;
  area.append(rule, tip);

  const nearest = (xs, x) => {
    let from = 0, to = xs.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (xs[middle] < x) from = middle; else to = middle;
    }
    return Math.abs(xs[from] - x) <= Math.abs(xs[to] - x) ? from : to;
  };
  const text = (value) => {
    if (value === null) return "not a number";
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
    return Number(value.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 6 });
  };
  const hide = () => { rule.hidden = tip.hidden = true; };
  const show = (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = left + share * (right - left);
    const slack = 0.05 * (right - left);  // beyond its ends, a curve has no value to show
    const places = data.lines
      .filter((line) => line.x.length && x >= line.x[0] - slack && x <= line.x.at(-1) + slack)
      .map((line) => [line, nearest(line.x, x)]);
    if (!places.length) return hide();
    const at = places
      .map(([line, index]) => line.x[index])
      .reduce((best, place) => (Math.abs(place - x) < Math.abs(best - x) ? place : best));
    const percent = (100 * (at - left)) / (right - left);
    rule.style.left = percent + "%";
    tip.replaceChildren();
    const head = document.createElement("p");
    head.textContent = at.toLocaleString("en", { maximumFractionDigits: data.unit === "tokens" ? 0 : 2 }) + " " + data.unit;
    tip.append(head);
    for (const [line, index] of places) {
      const row = document.createElement("p");
      const swatch = document.createElement("i");
      const value = document.createElement("b");
      swatch.className = "swatch c" + line.color;
      value.textContent = text(line.y[index]);
      row.append(swatch, line.name + " ", value);
      tip.append(row);
    }
    rule.hidden = tip.hidden = false;
    const room = box.width - tip.offsetWidth;
    const wanted = (percent / 100) * box.width + (share < 0.5 ? 12 : -tip.offsetWidth - 12);
    tip.style.left = Math.max(0, Math.min(room, wanted)) + "px";
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}
