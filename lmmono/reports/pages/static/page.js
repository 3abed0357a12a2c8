// The report: unpacks the page of a unit when its link is followed, two of them side by side for
// twins; sorts and filters tables. Nothing is fetched.
const packed = new Map(
  [...document.querySelectorAll("script[data-page]")].map((each) => [each.dataset.page, each]),
);
const viewer = document.getElementById("viewer");

async function unpack(script) {
  const bytes = Uint8Array.from(atob(script.textContent), (each) => each.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function show() {
  const asked = decodeURIComponent(location.hash.slice(1)).split("&");
  if (!asked[0].startsWith("unit-")) return;
  const known = asked.filter((id) => packed.has(id));
  viewer.hidden = false;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  close.addEventListener("click", () => {
    viewer.hidden = true;
    history.back();
  });
  const side = document.createElement("div");
  side.className = "side";
  // the pages were escaped when they were made: they are markup of this file, as the rest of it is
  side.innerHTML = (await Promise.all(known.map((id) => unpack(packed.get(id))))).join("");
  for (const each of side.children) each.removeAttribute("id"); // the first may stand below too
  if (known.length < asked.length) {
    const note = document.createElement("p");
    note.textContent = "This unit has no page in this file: lmmono report RUN --all-units takes in every one.";
    side.append(note);
  }
  viewer.replaceChildren(close, side);
  viewer.focus();
  viewer.scrollIntoView();
}

addEventListener("hashchange", show);
show();

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("table[data-sort] thead button");
  if (!button) return;
  const head = button.closest("th");
  const body = button.closest("table").tBodies[0];
  const rising = head.getAttribute("aria-sort") === "descending";
  for (const each of head.parentElement.children) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = (row) => {
    const number = parseFloat(row.cells[head.cellIndex].textContent.replaceAll(",", ""));
    return Number.isNaN(number) ? -Infinity : number;
  };
  const rows = [...body.rows].sort((a, b) => (rising ? 1 : -1) * (value(a) - value(b)));
  body.append(...rows);
});

document.addEventListener("input", (event) => {
  if (!event.target.matches?.("[data-filter]")) return;
  const text = event.target.value.trim();
  for (const row of event.target.closest("details").querySelectorAll("tbody tr"))
    row.hidden = !row.cells[0].textContent.includes(text);
});
