// Draws the page from the embedded data; the numbers come from maths.js.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const MAPS = [
  ["attention", "attention", "softmax of scale · q·k, in multiples of the even share 1 / N; blue is low, red is high"],
  ["mode", "similarity with the mode", "cosine of each token with where the chosen one arrives; blue is low, red is high"],
  ["clusters", "clusters", "tokens whose modes meet, after mean-shift to convergence"],
  ["pca", "PCA", "first three principal components of this image's tokens as RGB"],
  ["pcaAll", "PCA of all images", "the same components for all images: one colour, one meaning"],
];
const turbo = Maths.bytesOf(data.turbo);
const palette = Maths.bytesOf(data.palette);
const PANEL = 448; // pixels of a canvas across
const NEAREST = 10;
const LEAST_RANGE = 0.05; // of cosines: smaller differences get no full contrast
const byId = (id) => document.getElementById(id);
const state = {
  shown: new Set(data.encoders.length < 3 ? ["attention", "mode", "clusters", "pca"] : ["mode", "clusters"]),
  scale: data.chosenScale, // its place in data.scales
  iterations: data.iterations,
  opacity: 0.6,
  row: 0, // the image whose token was chosen last
};
const panels = []; // {row, encoder, kind, canvas, caption}
const values = new Map(); // what a panel shows, for the readout

