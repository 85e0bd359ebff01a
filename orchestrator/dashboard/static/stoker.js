// What the pages need beyond htmx; each block says for whom.

// Every request of htmx that changes something carries the CSRF token.
document.addEventListener("htmx:config:request", ({ detail }) => {
  detail.ctx.request.headers["X-CSRFToken"] =
    document.querySelector('meta[name="csrf-token"]').content;
});

// Times are UTC in the page, and local to whoever reads it.
function localTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const at = new Date(element.dateTime);
    if (!Number.isNaN(at.valueOf())) element.title = at.toLocaleString();
  }
}
localTimes(document);
document.addEventListener("htmx:after:swap", () => localTimes(document));
