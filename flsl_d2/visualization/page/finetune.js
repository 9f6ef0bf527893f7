// Draws the report of a detector from the embedded data.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 24; // pictures that are added at a time
const COLOURS = { right: "#3ddc84", missed: "#ffb300", false: "#ff5252", confused: "#e08cff" };
const CROWD = -2;
const state = {
  kind: Object.keys(data.kinds).at(-1),
  threshold: data.threshold,
  label: -1, // the class that is shown alone, -1 for all
  filter: "all",
  count: PAGE,
};

function element(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

/** What the threshold and the class leave of an image: objects by outcome. */
function outcomes(image) {
  const of = (label) => state.label < 0 || label === state.label;
  const result = { right: [], missed: [], false: [], confused: [], pairs: [] };
  const taken = new Set();
  for (const [label, score, match, box, outline] of image.found) {
    if (score < state.threshold || match === CROWD) continue;
    const truth = match < 0 ? -1 : image.truth[match][0];
    if (match >= 0) taken.add(match);
    if (!of(label) && !of(truth)) continue;
    const kind = truth === label ? "right" : truth < 0 ? "false" : "confused";
    const name = data.classes[label] + (kind === "confused" ? ` (is ${data.classes[truth]})` : "");
    result[kind].push({ text: `${name} ${score.toFixed(2)}`, box, outline });
    if (kind !== "right") result.pairs.push([truth, label]);
  }
  image.truth.forEach(([label, box, outline], i) => {
    if (taken.has(i) || !of(label)) return;
    result.missed.push({ text: data.classes[label], box, outline });
    result.pairs.push([label, -1]);
  });
  result.errors = result.missed.length + result.false.length + result.confused.length;
  return result;
}

function draw(canvas, image, found) {
  const scale = Math.max(1, 640 / image.width);
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  const context = canvas.getContext("2d");
  const picture = new Image();
  picture.onload = () => {
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.scale(scale, scale);
    context.lineWidth = 3 / scale;
    context.font = `${20 / scale}px system-ui, sans-serif`;
    for (const kind of ["right", "missed", "confused", "false"]) {
      context.setLineDash(kind === "missed" ? [6 / scale, 4 / scale] : []);
      for (const { text, box, outline } of found[kind]) {
        const [x0, y0, x1, y1] = box;
        context.strokeStyle = COLOURS[kind];
        context.beginPath();
        if (state.kind === "segm" && outline.length)
          for (const points of outline) {
            context.moveTo(points[0], points[1]);
            for (let i = 2; i < points.length; i += 2) context.lineTo(points[i], points[i + 1]);
            context.closePath();
          }
        else context.rect(x0, y0, x1 - x0, y1 - y0);
        context.stroke();
        const [width, height] = [context.measureText(text).width + 4 / scale, 26 / scale];
        const left = Math.max(0, Math.min(x0, image.width - width));
        const top = y0 > height ? y0 - height : Math.min(y1, image.height - height);
        context.fillStyle = "#000c";
        context.fillRect(left, top, width, height);
        context.fillStyle = COLOURS[kind];
        context.fillText(text, left + 2 / scale, top + 20 / scale);
      }
    }
    canvas.dataset.drawn = "yes";
  };
  picture.src = image.jpeg;
}

function showPictures() {
  const all = data.images.map((image) => [image, outcomes(image)]);
  const sum = (kind) => all.reduce((total, [, found]) => total + found[kind].length, 0);
  const [right, wrong, missed, confused] = ["right", "false", "missed", "confused"].map(sum);
  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "n/a");
  byId("counts").textContent = `${right} right, ${missed} missed, ${wrong} false alarms, ` +
    `${confused} wrong classes; precision ${share(right, right + wrong + confused)}, ` +
    `recall ${share(right, right + missed + confused)}`;
  const fits = { all: () => true, errors: (found) => found.errors };
  const kept = all.filter(([, found]) => (fits[state.filter] ?? ((f) => f[state.filter].length))(found));
  kept.sort((a, b) => b[1].errors - a[1].errors);
  const box = byId("pictures");
  box.replaceChildren();
  for (const [image, found] of kept.slice(0, state.count)) {
    const figure = element("figure");
    const canvas = element("canvas", "", "zoom");
    const counts = `${found.right.length} right, ${found.missed.length} missed, ` +
      `${found.false.length} false, ${found.confused.length} wrong class`;
    canvas.setAttribute("aria-label", `${image.name}: ${counts}`);
    figure.append(canvas, element("figcaption", `${image.name}: ${counts}`));
    box.append(figure);
    draw(canvas, image, found);
  }
  if (!kept.length) box.append(element("p", "No picture is left.", "note"));
  byId("more").hidden = kept.length <= state.count;
  showConfusions(all);
}