function element(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function tokensOf(encoder, row) {
  const at = encoder.images[row];
  at.decoded ??= Maths.decodeHalf(at.tokens);
  return at.decoded;
}

function tokenAt(grid, [x, y]) {
  const cell = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return cell(y, grid.rows) * grid.columns + cell(x, grid.columns);
}

function labelsOf(encoder, row) {
  return Maths.decodeLabels(encoder.images[row].labels[state.scale]);
}

const round = (value) => value.toPrecision(2).includes("e") ? value.toFixed(0) : Number(value.toPrecision(2));
const percent = (share) => `${(100 * share).toFixed(0)}\u00a0%`;

/** {numbers, colours (N * 3), caption} of one map. */
function compute(kind, encoder, row) {
  const at = encoder.images[row];
  if (kind === "pca" || kind === "pcaAll") return { colours: Maths.bytesOf(at[kind]), caption: "" };
  if (kind === "clusters") {
    const labels = labelsOf(encoder, row);
    const colours = new Uint8Array(3 * labels.length);
    labels.forEach((label, i) => {
      const from = 3 * (label % (palette.length / 3));
      for (let c = 0; c < 3; c++) colours[3 * i + c] = palette[from + c];
    });
    const { count, largest } = clusterNumbers(labels);
    const caption = `${count}, largest ${percent(largest)}`;
    return { numbers: labels, colours, caption, borders: true };
  }
  const tokens = tokensOf(encoder, row);
  const query = Maths.tokenOf(tokens, encoder.width, tokenAt(at, data.images[row].point));
  const scale = data.scales[state.scale] / Math.sqrt(encoder.width);
  let numbers, low;
  if (kind === "attention") {
    numbers = Maths.attention(query, tokens, scale).map((weight) => weight * at.rows * at.columns);
    low = 0;
  } else {
    numbers = Maths.cosines(Maths.mode(query, tokens, scale, state.iterations), tokens);
    low = Math.min(...numbers, Math.max(...numbers) - LEAST_RANGE);
  }
  const high = Math.max(...numbers);
  const colours = new Uint8Array(3 * numbers.length);
  numbers.forEach((value, i) => {
    const level = Math.round((255 * (value - low)) / Math.max(high - low, 1e-12));
    for (let c = 0; c < 3; c++) colours[3 * i + c] = turbo[3 * level + c];
  });
  const caption = kind === "attention"
    ? `0 to ${round(high)} × even`
    : `${low.toFixed(2)} to ${high.toFixed(2)}`;
  return { numbers, colours, caption };
}

function clusterNumbers(labels) {
  const sizes = [];
  labels.forEach((label) => { sizes[label] = (sizes[label] ?? 0) + 1; });
  return { count: sizes.length, largest: Math.max(...sizes) / labels.length };
}

function cross(context, width, height, [x, y]) {
  const arm = Math.max(7, Math.min(width, height) / 24);
  for (const [colour, line] of [["#000", 5], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.beginPath();
    context.moveTo(x * width - arm, y * height);
    context.lineTo(x * width + arm, y * height);
    context.moveTo(x * width, y * height - arm);
    context.lineTo(x * width, y * height + arm);
    context.stroke();
  }
}

/** The middle of the token that a point lies in. */
function middle(grid, point) {
  const token = tokenAt(grid, point);
  const row = Math.floor(token / grid.columns);
  return [((token % grid.columns) + 0.5) / grid.columns, (row + 0.5) / grid.rows];
}

function drawBorders(context, labels, rows, columns, width, height) {
  context.strokeStyle = "#fff";
  context.lineWidth = 2;
  context.beginPath();
  for (let i = 0; i < labels.length; i++) {
    const [y, x] = [Math.floor(i / columns), i % columns];
    const [left, top] = [(x * width) / columns, (y * height) / rows];
    if (x > 0 && labels[i] !== labels[i - 1]) {
      context.moveTo(left, top);
      context.lineTo(left, top + height / rows);
    }
    if (y > 0 && labels[i] !== labels[i - columns]) {
      context.moveTo(left, top);
      context.lineTo(left + width / columns, top);
    }
  }
  context.stroke();
}

function draw(panel) {
  const image = data.images[panel.row];
  const { canvas } = panel;
  const context = canvas.getContext("2d");
  const [width, height] = [canvas.width, canvas.height];
  if (!panel.encoder) {
    context.drawImage(image.element, 0, 0, width, height);
    cross(context, width, height, image.point);
    return;
  }
  const grid = panel.encoder.images[panel.row];
  const { numbers, colours, caption, borders } = compute(panel.kind, panel.encoder, panel.row);
  values.set(canvas, numbers);
  const small = new OffscreenCanvas(grid.columns, grid.rows);
  const cells = new ImageData(grid.columns, grid.rows);
  for (let i = 0; i < grid.rows * grid.columns; i++) {
    cells.data.set(colours.subarray(3 * i, 3 * i + 3), 4 * i);
    cells.data[4 * i + 3] = 255;
  }
  small.getContext("2d").putImageData(cells, 0, 0);
  const isPca = panel.kind.startsWith("pca");
  if (!isPca) context.drawImage(borders ? image.element : image.grey, 0, 0, width, height);
  context.globalAlpha = isPca ? 1 : state.opacity;
  context.imageSmoothingEnabled = false; // one flat colour a token: that is the resolution there is
  context.drawImage(small, 0, 0, width, height);
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
  if (borders) drawBorders(context, numbers, grid.rows, grid.columns, width, height);
  cross(context, width, height, middle(grid, image.point));
  panel.caption.textContent = caption;
}

function drawRow(row) {
  panels.filter((panel) => panel.row === row).forEach(draw);
}

function choose(row, point) {
  data.images[row].point = point.map((share) => Math.min(Math.max(share, 0), 0.999999));
  state.row = row;
  drawRow(row);
  showNearest();
}

function pointOf(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function readout(panel, event) {
  const encoder = panel.encoder ?? data.encoders[0];
  const grid = encoder.images[panel.row];
  const token = tokenAt(grid, pointOf(event));
  const place = `row ${Math.floor(token / grid.columns) + 1}, column ${(token % grid.columns) + 1}`;
  const value = values.get(panel.canvas)?.[token];
  const meaning = value === undefined ? "" : {
    attention: `: attention ${round(value)} × even share`,
    mode: `: cosine ${value.toFixed(3)}`,
    clusters: `: cluster ${value + 1}`,
  }[panel.kind] ?? "";
  byId("readout").textContent = place + meaning;
}

function move(panel, event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const grid = (panel.encoder ?? data.encoders[0]).images[panel.row];
  const [x, y] = middle(grid, data.images[panel.row].point);
  choose(panel.row, [x + step[0] / grid.columns, y + step[1] / grid.rows]);
}

function addPanel(row, encoder, kind) {
  const image = data.images[row];
  const canvas = element("canvas");
  canvas.width = PANEL;
  canvas.height = Math.round((PANEL * image.height) / image.width);
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", `${kind || "image"} of ${image.name}`);
  const caption = element("figcaption", encoder ? "" : `${row + 1}: ${image.name}`);
  const panel = { row, encoder, kind, canvas, caption };
  canvas.addEventListener("click", (event) => choose(row, pointOf(event)));
  canvas.addEventListener("mousemove", (event) => readout(panel, event));
  canvas.addEventListener("keydown", (event) => move(panel, event));
  const figure = element("figure");
  figure.append(canvas, caption);
  panels.push(panel);
  byId("pictures").append(figure);
}

function layOut() {
  const box = byId("pictures");
  const kinds = MAPS.filter(([kind]) => state.shown.has(kind));
  const columns = [[null, "", "image", ""]];
  for (const [kind, name, hint] of kinds)
    for (const encoder of data.encoders) columns.push([encoder, kind, name, hint]);
  box.replaceChildren();
  panels.length = 0;
  box.style.gridTemplateColumns = `repeat(${columns.length}, minmax(150px, 1fr))`;
  for (const [encoder, , name, hint] of columns) {
    const head = element("div", name, "head");
    head.title = hint;
    head.append(element("span", encoder ? encoder.name : "click a token"));
    box.append(head);
  }
  data.images.forEach((_, row) => columns.forEach(([encoder, kind]) => addPanel(row, encoder, kind)));
  panels.forEach(draw);
}

/** A patch with two patches of its surroundings on each side, as crop_patch draws it. */
function crop(encoder, [row, token, score], text) {
  const image = data.images[row];
  const grid = encoder.images[row];
  const [width, height] = [image.element.naturalWidth, image.element.naturalHeight];
  const [cellX, cellY] = [width / grid.columns, height / grid.rows];
  const [wide, high] = [Math.min(5 * cellX, width), Math.min(5 * cellY, height)];
  const [x, y] = [(token % grid.columns) * cellX, Math.floor(token / grid.columns) * cellY];
  const left = Math.min(Math.max(x + cellX / 2 - wide / 2, 0), width - wide);
  const top = Math.min(Math.max(y + cellY / 2 - high / 2, 0), height - high);
  const canvas = element("canvas", "", "go");
  canvas.width = canvas.height = 138;
  const context = canvas.getContext("2d");
  context.drawImage(image.element, left, top, wide, high, 0, 0, canvas.width, canvas.height);
  const [fx, fy] = [canvas.width / wide, canvas.height / high];
  for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.strokeRect((x - left) * fx, (y - top) * fy, cellX * fx, cellY * fy);
  }
  const point = [(x + cellX / 2) / width, (y + cellY / 2) / height];
  canvas.addEventListener("click", () => choose(row, point));
  const figure = element("figure");
  figure.append(canvas, element("figcaption", text ?? `${score.toFixed(2)}, image ${row + 1}`));
  return figure;
}

function strip(label, figures) {
  const box = element("div", "", "strip");
  const patches = element("div");
  patches.append(...figures);
  box.append(element("div", label, "caption"), patches);
  return box;
}

function showNearest() {
  const box = byId("nearest");
  box.replaceChildren();
  if (data.images.length < 2) {
    box.append(element("p", "There is only one image.", "note"));
    return;
  }
  for (const encoder of data.encoders) {
    const sets = data.images.map((_, row) => tokensOf(encoder, row));
    const columns = encoder.images.map((grid) => grid.columns);
    const token = tokenAt(encoder.images[state.row], data.images[state.row].point);
    const near = Maths.nearest(sets, columns, encoder.width, state.row, token, NEAREST);
    const chosen = crop(encoder, [state.row, token, 1], "chosen");
    box.append(strip(encoder.name, [chosen, ...near.map((patch) => crop(encoder, patch))]));
  }
}

function showGroups() {
  for (const encoder of data.encoders) {
    const total = encoder.images.reduce((sum, grid) => sum + grid.rows * grid.columns, 0);
    byId("groups").append(element("h3", encoder.name), element("p", encoder.groupsNote, "note"));
    for (const group of encoder.groups) {
      const label = `${group.number}: ${(100 * group.count / total).toFixed(1)} % of the tokens, ` +
        `in ${group.numImages} of ${data.images.length} images`;
      byId("groups").append(strip(label, group.patches.map((patch) => crop(encoder, patch))));
    }
  }
}

function showNumbers() {
  const heads = ["encoder", "tokens an image", "D", "clusters an image", "largest cluster",
    "share of the image a token attends to", "position R²",
    "colour R²"];
  const table = byId("numbers");
  table.replaceChildren();
  const addRow = (cells, tag) => {
    const row = element("tr");
    row.append(...cells.map((text) => element(tag, text)));
    table.append(row);
  };
  addRow(heads, "th");
  for (const encoder of data.encoders) {
    const each = data.images.map((_, row) => clusterNumbers(labelsOf(encoder, row)));
    const counts = each.map(({ count }) => count).sort((a, b) => a - b);
    const sizes = encoder.images.map((grid) => grid.rows * grid.columns);
    const range = (sorted) => sorted[0] === sorted.at(-1) ? `${sorted[0]}` : `${sorted[0]} to ${sorted.at(-1)}`;
    const mean = each.reduce((sum, { largest }) => sum + largest, 0) / each.length;
    addRow([encoder.name, range(sizes.sort((a, b) => a - b)), `${encoder.width}`, range(counts),
      percent(mean), percent(encoder.attended[state.scale]), r2(encoder.positionR2),
      r2(encoder.colourR2)], "td");
  }
}

const r2 = (value) => (value === null ? "n/a" : value.toFixed(2).replace(/^-(0\.00)$/, "$1"));

/** Compare the maps with those that Python computed for the tokens chosen at first. */
function check() {
  let attention = 0, similarity = 0, count = 0;
  for (const encoder of data.encoders)
    encoder.images.forEach((at, row) => {
      const tokens = tokensOf(encoder, row);
      const query = Maths.tokenOf(tokens, encoder.width, at.check.token);
      const scale = data.scales[data.chosenScale] / Math.sqrt(encoder.width);
      const weights = Maths.attention(query, tokens, scale);
      const near = Maths.cosines(Maths.mode(query, tokens, scale, data.iterations), tokens);
      const expected = Maths.decodeFloat(at.check.attention);
      const highest = Math.max(...expected);
      expected.forEach((value, i) => {
        attention = Math.max(attention, Math.abs(weights[i] * weights.length - value) / highest);
      });
      Maths.decodeFloat(at.check.similarity).forEach((value, i) => {
        similarity = Math.max(similarity, Math.abs(near[i] - value));
      });
      count += 1;
    });
  const good = attention < 0.01 && similarity < 0.01;
  byId("check").className = good ? "good" : "bad";
  byId("check").textContent = `${good ? "Checked" : "NOT AS COMPUTED"} against Python on ${count} maps of ` +
    `each kind: largest difference of attention ${attention.toExponential(1)} of its highest value, ` +
    `of similarity ${similarity.toExponential(1)}.`;
}

function greyOf(image, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [r, g, b] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(0.299 * r + 0.587 * g + 0.114 * b, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function setUpControls() {
  for (const [kind, name, hint] of MAPS) {
    const box = element("input");
    box.type = "checkbox";
    box.checked = state.shown.has(kind);
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(kind);
      else state.shown.delete(kind);
      layOut();
    });
    const label = element("label");
    label.title = hint;
    label.append(box, ` ${name}`);
    byId("maps").append(label);
  }
  data.scales.forEach((scale, i) => {
    const option = element("option", scale === 0.1 ? "0.1 (the method's)" : `${scale}`);
    option.value = i;
    option.selected = i === data.chosenScale;
    byId("scale").append(option);
  });
  byId("scale").addEventListener("change", (event) => {
    state.scale = Number(event.target.value);
    showNumbers();
    panels.forEach(draw);
  });
  const steps = byId("iterations");
  steps.max = data.iterations;
  steps.value = data.iterations;
  byId("iterations-shown").textContent = data.iterations;
  steps.addEventListener("input", () => {
    state.iterations = Number(steps.value);
    byId("iterations-shown").textContent = steps.value;
    panels.filter((panel) => panel.kind === "mode").forEach(draw);
  });
  byId("opacity").addEventListener("input", (event) => {
    state.opacity = event.target.value / 100;
    panels.forEach(draw);
  });
}

async function start() {
  await Promise.all(data.images.map(async (image) => {
    image.element = new Image();
    image.element.src = image.jpeg;
    await image.element.decode();
    image.grey = greyOf(image.element, image.width, image.height);
  }));
  byId("colour-r2").textContent = r2(data.colourPositionR2);
  byId("made").textContent = data.made;
  setUpControls();
  showNumbers();
  layOut();
  showNearest();
  showGroups();
  check();
}

start();
