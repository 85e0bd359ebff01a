"""The whole story in a browser, against a real Stoker: what an operator does from the login on,
by keyboard, and what the pages do when the server dies or somebody writes markup into names.

`--shots DIR` keeps a picture of every page in light, in dark and 375 pixels wide;
`--picture FILE` makes the README's picture anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from gpu_agent import wire
from infra.safetensors import read_weights
from orchestrator.cli.demo import STATES, TINY_RECIPE
from orchestrator.cli.receiver import Receiver
from orchestrator.cli.stage import TINY_FILE
from stand.browser import Reader, drop, tab_to
from state import record
from state.events import Event
from state.job import Reason

#: Enough for a curve; the picture shows a longer one.
SHORT = {**TINY_RECIPE, "steps": 60, "validation_every": 30, "sample_every": 30}
LONG = {**TINY_RECIPE, "sample_every": 25}
PROMPTS = ["a photo of sks", "a photo of sks, at night"]
#: What no GPU is called: a job that wants it waits until somebody cancels it.
NOWHERE = {"gpu_names": ["RTX 0000"]}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"

#: A machine that others use too takes minutes for what is seconds alone.
TRAINING_MS = 300_000

#: Remembers the states in the order in which the diagram lit them, and which were current. Gone
#: with the document: what it knows at the end happened without a reload.
REMEMBER = """() => {
  const seen = window.seen = { lit: [], current: [] };
  const look = () => {
    for (const box of document.querySelectorAll("svg.states .box.visited")) {
      const name = [...box.classList].find((one) => one.startsWith("s-")).slice(2);
      if (!seen.lit.includes(name)) seen.lit.push(name);
      const current = box.classList.contains("current");
      if (current && seen.current.at(-1) !== name) seen.current.push(name);
    }
  };
  look();
  const all = { subtree: true, childList: true, attributes: true };
  new MutationObserver(look).observe(document.body, all);
}"""
LOADED = "image => image.complete && image.naturalWidth > 0"
PAINTED = """canvas => new Uint32Array(canvas.getContext("2d")
  .getImageData(0, 0, canvas.width, canvas.height).data.buffer).some((pixel) => pixel !== 0)"""


class Keeper(Receiver):
    """Answers 204 to all, and keeps headers and body of each, repeats too."""

    def __init__(self) -> None:
        self.came: list[tuple[dict[str, str], bytes]] = []
        super().__init__(wire.new_secret())

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        self.came.append((headers, body))
        return True

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.came]


def test_an_operator_trains_from_photographs_to_weights_by_keyboard(
    reader: Reader, key: str, stoker: Any, photos: Path, tmp_path: Path, until: Any,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    page = reader.tab("/")
    expect(page).to_have_url(f"{reader.url}/login")
    reader.inspect(page, "login")
    page.keyboard.insert_text(key)  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()

    tab_to(page, "New training")
    page.keyboard.press("Enter")
    with Keeper() as backend:
        picture = request.config.getoption("--picture")
        files, recipe = sorted(photos.iterdir()), LONG if picture else SHORT
        secret = _order(page, reader, backend.url, files, recipe)
        page.evaluate(REMEMBER)
        job = page.url.rpartition("/")[2]
        aside = reader.tab("/")  # while that trains
        waiting = stoker.order(gpu=NOWHERE, metadata={"order": "43"})
        expect(aside.get_by_role("link", name=waiting)).to_be_visible()
        reader.inspect(aside, "fleet")
        aside.get_by_role("link", name=waiting).click()
        expect(aside.get_by_role("heading", name=waiting)).to_be_visible()
        reader.inspect(aside, "job-waiting")
        _cancel(aside, reader, waiting)

        ended = page.locator("#job-status .badge.s-completed")
        expect(ended).to_be_visible(timeout=TRAINING_MS)
        passed = [step["target"] for step in stoker.show(job)["transitions"]]
        assert ("pending", *passed) == STATES
        seen = page.evaluate("seen")
        assert seen["lit"] == list(STATES)
        assert seen["current"] == [name for name in STATES if name in seen["current"]]
        assert seen["current"][-2:] == ["training", "completed"]
        _curve(page)
        _samples(page)
        _download(page, tmp_path)
        _replay(page, backend, secret, until)

    reader.inspect(page, "job")
    if picture:
        _picture(page, Path(picture))
    page.goto(f"{reader.url}/webhooks")
    reader.inspect(page, "webhooks")
    page.locator("a[href^='/webhooks/']").first.click()
    expect(page.get_by_role("heading", name="Payload")).to_be_visible()
    reader.inspect(page, "delivery")
    _block(page, reader, stoker, job)
    tab_to(page, "Log out")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{reader.url}/login")
    page.goto(f"{reader.url}/jobs/{job}")
    expect(page.get_by_label("Operator's key")).to_be_visible()


def _order(
    page: Page, reader: Reader, webhook: str, photos: list[Path], recipe: Mapping[str, Any]
) -> str:
    """Fill the form in, all but one photograph by keyboard; the webhook's secret."""
    expect(page.get_by_role("heading", name="New training")).to_be_visible()
    page.wait_for_load_state()  # with its script
    drop(page, "#drop", photos[:1])
    expect(page.get_by_role("list", name="Chosen files").get_by_role("listitem")).to_have_count(1)
    tab_to(page, "Choose files")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photos[1:])
    tab_to(page, f"Upload {len(photos)} files")
    page.keyboard.press("Enter")
    expect(page.locator("#report")).to_contain_text(f"{len(photos)} kept")
    assert page.locator("#all").evaluate("bar => bar.value === bar.max")
    for place, words in (
        ("base", TINY_FILE),
        ("Trigger word", "sks"),
        ("Advanced", ""),
        ("Sample prompts", "\n".join(PROMPTS)),
        ("Other recipe keys", json.dumps(recipe)),
        ("Webhook of this job", webhook),
    ):
        tab_to(page, place)
        page.keyboard.insert_text(words) if words else page.keyboard.press("Enter")
        if place == "base":
            page.keyboard.press("Tab")
            expect(page.locator("#found")).to_contain_text("Checkpoint")
            expect(page.get_by_label("Family")).to_have_value("sd1")
    expect(page.locator("#estimate .price")).to_contain_text("$")
    reader.inspect(page, "new")
    tab_to(page, "Start training")
    page.keyboard.press("Enter")
    shown = page.get_by_role("dialog", name="The training has begun")
    secret = shown.locator("#secret-text").inner_text()
    tab_to(page, "To the job")
    page.keyboard.press("Enter")
    expect(page.locator("#job-status")).to_be_visible()
    return secret