function showConfusions(all) {
  const counts = new Map();
  for (const [, { pairs }] of all)
    for (const pair of pairs) counts.set(`${pair}`, (counts.get(`${pair}`) ?? 0) + 1);
  const table = byId("confusions");
  table.replaceChildren(row(["annotated", "found", "times"], "th"));
  const name = (label) => (label < 0 ? "nothing" : data.classes[label]);
  const sorted = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 30);
  for (const [pair, count] of sorted) {
    const [truth, label] = pair.split(",").map(Number);
    table.append(row([name(truth), name(label), `${count}`], "td"));
  }
}

function row(cells, tag) {
  const node = element("tr");
  node.append(...cells.map((cell) => {
    const node = element(tag);
    node.append(cell);
    return node;
  }));
  return node;
}

function showClasses() {
  const heads = Object.keys(data.figures).map((key) => {
    const [kind, measure] = key.split("/");
    return `${data.kinds[kind].name} ${measure}`;
  });
  const table = byId("classes");
  table.replaceChildren(row(["class", "objects", ...heads], "th"));
  [-1, ...data.shown].forEach((label, place) => {
    const button = element("button", label < 0 ? "all" : data.classes[label]);
    button.type = "button";
    button.addEventListener("click", () => choose(label));
    const values = Object.values(data.figures).map((column) => column[place]?.toFixed(1) ?? "-");
    table.append(row([button, `${data.counts[place]}`, ...values], "td"));
  });
}

function showCurve() {
  const svg = byId("curve");
  const make = (tag, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    svg.append(node);
  };
  svg.replaceChildren();
  const { curves, name } = data.kinds[state.kind];
  const [x, y] = [(recall) => 45 + 360 * recall, (precision) => 260 - 245 * precision];
  for (let i = 0; i <= 5; i++) {
    const at = i / 5;
    make("path", { class: "grid", d: `M${x(at)} ${y(0)}V${y(1)}M${x(0)} ${y(at)}H${x(1)}` });
    make("text", { x: x(at), y: y(0) + 16, "text-anchor": "middle" }, at.toFixed(1));
    make("text", { x: x(0) - 6, y: y(at) + 4, "text-anchor": "end" }, at.toFixed(1));
  }
  make("text", { x: x(0.5), y: 296, "text-anchor": "middle" }, "recall");
  make("text", { x: 0, y: 0, transform: `translate(12 ${y(0.5)}) rotate(-90)`, "text-anchor": "middle" }, "precision");
  const line = (curve) => "M" + curve.map((p, i) => `${x(i / (curve.length - 1)).toFixed(1)} ${y(p ?? 0).toFixed(1)}`).join("L");
  const place = data.shown.indexOf(state.label) + 1;
  if (curves.length) make("path", { class: place ? "mean" : "one", d: line(curves[0]) });
  if (curves.length && place) make("path", { class: "one", d: line(curves[place]) });
  byId("curve-title").textContent = `Of the ${name === "box" ? "boxes" : "masks"} at an IoU of 0.5: ` +
    (place ? `${data.classes[state.label]}, and in grey the mean of all classes.` : "the mean of all classes.");
}

function choose(label) {
  state.label = label;
  byId("class").value = `${label}`;
  update();
}

function update() {
  state.count = PAGE;
  showCurve();
  showPictures();
}

function start() {
  for (const [kind, { name }] of Object.entries(data.kinds)) {
    const label = element("label");
    const input = element("input");
    input.type = "radio";
    input.name = "kind";
    input.value = kind;
    input.checked = kind === state.kind;
    input.addEventListener("change", () => { state.kind = kind; update(); });
    label.append(input, name === "box" ? " boxes" : " masks");
    byId("kinds").append(label);
  }
  const slider = byId("threshold");
  slider.min = data.lowest.toFixed(2);
  slider.value = state.threshold;
  const say = () => { byId("threshold-shown").textContent = state.threshold.toFixed(2); };
  slider.addEventListener("input", () => { state.threshold = Number(slider.value); say(); update(); });
  say();
  for (const label of data.shown) {
    const option = element("option", data.classes[label]);
    option.value = label;
    byId("class").append(option);
  }
  byId("class").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("filter").addEventListener("change", (event) => { state.filter = event.target.value; update(); });
  byId("more").addEventListener("click", () => { state.count += PAGE; showPictures(); });
  showClasses();
  update();
}

start();
