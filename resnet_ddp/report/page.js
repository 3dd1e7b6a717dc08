"use strict";
// Draws the curves of the page's data; everything else is there without a script.
const NS = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 340, LEFT = 46, RIGHT = 62, TOP = 10, BOTTOM = 40;

function element(name, attributes, parent) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function text(parent, x, y, words, anchor = "middle", fill = null) {
  const made = element("text", { x, y, "text-anchor": anchor }, parent);
  if (fill) made.style.fill = fill;
  made.textContent = words;
}

function ticks(low, high) {
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((k) => k * unit >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) found.push(k * step);
  return found;
}

const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");

// series: {name, x, y, band?, colour, dash?, width?, end?}; x ascending.
function draw(figure, { series, top, bottom = 0, unit = "", drops = [], last }) {
  figure.querySelector("svg")?.remove();
  const WIDTH = Math.max(300, Math.min(640, figure.clientWidth - 20));
  const readout = figure.querySelector(".readout");
  const svg = element("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img",
    "aria-label": `${figure.querySelector("figcaption").textContent}: `
      + `${series.length} curves; left and right arrows read them`,
  });
  figure.insertBefore(svg, readout);
  const px = (x) => LEFT + (x / last) * (WIDTH - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - ((y - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
  for (const value of ticks(bottom, top)) {
    element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(value), y2: py(value) }, svg);
    text(svg, LEFT - 6, py(value) + 4, short(value), "end");
  }
  for (const value of ticks(0, last)) text(svg, px(value), HEIGHT - BOTTOM + 18, short(value));
  text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "iterations");
  for (const drop of drops) element("line", { class: "drop", x1: px(drop), x2: px(drop), y1: TOP, y2: HEIGHT - BOTTOM }, svg);
  element("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }, svg);
  const clip = `clip${draw.count = (draw.count || 0) + 1}`;
  element("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM }, element("clipPath", { id: clip }, svg));
  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
  let lastLabel = -99;
  for (const one of series) {
    const points = one.x.map((x, i) => [x, one.y[i]]);
    if (one.band) {
      const upper = one.x.map((x, i) => [x, one.y[i] + one.band[i]]);
      const lower = one.x.map((x, i) => [x, one.y[i] - one.band[i]]).reverse();
      const area = element("path", { d: path([...upper, ...lower]) + "Z", opacity: 0.18, "clip-path": `url(#${clip})` }, svg);
      area.style.fill = one.colour;
    }
    const line = element("path", { d: path(points), fill: "none", "stroke-width": one.width || 1.5, "clip-path": `url(#${clip})` }, svg);
    line.style.stroke = one.colour;
    if (one.dash) line.setAttribute("stroke-dasharray", "6 4");
    if (one.end && points.length) {
      let y = py(points.at(-1)[1]) + 4;
      if (Math.abs(y - lastLabel) < 13) y = lastLabel + 13;
      lastLabel = y;
      text(svg, px(points.at(-1)[0]) + 5, y, one.end, "start", one.colour);
    }
  }
  const places = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const cursor = element("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
  let at = places.length - 1;
  function show(index) {
    if (!places.length) return;
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    cursor.setAttribute("visibility", "visible");
    readout.replaceChildren(`iteration ${x.toLocaleString("en")}: `);
    for (const one of series) {
      const i = one.x.indexOf(x);
      if (i < 0) continue;
      const value = document.createElement("b");
      value.textContent = `${one.name} ${short(one.y[i])}${unit}`;
      value.style.color = one.colour;
      readout.append(value, " ");
    }
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * last;
    let nearest = 0;
    places.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(places[nearest] - x)) nearest = i; });
    show(nearest);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(at + step);
  });
}

const colour = (depth) => `var(--c${depth}, var(--ink))`;

function mean(curves) {
  const points = new Map();
  for (const { x, y } of curves) x.forEach((place, i) => points.set(place, [...(points.get(place) || []), y[i]]));
  const x = [...points.keys()].sort((a, b) => a - b);
  const y = x.map((place) => points.get(place).reduce((a, b) => a + b) / points.get(place).length);
  const band = x.map((place, i) => {
    const values = points.get(place);
    return values.length < 2 ? 0 : Math.sqrt(values.reduce((sum, v) => sum + (v - y[i]) ** 2, 0) / (values.length - 1));
  });
  return { x, y, band };
}

function drawGroup(section, group) {
  const chosen = (name) => [...section.querySelectorAll(`input[name="${name}"]:checked`)].map((box) => box.value);
  function redraw() {
    const models = chosen("model"), seeds = chosen("seed");
    for (const figure of section.querySelectorAll("figure.fig6")) {
      const series = [];
      for (const model of models) {
        const runs = group.runs.filter((run) => run.model === model && seeds.includes(String(run.seed)) && run.panel === figure.dataset.panel);
        for (const [key, words, dash] of [["train", "training", true], ["val", "validation", false]]) {
          const curves = runs.map((run) => run.curves[key]).filter((curve) => curve && curve.x.length);
          if (curves.length) series.push({ ...mean(curves), name: `${model} ${words}`, colour: colour(runs[0].depth), dash, width: dash ? 1.3 : 2.6, end: dash ? "" : `${runs[0].depth}-layer` });
        }
      }
      draw(figure, { series, top: group.top, unit: "%", drops: group.drops, last: group.iterations });
    }
  }
  for (const box of section.querySelectorAll('input[name="model"], input[name="seed"]')) box.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  redraw();
}

function drawRun(details, run, group) {
  const common = { drops: group.drops, last: group.iterations };
  for (const figure of details.querySelectorAll("figure")) {
    const names = figure.dataset.curves.split(" ");
    const looks = [{ colour: "var(--c20)" }, { colour: "var(--c56)", width: 2.4 }];
    const series = names.map((name, i) => ({ name, ...run.curves[name], ...(names.length > 1 ? looks[i] : looks[0]), dash: name === "train" })).filter((one) => one.x && one.x.length);
    const highest = Math.max(...series.flatMap((one) => one.y), 0);
    draw(figure, { ...common, series, top: highest * 1.05 || 1, unit: names[0] === "train" ? "%" : "" });
  }
}

data.groups.forEach((group, index) => {
  const section = document.getElementById(`group-${index}`);
  drawGroup(section, group);
  section.querySelectorAll("details.run").forEach((details, i) => {
    const open = () => { if (details.open && !details.dataset.drawn) { details.dataset.drawn = "1"; drawRun(details, group.runs[i], group); } };
    details.addEventListener("toggle", open);
  });
});

function follow() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", follow);
follow();
