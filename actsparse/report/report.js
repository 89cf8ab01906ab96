(() => {
  "use strict";
  const NARROW = 560, PRINTED = 660, MOST_ROWS = 500, CHUNK = 50;
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

  /** Break the title of the vertical axis in two where it is longer than the axis. */
  function wrapUpright({ data, layout }, width) {
    const listed = layout.showlegend === false ? 0 : data.filter((trace) => trace.showlegend !== false).length;
    const legend = listed > 1 ? 19 * Math.ceil((listed * 165) / width) : 0;
    const title = layout.yaxis.title, text = title && title.text;
    if (!text || text.includes("<br>") || text.length * 6.7 < layout.height - 66 - legend) return;
    const words = text.split(" ");
    let best = 1;
    const uneven = (place) => Math.abs(words.slice(0, place).join(" ").length - text.length / 2);
    for (let place = 2; place < words.length; place++) if (uneven(place) < uneven(best)) best = place;
    if (words.length > 1) title.text = `${words.slice(0, best).join(" ")}<br>${words.slice(best).join(" ")}`;
  }

  /** Break an axis title into lines that fit beside the names of a category axis. */
  function wrapTitle(figure, width) {
    const { data, layout } = figure;
    const names = layout.yaxis.type === "category" ? data.flatMap((trace) => trace.y).map((name) => String(name).length) : [0];
    const room = Math.max(14, Math.floor((width - 70 - 6.4 * Math.max(0, ...names)) / 6.6));
    const lines = [""];
    for (const word of layout.xaxis.title.text.split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length >= room) lines.push("");
      lines.push(`${lines.pop()} ${word}`.trim());
    }
    layout.xaxis.title.text = lines.join("<br>");
    layout.height += 16 * (lines.length - 1);
  }

  function forNarrow(figure, width) {
    const { data, layout } = figure;
    wrapTitle(figure, width);
    const named = layout.meta && layout.meta.named;
    for (const trace of data) {
      if (named && trace.mode === "markers+text") Object.assign(trace, { mode: "markers", showlegend: true });
      if (trace.colorbar) {
        Object.assign(trace.colorbar, { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, xanchor: "center" });
        trace.colorbar.title.side = "bottom";
        layout.height += 62;
        layout.margin = { ...layout.margin, b: 112, r: 10 };
      }
    }
    if (named) layout.showlegend = true;
    const listed = data.filter((trace) => trace.showlegend !== false).length;
    if (listed > 2) layout.height += 11 * listed;
    return figure;
  }

  function prepared(id, width) {
    let figure = withVariant(payload(id), id);
    if (width < NARROW) figure = forNarrow(figure, width);
    wrapUpright(figure, width);
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

  // Numbers: tables and CSV

  const quoted = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (rows) => rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";

  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function rowsOf(id) {
    await read;
    const { columns, rows: all } = payload(id);
    const names = Object.keys(columns);
    const count = names.length ? columns[names[0]].length : 0;
    return { names, all, rows: Array.from({ length: count }, (_, place) => names.map((name) => columns[name][place])) };
  }

  async function fillNumbers(details) {
    const box = details.querySelector(".scroll");
    if (!details.open || box.firstChild) return;
    const { names, all, rows } = await rowsOf(details.dataset.numbers);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of names) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of rows.slice(0, MOST_ROWS)) {
      const line = body.insertRow();
      for (const value of row) line.insertCell().textContent = value === null ? "\u2013" : String(value);
    }
    box.append(table);
    const notes = [];
    if (rows.length > MOST_ROWS) notes.push(`The first ${MOST_ROWS} of ${rows.length} rows; the CSV has all.`);
    if (rows.length < all) notes.push(`${rows.length} of ${all} rows, evenly; this page had to leave out the others.`);
    for (const text of notes) {
      const note = document.createElement("p");
      note.textContent = text;
      box.append(note);
    }
  }

  function tableRows(section) {
    return [...section.querySelectorAll("tr")].map((row) =>
      [...row.cells].map((cell) => cell.dataset.sort ?? (cell.querySelector("button") ?? cell).textContent.trim()));
  }

  function sortBy(heading) {
    const table = heading.closest("table"), place = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = heading.classList.contains("number");
    const key = (row) => (numeric ? Number(row.cells[place].dataset.sort ?? NaN) : row.cells[place].textContent);
    const body = table.tBodies[0];
    const ordered = [...body.rows].sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (!numeric) return (up ? 1 : -1) * a.localeCompare(b);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return up ? a - b : b - a;
    });
    body.append(...ordered);
  }

  function filterRows(input) {
    const wanted = input.value.toLowerCase();
    for (const row of document.getElementById(input.dataset.filter).querySelectorAll("tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  }

  async function copyCommand(pressed) {
    const code = pressed.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      pressed.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      pressed.textContent = "Selected";
    }
    setTimeout(() => { pressed.textContent = "Copy"; }, 1500);
  }

  // Events

  button.addEventListener("click", switchTheme);
  system.addEventListener("change", () => { if (!root.dataset.theme) { nameTheme(); redraw(); } });
  document.addEventListener("click", (event) => {
    const at = (selector) => event.target.closest(selector);
    const heading = at(".grid thead th"), figure = at("[data-csv-figure]"), table = at("[data-csv-table]"), copy = at(".copy");
    if (heading && at("button")) sortBy(heading);
    if (figure) {
      const name = figure.dataset.csvFigure;
      rowsOf(name).then(({ names, rows }) => download(name, csv([names, ...rows])));
    }
    const picture = at("[data-svg-figure]");
    if (picture && window.Plotly) {
      const name = picture.dataset.svgFigure, plot = document.getElementById(`plot-${name}`);
      window.Plotly.downloadImage(plot, { format: "svg", filename: name, width: plot.clientWidth, height: plot.clientHeight });
    }
    if (table) download(table.dataset.csvTable, csv(tableRows(document.getElementById(table.dataset.csvTable))));
    if (copy) copyCommand(copy);
    for (const open of document.querySelectorAll(".help[open]")) if (!open.contains(event.target)) open.open = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const open of document.querySelectorAll(".help[open]")) open.open = false;
  });
  document.addEventListener("input", (event) => {
    if (event.target.matches("[data-filter]")) filterRows(event.target);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-variant]")) {
      const plot = document.getElementById(`plot-${event.target.dataset.variant}`);
      if (drawn.has(plot)) draw(plot);
    }
  });
  for (const details of document.querySelectorAll("[data-numbers]")) details.addEventListener("toggle", () => fillNumbers(details));

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const reader = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link, id) => link.toggleAttribute("aria-current", id === entry.target.id));
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  links.forEach((_, id) => { const part = document.getElementById(id); if (part) reader.observe(part); });

  nameTheme();
  start();
})();
