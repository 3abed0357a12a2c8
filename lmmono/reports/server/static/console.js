// The console: runs a query without leaving the page, stops it, and keeps queries in this browser.
const form = document.getElementById("console");
const query = document.getElementById("q");
const answer = document.getElementById("answer");
const stop = document.getElementById("stop");
const saved = document.getElementById("saved");
const own = document.getElementById("own");
const here = document.getElementById("here");
const KEPT = "lmmono.queries";

const post = (path, fields) =>
  fetch(path, { method: "POST", headers: { "X-Part": "answer" }, body: new URLSearchParams(fields) });

function link() {
  const address = new URL("/sql", location.href);
  address.searchParams.set("run", form.elements.run.value);
  address.searchParams.set("q", query.value);
  here.href = address;
  return address;
}

function kept() {
  try {
    const list = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return Array.isArray(list) ? list.filter((text) => typeof text === "string") : [];
  } catch {
    return [];
  }
}

function listOwn() {
  own.replaceChildren(
    ...kept().map((text) => {
      const option = document.createElement("option");
      option.value = text;
      option.textContent = text.replaceAll(/\s+/g, " ").slice(0, 80);
      return option;
    }),
  );
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!stop.disabled) return;
  stop.disabled = false;
  answer.setAttribute("aria-busy", "true");
  history.replaceState(null, "", link());
  try {
    const response = await post(form.action, new FormData(form));
    const text = await response.text();
    const page = new DOMParser().parseFromString(text, "text/html");
    // a fault of the server itself is a whole page
    answer.replaceChildren(...(page.querySelector("main") ?? page.body).childNodes);
  } catch {
    answer.textContent = "The server does not answer.";
  } finally {
    stop.disabled = true;
    answer.removeAttribute("aria-busy");
  }
});

stop.addEventListener("click", () => {
  post("/sql/stop", { run: form.elements.run.value, key: form.elements.key.value });
});

document.getElementById("save").addEventListener("click", () => {
  localStorage.setItem(KEPT, JSON.stringify([...new Set([query.value, ...kept()])].slice(0, 50)));
  listOwn();
});

saved.addEventListener("change", () => {
  if (!saved.value) return;
  query.value = saved.value;
  saved.value = "";
  link();
  query.focus();
});

query.addEventListener("input", link);
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
listOwn();