def _cancel(page: Page, reader: Reader, job: str) -> None:
    tab_to(page, "Cancel")
    page.keyboard.press("Enter")
    asked = page.get_by_role("dialog", name="Cancel this job?")
    expect(asked.get_by_role("button", name="Leave it")).to_be_focused()
    reader.inspect(page, "job-cancel")
    tab_to(page, "Cancel the job")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").filter(has_text=f"Job {job} is cancelled")).to_be_visible()
    expect(page.locator("#job-status .badge").first).to_contain_text("cancelled")


def _curve(page: Page) -> None:
    assert page.locator("#plot canvas").evaluate(PAINTED)
    page.get_by_text("Values as a table").click()
    rows = page.locator("#curve-values tbody tr")
    expect(rows).not_to_have_count(0)
    cells = [row.split("\t")[2] for row in rows.all_inner_texts()]
    losses = [float(cell) for cell in cells if cell[0].isdigit()]  # before step 1 there is none
    assert len(losses) > 20
    assert losses[-1] < losses[0]
    page.get_by_text("Values as a table").click()


def _samples(page: Page) -> None:
    images = page.locator("#job-samples img")
    for index in range(images.count()):
        images.nth(index).scroll_into_view_if_needed()
        page.wait_for_function(LOADED, arg=images.nth(index).element_handle())
    assert images.count() >= 2 * len(PROMPTS)
    page.locator("#job-samples button").first.click()
    box = page.get_by_role("dialog", name=PROMPTS[0])
    page.wait_for_function(LOADED, arg=box.locator("img").element_handle())
    page.keyboard.press("Escape")
    expect(page.locator("#job-samples button").first).to_be_focused()


def _download(page: Page, folder: Path) -> None:
    row = page.locator("#job-files tr").filter(
        has=page.get_by_role("link", name="lora.safetensors", exact=True)
    )
    said = row.locator("small").inner_text().removeprefix("sha256 ").strip()
    with page.expect_download() as coming:
        row.get_by_role("link").click()
    weights = folder / coming.value.suggested_filename
    coming.value.save_as(weights)
    assert weights.name == "lora.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == said
    with weights.open("rb") as stream:
        read_weights(stream, weights.stat().st_size, lambda piece: None)


