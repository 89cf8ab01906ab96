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
