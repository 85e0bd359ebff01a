"""The Job page: one training, from what was asked for to what came of it."""

from __future__ import annotations

import html
import json
import re
import shlex
from typing import Any

from gpu_agent.wire import Fact
from orchestrator.dashboard import job as job_page
from state import record
from state.events import Artefact
from state.job import Reason, Status

XSS = "<script>alert(1)</script>"
SHA = "ab" * 32


def open_page(edge: Any, job: Any, browser: Any = None) -> str:
    answer = (browser or edge.page()).get(f"/jobs/{job.id}")
    assert answer.status_code == 200, answer.text
    return str(answer.text)


def part_of(page: str, name: str) -> str:
    """A panel of the page."""
    return page.partition(f'id="{name}"')[2].partition("</section>")[0]


def post(edge: Any, browser: Any, path: str) -> Any:
    token = edge.csrf_of(browser.get("/"))
    return browser.post(path, data={"csrf_token": token})


def training(edge: Any, **request: Any) -> Any:
    agent = edge.agent(edge.job(**request))
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        edge.clock.advance(30)
        agent.report(fact)
    return agent


def sample(step: int, number: int, **more: Any) -> dict[str, Any]:
    name = f"samples/{step}-{number}.png"
    return {"step": step, "name": name, "bytes": 9, "sha256": SHA, "seed": 7, **more}


def test_an_unknown_job_is_a_404_page(edge: Any) -> None:
    browser = edge.page()
    for name in ("job_unheard_of", "..%2fetc", "%00"):
        for path in ("", "/curve", "/log", "/files/x", "/samples/x"):
            answer = browser.get(f"/jobs/{name}{path}")
            assert answer.status_code == 404
            if name == "job_unheard_of":
                assert "<h1>404</h1>" in answer.text


def test_a_part_asked_for_without_a_login_leads_there(edge: Any) -> None:
    job = edge.job()
    answer = edge.client().get(f"/jobs/{job.id}/curve", headers={"HX-Request": "true"})
    assert answer.status_code == 401
    assert answer.headers["HX-Redirect"] == "/login"


def test_states_are_lit_with_their_durations_and_returns(edge: Any) -> None:
    agent = training(edge)
    edge.clock.advance(90)
    with edge.store.transaction() as tx:
        reason = Reason(code="agent.silent", message="not heard for 47 s")
        record.stall(tx, agent.spec.job, reason, edge.clock())
    edge.clock.advance(5)
    with edge.store.transaction() as tx:
        record.retry(tx, agent.spec.job, edge.clock())
    page = open_page(edge, edge.stored(agent.spec.job))
    boxes = {
        re.search(r"s-(\w+)", one)[1]: one
        for one in re.findall(r'<g class="box (.*?)</g>', page, re.DOTALL)
    }
    assert set(boxes) == set(Status)
    assert "1 min 30 s" in boxes["training"]
    assert "visited" in boxes["stalled"]
    assert "current" in boxes["pendingGpu"]
    assert "2 times" in boxes["pendingGpu"]
    assert "visited" not in boxes["completed"]
    assert "attempt 2" in part_of(page, "job-states")  # the same as a list, for all readers


def test_the_curve_tells_attempts_and_kinds_apart(edge: Any) -> None:
    agent = training(edge)
    agent.report(
        Fact.TRAINING_PROGRESS,
        step=2,
        total=10,
        loss=0.4,
        points=[[1, 0.5, 1e-4], [2, 0.4, 1e-4], {"step": 2, "validation_loss": 0.3}, ["x"], None],
    )
    files = [{"name": "checkpoints/2-ab/manifest.json", "bytes": 5, "sha256": SHA}]
    agent.report(Fact.TRAINING_CHECKPOINT, step=2, best=True, files=files)
    answer = edge.page().get(f"/jobs/{agent.spec.job}/curve").get_json()
    assert answer == {
        "loss": [[1, 1, 0.5], [1, 2, 0.4]],
        "validation_loss": [[1, 2, 0.3]],
        "checkpoints": [[1, 2, True]],
    }


def test_samples_stand_by_prompt_and_step(edge: Any) -> None:
    agent = training(edge)
    for step in (100, 200):
        agent.report(Fact.TRAINING_SAMPLE, **sample(step, 0, prompt=f"a dog {XSS}"))
        agent.report(Fact.TRAINING_SAMPLE, **sample(step, 1, prompt="a cat"))
    browser = edge.page()
    page = part_of(open_page(edge, edge.stored(agent.spec.job), browser), "job-samples")
    assert re.findall(r"step (\d+)</th>|>step (\d+)", page)
    assert page.count("<tr>") == 3  # a head, and a row for each prompt
    assert page.index("100-0.png") < page.index("200-0.png") < page.index("100-1.png")
    assert XSS not in page
    answer = browser.get(f"/jobs/{agent.spec.job}/samples/100-0.png?attempt=1")
    assert answer.status_code == 302
    assert answer.location.startswith("https://s3.test/jobs/")


def test_what_hosts_write_is_shown_as_text(edge: Any) -> None:
    agent = training(edge, metadata={"note": XSS})
    agent.report(Fact.LOG_LINES, lines=[f"line {XSS}", 7, None])
    agent.report(Fact.ERROR, code=f"trainer.{XSS}", message=f"broke {XSS}", retryable=False)
    page = open_page(edge, edge.stored(agent.spec.job))
    assert XSS not in page
    log = page.partition('id="job-log"')[2].partition("</pre>")[0]
    assert f"line {html.escape(XSS)}" in log
    assert f"broke {html.escape(XSS)}" in part_of(page, "job-status")
    text = edge.page().get(f"/jobs/{agent.spec.job}/log")
    assert text.mimetype == "text/plain"
    assert XSS in text.text
    assert text.headers["X-Content-Type-Options"] == "nosniff"


