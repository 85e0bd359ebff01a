// What the pages need beyond htmx; each block says for whom.

// Every request of htmx that changes something carries the CSRF token.
document.addEventListener("htmx:config:request", ({ detail }) => {
  detail.ctx.request.headers["X-CSRFToken"] =
    document.querySelector('meta[name="csrf-token"]').content;
});

// Forms get it when they are sent: parts of a page that came live have none of their own.
document.addEventListener("submit", ({ target }) => {
  if (target.method !== "post") return;
  let field = target.elements.namedItem("csrf_token");
  if (!field) {
    field = Object.assign(document.createElement("input"), { type: "hidden", name: "csrf_token" });
    target.append(field);
  }
  field.value = document.querySelector('meta[name="csrf-token"]').content;
});

// Times are UTC in the page, and local to whoever reads it; with `data-ago` also how long ago.
export function spanOf(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const two = (value) => String(value).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function dollars(micro) {
  const value = micro / 1e6;
  const digits = Math.abs(value) < 1 ? 4 : 2;
  return `$${value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

// The server's clock, as far as this page knows it: every part of it says when it was made.
let ahead = 0;
let newest = 0;
function readClock() {
  const made = [...document.querySelectorAll("[data-now]")].map((one) => Number(one.dataset.now));
  const latest = Math.max(0, ...made);
  if (latest <= newest) return; // what came now came without a time of its own
  newest = latest;
  ahead = latest * 1000 - Date.now();
}
const now = () => Date.now() + ahead;

// Between two updates, what runs on runs on: `data-since` counts up, `data-until` down (both
// seconds since 1970), `data-money` grows by `data-rate` micro-USD per hour since `data-now`.
function tick() {
  for (const element of document.querySelectorAll("[data-since]")) {
    element.textContent = spanOf(now() / 1000 - Number(element.dataset.since));
  }
  for (const element of document.querySelectorAll("[data-until]")) {
    element.textContent = spanOf(Number(element.dataset.until) - now() / 1000);
  }
  for (const element of document.querySelectorAll("[data-money][data-rate]")) {
    const hours = Math.max(0, now() / 1000 - Number(element.dataset.at)) / 3600;
    element.textContent = dollars(Number(element.dataset.money) + hours * Number(element.dataset.rate));
  }
}

function localTimes() {
  for (const element of document.querySelectorAll("time[datetime]")) {
    const at = new Date(element.dateTime);
    if (Number.isNaN(at.valueOf())) continue;
    element.title = at.toLocaleString();
    if ("ago" in element.dataset) element.textContent = `${spanOf((now() - at) / 1000)} ago`;
  }
}

function refresh() {
  readClock();
  localTimes();
  tick();
}
refresh();
document.addEventListener("htmx:after:swap", refresh);
setInterval(tick, 1000);
setInterval(localTimes, 10_000);

// Dialogs: `data-opens` names one, `data-closes` closes the one it is in; Escape does by itself.
document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-opens]");
  if (opener) document.getElementById(opener.dataset.opens)?.showModal();
  if (event.target.closest("[data-closes]")) event.target.closest("dialog")?.close();
  if (event.target instanceof HTMLDialogElement) event.target.close(); // beside its box
});

// `data-copy` puts the text of the element that it names onto the clipboard.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const words = button.textContent;
  const source = document.querySelector(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source); // no permission, or no https
    button.textContent = "Press Ctrl-C";
  }
  setTimeout(() => { button.textContent = words; }, 2000);
});

// `/` leads to the search of a page that has one.
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable], dialog");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const search = document.querySelector("[data-search]");
  if (!search) return;
  event.preventDefault();
  search.focus();
  search.select();
});

// A gone connection is said; the next good answer takes it back.
let broken = false;
const lost = () => { document.body.dataset.line = "lost"; };
const found = () => { broken = false; delete document.body.dataset.line; };
const broke = () => { broken = true; lost(); };
document.addEventListener("htmx:error", broke);
document.addEventListener("htmx:sse:error", ({ detail }) => {
  if (detail.status === 401) location.reload(); // which leads to the login
  else broke();
});
document.addEventListener("bye", ({ detail }) => {
  if (String(detail?.data).includes("unauthorized")) location.reload();
});
document.addEventListener("htmx:response:error", ({ detail }) => {
  if (detail.ctx.response.status >= 500) broke();
});
document.addEventListener("htmx:after:swap", found);
document.addEventListener("htmx:sse:after:connection", found);
addEventListener("offline", lost);
addEventListener("online", () => { if (!broken) found(); });
