"""A browser as a reader of the pages has one, which notices what a reader should never see:
requests to strangers, errors on the console, dialogs that no page of ours opens."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

AXE = Path(__file__).parents[1] / "axe" / "axe.min.js"
#: What axe calls wrong and somebody with a screen reader or a keyboard stumbles over.
GRAVE = ("serious", "critical")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
#: A loaded machine with two cores takes its time.
PATIENCE_MS = 60_000

_WATCH_POLICY = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP ${event.violatedDirective} ${event.blockedURI}`));
"""
#: Colours fade when light becomes dark; what is looked at is how it ends.
_STILL = """() => {
  for (const one of document.getAnimations()) if (one instanceof CSSTransition) one.finish();
}"""
#: Whether the focus can be seen, at the element that has it or at the label around it.
_FOCUS = """() => {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  const shows = (one) => {
    const style = getComputedStyle(one);
    return (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0)
      || style.boxShadow !== "none";
  };
  const box = element.getBoundingClientRect();
  const labels = [...(element.labels ?? [])];
  return {
    words: (element.ariaLabel || element.textContent || "").trim().replace(/\\s+/g, " ")
      || labels.map((label) => label.textContent.trim()).join(" ") || element.id,
    of: labels.map((label) => label.textContent.trim().replace(/\\s+/g, " ")).join(" "),
    id: element.id,
    visible: [element, ...labels].some(shows) && (labels.length > 0 || box.width > 1),
    html: element.outerHTML.slice(0, 120),
  };
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, or a test that says why it was not run."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Reader:
    """Somebody with a browser of their own: cookies, tabs, and what was noticed in them.

    `faults` must be empty at the end. Whoever breaks something on purpose empties it.
    """

    def __init__(self, browser: Browser, url: str, *others: str, shots: Path | None = None) -> None:
        self.url, self.faults, self.shots = url, list[str](), shots
        self._home = {_origin(place) for place in (url, *others)}
        self.context: BrowserContext = browser.new_context(viewport=WIDE, accept_downloads=True)
        self.context.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        self.context.add_init_script(_WATCH_POLICY)
        self.context.on("request", lambda request: self._asked(request.url))
        self.context.on("page", self._watch)

    def tab(self, path: str = "") -> Page:
        page = self.context.new_page()
        if path:
            page.goto(self.url + path)
        return page

    def log_in(self, page: Page, key: str) -> None:
        page.goto(self.url + "/login")
        page.get_by_label("Operator's key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Fleet")).to_be_visible()

    def inspect(self, page: Page, name: str) -> None:
        """Look at a page in light, in dark and on a telephone; what is wrong is a fault."""
        before = page.viewport_size
        views = {"light": WIDE, "dark": WIDE, "375": NARROW}
        for view, size in views.items():
            page.emulate_media(color_scheme="dark" if view == "dark" else "light")
            page.set_viewport_size(size)  # type: ignore[arg-type]
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > size["width"]:
                self.faults.append(f"{name} in {view} scrolls sideways: {wide} px")
            self.faults += [f"{name} in {view}: {item}" for item in grave_issues(page)]
            self._shoot(page, f"{name}-{view}")
        page.set_viewport_size(before)  # type: ignore[arg-type]

    def close(self) -> None:
        self.context.close()

    def _shoot(self, page: Page, name: str) -> None:
        if self.shots is not None:
            self.shots.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def _asked(self, url: str) -> None:
        if (
            urlsplit(url).scheme in ("http", "https", "ws", "wss")
            and _origin(url) not in self._home
        ):
            self.faults.append(f"a request left for {url}")

    def _watch(self, page: Page) -> None:
        def console(message: Any) -> None:
            if message.type in ("error", "warning"):
                place = (message.location or {}).get("url", "")
                self.faults.append(f"the console said {message.text} at {place} on {page.url}")

        def dialog(box: Any) -> None:
            self.faults.append(f"a script opened a dialog: {box.message}")
            box.dismiss()

        # Whoever listens only when the dialog is due may be heard too late by the browser.
        page.on("filechooser", lambda chooser: None)
        page.on("console", console)
        page.on("pageerror", lambda error: self.faults.append(f"an error on {page.url}: {error}"))
        page.on("dialog", dialog)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def grave_issues(page: Page) -> list[str]:
    """What axe-core finds on the page as it is now. Evaluated from outside, for the page's policy
    lets no script in."""
    page.evaluate(_STILL)
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    found: Sequence[Any] = page.evaluate(
        f"""async () => (await axe.run({{resultTypes: ["violations"]}})).violations
            .filter((one) => {json.dumps(GRAVE)}.includes(one.impact))
            .map((one) => [one.id, one.help, one.nodes.slice(0, 3)
              .map((node) => `${{node.target}} ${{node.failureSummary}}`)])"""
    )
    return [f"{name}: {words}: {'; '.join(nodes)}" for name, words, nodes in found]


def tab_to(page: Page, words: str, *, most: int = 80) -> None:
    """Press Tab until the focus is on what is called `words` (or has that id); on the way, each
    thing that has the focus must show it."""
    passed = []
    for _ in range(most):
        page.keyboard.press("Tab")
        has = page.evaluate(_FOCUS)
        if has is None:
            continue
        assert has["visible"], f"the focus cannot be seen at {has['html']}"
        if has["words"].startswith(words) or has["of"].startswith(words) or has["id"] == words:
            return
        passed.append(has["words"][:30])
    pytest.fail(f"no Tab leads to {words!r}; passed {passed}")


def drop(page: Page, target: str, files: Sequence[Path]) -> None:
    """Let go of files over an element, as dragged in from a folder of the desktop: the browser
    itself does the rest, as it does for a mouse."""
    box = page.locator(target).bounding_box()
    assert box is not None, f"{target} is not on the page"
    where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    names = [str(path.absolute()) for path in files]
    data = {"items": [], "files": names, "dragOperationsMask": 1}
    hand = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        hand.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})
    hand.detach()
