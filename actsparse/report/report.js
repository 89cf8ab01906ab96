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

// The section that is read is marked in the contents: the last one that begins above a line near the top. Over the last
// screen of the page that line moves to its foot, since what begins there never comes to the top; what was asked for by
// its link stays marked until the reader scrolls.

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const parts = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
let asked = "", marking = 0;

function markSection() {
  marking = 0;
  const line = Math.max(0.2 * innerHeight, innerHeight - (root.scrollHeight - innerHeight - scrollY));
  const begun = parts.filter((part) => part.getBoundingClientRect().top <= line);
  const current = asked || (begun.at(-1) || parts[0]).id;
  links.forEach((link, id) => id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
}

const markSoon = () => { marking ||= requestAnimationFrame(markSection); };
if (parts.length) {
  for (const moves of ["wheel", "touchmove", "pointerdown", "keydown"]) addEventListener(moves, () => { asked = ""; }, { passive: true });
  links.forEach((link, id) => link.addEventListener("click", () => { asked = id; markSoon(); }));
  for (const moved of ["scroll", "resize"]) addEventListener(moved, markSoon, { passive: true });
  markSoon();
}

nameTheme();
start();