def test_buttons_do_what_they_say_and_fit_the_state(edge: Any) -> None:
    agent, browser = training(edge), edge.page()
    here = f"/jobs/{agent.spec.job}"
    page = open_page(edge, edge.stored(agent.spec.job), browser)
    assert f'action="{here}/checkpoint"' in page
    assert f'action="{here}/retry"' not in page
    for order in ("checkpoint", "sample"):
        answer = post(edge, browser, f"{here}/{order}")
        assert (answer.status_code, answer.location) == (303, here)
    assert "checkpoint ordered" in open_page(edge, edge.stored(agent.spec.job), browser)
    assert agent.report(Fact.HEARTBEAT).get_json(force=True)["orders"] == [
        "checkpoint_now",
        "sample_now",
    ]
    post(edge, browser, f"{here}/cancel")
    assert edge.stored(agent.spec.job).status is Status.CANCELLED
    page = open_page(edge, edge.stored(agent.spec.job), browser)
    assert "cancel</button>" not in page.lower()
    answer = post(edge, browser, f"{here}/checkpoint")  # a page that was older than the job
    assert answer.status_code == 303
    assert 'class="notice error"' in open_page(edge, edge.stored(agent.spec.job), browser)
    assert f'href="/new?from={agent.spec.job}"' in page


def test_the_copied_command_orders_the_same_again(edge: Any) -> None:
    job = edge.job(metadata={"who": 'it\'s "Größe"'}, max_cost=123_456)
    found = re.search(r'id="curl"[^>]*>(.*?)</pre>', open_page(edge, job), re.DOTALL)
    words = shlex.split(html.unescape(found[1]).replace("\\\n", ""))
    body = json.loads(words[words.index("-d") + 1])
    headers = edge.key("alice")
    answer = edge.client().post("/v1/jobs", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    again = edge.stored(answer.get_json()["id"]).request
    assert again == job.request


def test_files_are_listed_with_size_and_hash_and_can_be_had(edge: Any) -> None:
    job = edge.job()
    with edge.store.transaction() as tx:
        tx.put_artefacts(
            [
                Artefact(
                    job=job.id,
                    name=name,
                    attempt=1,
                    key=f"jobs/{job.id}/{name}",
                    bytes=3_400_000,
                    sha256=SHA,
                    created_at=edge.clock(),
                    verified=True,
                    expired=name == "old.log",
                )
                for name in ("samples/1.png", "lora.safetensors", "old.log")
            ]
        )
    browser = edge.page()
    files = part_of(open_page(edge, job, browser), "job-files")
    assert "3.4 MB" in files
    assert SHA in files
    assert files.index("lora.safetensors") < files.index("samples/1.png"), "weights come first"
    assert "/files/old.log" not in files
    answer = browser.get(f"/jobs/{job.id}/files/lora.safetensors")
    assert answer.status_code == 302
    assert answer.location.startswith(f"https://s3.test/jobs/{job.id}/lora.safetensors")
    assert browser.get(f"/jobs/{job.id}/files/old.log").status_code == 410


def test_deliveries_are_shown_without_the_secret_part_of_the_address(edge: Any) -> None:
    job = edge.job(webhook_url="https://hooks.test/in?token=hush")
    page = part_of(open_page(edge, job), "job-deliveries")
    assert "job.pending_gpu" in page
    assert "https://hooks.test/in" in page
    assert "hush" not in page


def test_a_job_whose_history_and_dataset_are_gone_is_still_shown(edge: Any) -> None:
    job = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    edge.clock.advance(90 * 86_400)
    with edge.store.transaction() as tx:
        tx.drop_events_before(edge.clock(), 100)
        tx.delete_dataset(job.request.dataset_id)
    page = open_page(edge, job)
    assert "deleted after its time of keeping" in page
    assert "cancelled" in part_of(page, "job-status")


def test_parts_for_the_stream_bring_new_points_lines_and_states(edge: Any) -> None:
    agent = training(edge)
    agent.report(Fact.LOG_LINES, lines=["first"])

    def look() -> job_page.Look:
        with edge.store.transaction() as tx:
            return job_page.look(tx, tx.job(agent.spec.job), edge.deps)

    def parts(before: job_page.Look | None, after: job_page.Look) -> str:
        with edge.app.test_request_context(), edge.store.transaction() as tx:
            return job_page.fragments(tx, before, after)

    before = look()
    edge.clock.advance(1)
    assert look() == before  # time alone is no news
    everything = parts(None, before)
    assert "data-all" in everything  # the curve is to be fetched anew
    assert "first" in everything
    assert "csrf" not in everything
    agent.report(Fact.LOG_LINES, lines=["second"])
    agent.report(Fact.TRAINING_PROGRESS, step=5, total=10, points=[[5, 0.25, 1e-4]])
    changed = parts(before, look())
    assert 'hx-swap-oob="beforeend:#job-log"' in changed
    assert "second" in changed
    assert "<span>first" not in changed
    assert 'id="job-events"' not in changed  # nothing worth a line
    news = re.search(r'id="curve-news" hidden value="([^"]*)"', changed)
    assert json.loads(html.unescape(news[1]))["loss"] == [[1, 5, 0.25]]
    assert 'id="job-states"' not in changed
    assert 'id="job-samples"' not in changed
    before = look()
    with edge.store.transaction() as tx:
        record.cancel(tx, agent.spec.job, edge.clock())
    ended = parts(before, look())
    assert 'id="job-states"' in ended
    assert 'id="job-explain" hx-swap-oob="delete"' in ended
