// Theme and figures. The page joins draw.js, tables.js and report.js into one script with a scope of its own.

const NARROW = 560, NAMES_NARROW = 130, LEGEND_SYMBOL = 52, PRINTED = 660, MOST_ROWS = 500, CHUNK = 50;
const root = document.documentElement;
const twin = JSON.parse(document.getElementById("twin").textContent);
const plots = [...document.querySelectorAll("[data-figure]")];
const drawn = new Map();
let printing = false, folded = [];

// Theme

const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const button = document.getElementById("theme");

function nameTheme() {
  button.textContent = dark() ? "Light" : "Dark";
}

function switchTheme() {
  root.dataset.theme = dark() ? "light" : "dark";
  try {
    localStorage.setItem("actsparse-theme", root.dataset.theme);
  } catch {
    // Not kept, then: the switch holds for this visit.
  }
  nameTheme();
  redraw();
}

// Figures

let texts = new Map();
const payload = (id) => JSON.parse(texts.get(id));

/** Swap every light colour under a key that holds colours. */
function inDark(value, key) {
  if (typeof value === "string") return /color/i.test(key) && twin[value] ? twin[value] : value;
  if (Array.isArray(value)) return value.map((part) => inDark(part, key));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, inDark(part, name)]));
  }
  return value;
}

function withVariant(figure, id) {
  const menu = document.querySelector(`[data-variant="${id}"]`);
  const choice = menu && figure.layout.meta.variants.choices[Number(menu.value)];
  if (!choice) return figure;
  figure.data.forEach((trace, place) => {
    if (choice.values[place]) trace[choice.axis] = choice.values[place];
    if (choice.errors) trace[`error_${choice.axis}`] = choice.errors[place] || undefined;
  });
  if (choice.title) figure.layout[`${choice.axis}axis`].title.text = choice.title;
  return figure;
}

/** How many lines the legend takes, by the length of its names. */
function legendLines({ data, layout }, width) {
  const listed = layout.showlegend === false ? [] : data.filter((trace) => trace.showlegend !== false && trace.name);
  if (listed.length < 2) return 0;
  const names = listed.map((trace) => trace.name.split("<br>"));
  const longest = Math.max(...names.flat().map((line) => line.length));
  const columns = Math.max(1, Math.floor((width - 90) / (46 + 6.5 * longest)));
  return Math.ceil(names.flat().length / columns);
}

/** Height for a legend of many lines, which plotly would squeeze into a box to scroll. */
function growForLegend(figure, width) {
  const { layout } = figure, lines = legendLines(figure, width);
  if (lines <= 4) return;
  layout.height += 19 * (lines - 4);
  layout.legend = { ...layout.legend, maxheight: 0.75 };
}

/** Break the title of the vertical axis in two where it is longer than the axis. */
function wrapUpright(figure, width) {
  const { layout } = figure, legend = 19 * legendLines(figure, width);
  const title = layout.yaxis.title, text = title && title.text;
  if (!text || text.includes("<br>") || text.length * 6.7 < layout.height - 66 - legend) return;
  const words = text.split(" ");
  let best = 1;
  const uneven = (place) => Math.abs(words.slice(0, place).join(" ").length - text.length / 2);
  for (let place = 2; place < words.length; place++) if (uneven(place) < uneven(best)) best = place;
  if (words.length > 1) title.text = `${words.slice(0, best).join(" ")}<br>${words.slice(best).join(" ")}`;
}

/** A title as lines that fit into a width in pixels. */
function wrapped(text, room) {
  const lines = [""];
  for (const word of text.replaceAll("<br>", " ").split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && pen.measureText(longer).width > room) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines.join("<br>");
}

/** The title of the horizontal axis, which stands in the middle of the axis, in lines that stay inside the figure. */
function wrapAcross({ template, xaxis }, width, { l, r }) {
  const middle = (l + width - r) / 2;
  pen.font = `${template.layout.xaxis.title.font.size}px ${template.layout.font.family}`;
  return wrapped(xaxis.title.text, 2 * Math.min(middle, width - middle) - 8);
}

