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