def _replay(page: Page, backend: Keeper, secret: str, until: Callable[..., Any]) -> None:
    """Send the last message once more: the same id and body, with a good signature."""
    last = page.locator("#job-deliveries li").first
    expect(last).to_contain_text("job.completed")
    expect(last).to_contain_text("delivered")
    again = backend.ids()[-1]
    last.get_by_role("button", name="Replay").click()
    until(lambda: backend.ids().count(again) == 2, "the delivery comes once more")
    first, second = [one for one in backend.came if one[0]["webhook-id"] == again]
    assert first[1] == second[1]
    for headers, body in backend.came:
        wire.verify(body, headers, secrets=[secret], now=int(headers["webhook-timestamp"]))


def _block(page: Page, reader: Reader, stoker: Any, job: str) -> None:
    """Block the machine that the job ran on; and let it go again, for others train on it."""
    (machine,) = {lease.machine_id for lease in stoker.leases(job)}
    page.goto(f"{reader.url}/money")
    row = page.locator("#hosts tbody tr").filter(has_text=machine)
    expect(row).not_to_contain_text("…")  # the market was asked
    row.get_by_role("button", name="Block").focus()
    page.keyboard.press("Enter")
    page.keyboard.insert_text("throttles <b>after</b> ten minutes")  # the focus is on the reason
    page.keyboard.press("Enter")
    expect(row).to_contain_text("blocked throttles <b>after</b> ten minutes")
    reader.inspect(page, "money")
    row.get_by_role("button", name="Unblock").click()
    expect(row).to_contain_text("may be rented")


def _picture(page: Page, target: Path) -> None:
    """What the README shows of the Job page."""
    page.reload()  # what was said of the replay goes
    page.locator("#plot .u-legend").wait_for()
    for image in page.locator("#job-samples img").all():
        page.wait_for_function(LOADED, arg=image.element_handle())
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#job-samples").bounding_box()
    assert box is not None
    clip = {"x": 0, "y": 0, "width": 1280, "height": box["y"] + box["height"] + 8}
    with Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True))) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(target, optimize=True)


def _late(route: Route) -> None:
    """A network that brings one script well after another must not leave a page without its
    stream."""
    time.sleep(0.5)
    route.continue_()


def test_a_page_stays_true_when_the_web_process_is_killed(
    reader: Reader, key: str, stoker: Any, until: Any
) -> None:
    job = stoker.order(gpu=NOWHERE)
    page = reader.tab()
    reader.log_in(page, key)
    page.route("**/hx-sse.min.js", _late)
    page.goto(f"{reader.url}/jobs/{job}")
    badge = page.locator("#job-status .badge").first
    expect(badge).to_contain_text("pendingGpu")
    page.evaluate("window.same = true")
    lost = page.get_by_text("Reconnecting…")
    expect(lost).to_be_hidden()
    stoker.kill("web")
    expect(lost).to_be_visible()
    with stoker.services.store.transaction() as tx:
        record.cancel(tx, job, stoker.services.clock())
    expect(badge).to_contain_text("cancelled")
    expect(lost).to_be_hidden()
    assert page.evaluate("window.same"), "the page was loaded anew"
    lines = ("net::ERR_", "htmx:sse:error: network error", "htmx:sse:error: Failed to fetch")
    reader.faults = [item for item in reader.faults if not any(line in item for line in lines)]


def test_markup_in_names_and_reasons_is_text_on_live_pages(
    reader: Reader, key: str, stoker: Any
) -> None:
    fleet, page = reader.tab(), reader.tab()
    reader.log_in(fleet, key)
    recipe = {**TINY_RECIPE, "trigger": EVIL}
    job = stoker.order(gpu=NOWHERE, metadata={"order": EVIL}, recipe=recipe, max_attempts=1)
    page.goto(f"{reader.url}/jobs/{job}")
    expect(page.locator("#job-status .badge").first).to_contain_text("pendingGpu")
    with stoker.services.store.transaction() as tx:
        now = stoker.services.clock()
        failed = record.stall(tx, job, Reason(code="host.bad", message=EVIL), now)
        line = Event(
            job=job, seq=failed.seq + 1, attempt=1, type="log.lines", at=now,
            data={"lines": [EVIL, "the end"]},
        )  # fmt: skip
        tx.add_events([line])
        tx.save_jobs([failed.evolve(seq=line.seq)])
    expect(page.locator("#job-status .alarm")).to_contain_text(EVIL)
    expect(page.locator("#job-log")).to_contain_text(EVIL)
    expect(page.get_by_role("definition").filter(has_text=EVIL)).to_be_visible()
    row = fleet.locator(f"#row-{job}")
    expect(row).to_contain_text(EVIL)
    for one in (fleet, page):
        assert one.locator("img[src=x]").count() == 0