/** Names on the vertical axis in lines of that many pixels at most, so that they leave room for what is drawn. */
function foldNames({ data, layout }, room) {
  pen.font = `12.5px ${layout.template.layout.font.family}`;
  const fold = (name) => (typeof name === "string" ? wrapped(name, room) : name), axis = layout.yaxis;
  for (const trace of data) if (Array.isArray(trace.y)) trace.y = trace.y.map(fold);
  for (const key of ["categoryarray", "tickvals", "ticktext"]) if (Array.isArray(axis[key])) axis[key] = axis[key].map(fold);
  for (const one of layout.annotations || []) one.y = fold(one.y);
  for (const one of layout.shapes || []) Object.assign(one, { y0: fold(one.y0), y1: fold(one.y1) });
  const names = [...new Set(data.flatMap((trace) => (Array.isArray(trace.y) ? trace.y : [])))];
  layout.height += 7 * names.reduce((more, name) => more + linesOf(name) - 1, 0);
}

/** Names in the legend in lines that stay inside the figure. */
function foldLegend({ data, layout }, width) {
  const { font, margin, legend } = layout.template.layout;
  pen.font = `${legend.font.size}px ${font.family}`;
  for (const trace of data) if (trace.name) trace.name = wrapped(trace.name, width - margin.l - LEGEND_SYMBOL);
}

function forNarrow(figure, width) {
  const { data, layout } = figure;
  const named = layout.meta && layout.meta.named;
  foldLegend(figure, width);
  for (const trace of data) {
    if (named && trace.mode === "markers+text") Object.assign(trace, { mode: "markers", showlegend: true });
    if (trace.colorbar) {
      Object.assign(trace.colorbar, { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, xanchor: "center" });
      trace.colorbar.title.side = "bottom";
      layout.height += 62;
      layout.margin = { ...layout.margin, b: 112, r: 10 };
    }
  }
  if (layout.yaxis.scaleanchor) {
    const { l, r, t, b } = { ...layout.template.layout.margin, ...layout.margin }; // A square leaves blank what it cannot use.
    layout.height = Math.min(layout.height, width - l - r + t + b);
  }
  if (layout.yaxis.type === "category") foldNames(figure, NAMES_NARROW);
  for (const one of layout.annotations || []) one.text = one.text.replace(", ", ",<br>");
  if (named) layout.showlegend = true;
  return figure;
}

const linesOf = (text) => String(text || "").split("<br>").length;

/** Room for long names, and for titles and ticks of several lines, so that they need no second drawing. */
function reserveRoom({ data, layout }, width) {
  const { xaxis, yaxis, template } = layout, base = { ...template.layout.margin, ...layout.margin };
  const title = (axis) => (axis.title && axis.title.text) || "";
  const ticks = Math.max(1, ...(xaxis.ticktext || []).map(linesOf));
  if (yaxis.type === "category") {
    pen.font = `12.5px ${template.layout.font.family}`;
    const names = new Set(data.flatMap((trace) => (Array.isArray(trace.y) ? trace.y : [])));
    const lines = [...names].flatMap((name) => String(name).split("<br>"));
    const longest = Math.max(0, ...lines.map((line) => pen.measureText(line).width));
    base.l = Math.ceil(longest) + 14 + (title(yaxis) ? 10 + 17 * linesOf(title(yaxis)) : 0);
  } else {
    base.l += 17 * (linesOf(title(yaxis)) - 1);
  }
  if (width < NARROW) {
    xaxis.title.text = wrapAcross(layout, width, base);
    layout.height += 16 * (linesOf(title(xaxis)) - 1);
  }
  base.b += 16 * (linesOf(title(xaxis)) + ticks - 2);
  layout.height += 16 * (ticks - 1);
  layout.margin = base;
}

const pen = document.createElement("canvas").getContext("2d");
const OUTSIDE = [".xaxislayer-above", ".yaxislayer-above", ...["", 2, 3, 4].flatMap((n) => [`.x${n}title`, `.y${n}title`])].join();

/** Room for what sticks out of the figure, and between titles and ticks: plotly would measure every label for it. */
function makeRoom(plot, again = true) {
  const frame = plot.getBoundingClientRect();
  const box = (part) => (part ? part.getBoundingClientRect() : { width: 0 });
  let left = 0, right = 0, below = 0;
  for (const { width, left: start, right: end, bottom } of [...plot.querySelectorAll(OUTSIDE)].map(box)) {
    if (!width) continue;
    left = Math.max(left, frame.left - start);
    right = Math.max(right, end - frame.right);
    below = Math.max(below, bottom - frame.bottom);
  }
  const [across, upright, beside, under] = [".xy .xaxislayer-above", ".xy .yaxislayer-above", ".ytitle", ".xtitle"]
    .map((selector) => box(plot.querySelector(selector)));
  if (upright.width && beside.width) left = Math.max(left, beside.right + 3 - upright.left);
  if (across.width && under.width) below = Math.max(below, across.bottom + 1 - under.top);
  if (left <= 1 && right <= 1 && below <= 1) return;
  const { layout } = plot, { b } = layout.margin, text = layout.xaxis.title.text;
  const l = layout.margin.l + Math.ceil(left), r = layout.margin.r + Math.ceil(right);
  const title = layout.width < NARROW ? wrapAcross(layout, layout.width, { l, r }) : text;
  const lower = Math.ceil(below) + 16 * (linesOf(title) - linesOf(text)), height = layout.height + lower;
  plot.style.height = `${height}px`;
  window.Plotly.relayout(plot, { "margin.l": l, "margin.r": r, "margin.b": b + lower, "xaxis.title.text": title, height });
  if (again) makeRoom(plot, false); // Less width may have turned the labels.
}

function prepared(id, width) {
  let figure = withVariant(payload(id), id);
  if (width < NARROW) figure = forNarrow(figure, width);
  growForLegend(figure, width);
  wrapUpright(figure, width);
  reserveRoom(figure, width);
  if (dark() && !printing) figure = inDark(figure, "");
  Object.assign(figure.layout, { width, autosize: false });
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
  return figure;
}

const config = {
  displayModeBar: false,
  displaylogo: false,
  responsive: false,
  showTips: false,
};

function draw(plot) {
  const id = plot.dataset.figure;
  const width = Math.floor(printing ? PRINTED : plot.clientWidth);
  if (!width) return;
  const figure = prepared(id, width);
  plot.style.height = `${figure.layout.height}px`;
  window.Plotly.newPlot(plot, figure.data, figure.layout, config); // Not react: it keeps the margins of the old width.
  makeRoom(plot);
  drawn.set(plot, width);
}

const redraw = () => [...drawn.keys()].forEach(draw);

function drawLazily() {
  const waiting = new Set(plots);
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) once(entry.target);
  }, { rootMargin: "300px" });
  const once = (plot) => {
    if (!waiting.delete(plot)) return;
    watcher.unobserve(plot);
    draw(plot);
    if (drawn.size === 1) performance.mark("first figure");
    if (!waiting.size) {
      root.dataset.drawn = String(drawn.size);
      performance.mark("all figures");
    }
  };
  plots.forEach((plot) => watcher.observe(plot));
  const next = () => {
    const end = performance.now() + CHUNK; // Then the page may scroll and answer before more are drawn.
    for (const plot of waiting) {
      once(plot);
      if (performance.now() > end) break;
    }
    if (waiting.size) setTimeout(next);
  };
  requestAnimationFrame(() => setTimeout(next)); // What is in sight comes first: the watcher reports within a frame.
  addEventListener("beforeprint", () => {
    printing = true;
    folded = [...document.querySelectorAll("main details:not(.numbers, .help):not([open])")];
    for (const details of folded) details.open = true;
    plots.forEach((plot) => { waiting.delete(plot); draw(plot); });
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const details of folded) details.open = false;
    setTimeout(redraw, 50); // The page still has the width of paper while the event runs.
  });
  if (!plots.length) root.dataset.drawn = "0";
}

function watchWidth() {
  let timer = 0;
  addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      for (const [plot, width] of drawn) if (!printing && plot.clientWidth !== width) draw(plot);
    }, 120);
  });
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  return bytes;
}

function inflated(id) {
  const stream = new Blob([bytesOf(document.getElementById(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream);
}

/** The figures lie compressed in the page: a line of names, then one line of JSON each. */
async function readFigures() {
  const [names, ...lines] = (await inflated("figures").text()).split("\n");
  texts = new Map(JSON.parse(names).map((name, place) => [name, lines[place]]));
}

/** plotly.js lies compressed in the page; it becomes a script of its own. */
async function loadPlotly() {
  const code = new Blob([await inflated("plotly").arrayBuffer()], { type: "text/javascript" });
  performance.mark("inflated");
  const url = URL.createObjectURL(code);
  await new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
  URL.revokeObjectURL(url);
}

const read = readFigures();

async function start() {
  try {
    performance.mark("start");
    await Promise.all([read, loadPlotly()]);
    performance.mark("plotly ready");
    drawLazily();
    watchWidth();
  } catch (error) {
    for (const plot of plots) {
      plot.classList.add("failed");
      plot.textContent = "This browser cannot draw the figure; its numbers are in the table below.";
    }
    console.error("the figures could not be drawn:", error);
  }
}
