"""Streams of the API and the pages, over a real store: what a reader is sent, and may resume."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from gpu_agent import wire
from orchestrator import streams
from orchestrator.api import auth, webhook_endpoints
from orchestrator.api.auth import Caller
from orchestrator.api.webhook_endpoints import EndpointIn
from state import brakes, hosts, record
from state.events import HostRecord
from tests.integration.orchestrator.conftest import Edge

STREAM = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Message:
    id: str
    event: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def messages(chunk: bytes) -> Iterator[Message]:
    for block in chunk.decode().split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
        said = {name: value for name, _, value in lines}
        data = "\n".join(value for name, _, value in lines if name == "data")
        if "data" in said:
            yield Message(said.get("id", ""), said.get("event", ""), data)


def all_of(answer: TestResponse) -> list[Message]:
    """Every message of a stream that ends."""
    assert answer.status_code == 200, answer.text
    assert answer.mimetype == "text/event-stream"
    return [found for chunk in answer.response for found in messages(bytes(chunk))]


def some_of(answer: TestResponse, chunks: int) -> list[bytes]:
    return [bytes(chunk) for chunk in itertools.islice(answer.response, chunks)]


def follow(edge: Edge, path: str, headers: dict[str, str], **more: str) -> TestResponse:
    return edge.client().get(path, headers={**headers, **STREAM, **more}, buffered=False)


def test_events_come_as_in_the_list_and_end_with_their_job(
    edge: Edge, alice: dict[str, str]
) -> None:
    agent = edge.agent()
    agent.report(wire.Fact.GPU_READY)
    job = agent.spec.job
    with edge.store.transaction() as tx:
        record.cancel(tx, job, edge.clock())
    listed = edge.client().get(f"/v1/jobs/{job}/events", headers=alice).json["data"]
    *told, end = all_of(follow(edge, f"/v1/jobs/{job}/events", alice))
    assert [message.json for message in told] == listed
    assert [int(message.id) for message in told] == [item["seq"] for item in listed]
    assert [message.event for message in told] == [item["type"] for item in listed]
    assert (end.event, end.json) == ("end", {"status": "cancelled"})


def test_a_stream_says_that_nobody_may_keep_or_collect_it(
    edge: Edge, alice: dict[str, str]
) -> None:
    answer = follow(edge, f"/v1/jobs/{edge.job().id}/events", alice)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert some_of(answer, 1) == [b"retry: 2000\n\n"]


def test_a_stream_resumes_without_gap_or_repeat(edge: Edge, alice: dict[str, str]) -> None:
    agent = edge.agent()
    for step in range(250):  # more than are read at once
        agent.report(wire.Fact.TRAINING_PROGRESS, step=step, total=1000)
    path = f"/v1/jobs/{agent.spec.job}/events"
    _, first = some_of(follow(edge, path, alice), 2)
    read = list(messages(first))[:100]
    with edge.store.transaction() as tx:
        record.cancel(tx, agent.spec.job, edge.clock())
    rest = all_of(follow(edge, path, alice, **{"Last-Event-ID": read[-1].id}))
    seqs = [int(message.id) for message in (*read, *rest) if message.event != "end"]
    assert seqs == list(range(1, edge.stored(agent.spec.job).seq + 1))
    assert [message.id for message in all_of(follow(edge, f"{path}?after=249", alice))] == [
        str(seq) for seq in seqs[249:]
    ] + [""]


def test_who_has_all_of_a_job_that_is_over_need_not_come_back(
    edge: Edge, alice: dict[str, str]
) -> None:
    job = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    last = all_of(follow(edge, f"/v1/jobs/{job.id}/events", alice))[-2].id
    answer = follow(edge, f"/v1/jobs/{job.id}/events", alice, **{"Last-Event-ID": last})
    assert (answer.status_code, answer.data) == (204, b"")


def test_lines_of_one_report_can_be_told_apart(edge: Edge, alice: dict[str, str]) -> None:
    agent = edge.agent()
    agent.report(wire.Fact.LOG_LINES, lines=["one", "two", "three"])
    agent.report(wire.Fact.LOG_LINES, lines=["four"])
    with edge.store.transaction() as tx:
        record.cancel(tx, agent.spec.job, edge.clock())
    path = f"/v1/jobs/{agent.spec.job}/logs"
    *lines, end = all_of(follow(edge, path, alice))
    assert [line.json["text"] for line in lines] == ["one", "two", "three", "four"]
    assert [line.event for line in lines] == ["log"] * 4
    for place, line in enumerate(lines):
        rest = all_of(follow(edge, path, alice, **{"Last-Event-ID": line.id}))
        assert rest == [*lines[place + 1 :], end]


def test_an_id_that_is_not_ours_is_a_problem(
    edge: Edge, alice: dict[str, str], problem: Callable[..., dict[str, Any]]
) -> None:
    path = f"/v1/jobs/{edge.job().id}/events"
    for garbage in ("x", "-1", "1.", "9" * 40, "1.2.3", "1 2"):
        answer = follow(edge, path, alice, **{"Last-Event-ID": garbage})
        assert problem(answer, 422, "invalid")["errors"][0]["pointer"] == "Last-Event-ID"


def test_a_strangers_job_has_no_stream(edge: Edge, problem: Callable[..., dict[str, Any]]) -> None:
    answer = follow(edge, f"/v1/jobs/{edge.job('alice').id}/events", edge.key("bob"))
    problem(answer, 404, "not_found")


def test_silence_is_broken_by_heartbeats(edge: Edge, alice: dict[str, str]) -> None:
    began = edge.clock()
    answer = follow(edge, f"/v1/jobs/{edge.job().id}/events?after=99", alice)
    assert some_of(answer, 3)[1:] == [streams.BEAT] * 2
    assert edge.clock() - began <= 2 * streams.HEARTBEAT + timedelta(seconds=2)


def test_news_come_while_one_reads(edge: Edge, alice: dict[str, str]) -> None:
    agent = edge.agent()
    answer = follow(edge, f"/v1/jobs/{agent.spec.job}/events", alice)
    some_of(answer, 2)
    agent.report(wire.Fact.GPU_READY)
    (news,) = some_of(answer, 1)
    assert "gpu.ready" in [message.event for message in messages(news)]


def test_a_revoked_key_ends_its_streams_within_a_minute(edge: Edge) -> None:
    headers = edge.key("alice")
    answer = follow(edge, f"/v1/jobs/{edge.job().id}/events", headers)
    some_of(answer, 2)
    revoked_at = edge.clock()
    with edge.store.transaction() as tx:
        (key,) = tx.api_keys()
        tx.save_api_key(replace(key, revoked_at=revoked_at))
    *_, last = answer.response
    assert [found.json for found in messages(bytes(last))] == [{"code": "unauthorized"}]
    assert edge.clock() - revoked_at <= timedelta(minutes=1)


def test_too_many_streams_are_told_to_wait(
    edge: Edge, alice: dict[str, str], problem: Callable[..., dict[str, Any]]
) -> None:
    path = f"/v1/jobs/{edge.job().id}/events"
    held = [follow(edge, path, alice) for _ in range(streams.MOST_OF_ONE)]
    refused = follow(edge, path, alice)
    assert refused.headers["Retry-After"]
    assert problem(refused, 429, "too_many_streams")["retryable"] is True
    held.pop().close()
    assert follow(edge, path, alice).status_code == 200


# --- pages ------------------------------------------------------------------------------------


def live(browser: FlaskClient, path: str) -> TestResponse:
    return browser.get(path, headers={**STREAM, "HX-Request": "true"}, buffered=False)


def test_the_fleet_is_sent_whole_and_then_what_changed(edge: Edge) -> None:
    agent, other = edge.agent(), edge.job()
    answer = live(edge.page(), "/live/fleet")
    _, whole = some_of(answer, 2)
    assert agent.spec.job.encode() in whole
    assert other.id.encode() in whole
    agent.report(wire.Fact.GPU_READY)
    (news,) = some_of(answer, 1)
    (message,) = messages(news)
    assert message.event == ""  # htmx swaps it
    assert agent.spec.job in message.data
    assert "hx-swap-oob" in message.data
    assert f'id="{other.id}"' not in message.data


def test_strangers_see_no_live_page(edge: Edge) -> None:
    answer = live(edge.client(), "/live/fleet")
    assert answer.status_code == 401


def test_a_jobs_page_is_sent_whole_and_then_what_changed(edge: Edge) -> None:
    agent = edge.agent()
    answer = live(edge.page(), f"/live/jobs/{agent.spec.job}")
    _, whole = some_of(answer, 2)
    assert "hx-swap-oob" in next(messages(whole)).data
    agent.report(wire.Fact.LOG_LINES, lines=["a line <of> the log"])
    (news,) = some_of(answer, 1)
    (message,) = messages(news)
    assert "a line &lt;of&gt; the log" in message.data
    assert len(news) < len(whole) / 2


def test_a_job_that_is_not_there_has_no_live_page(edge: Edge) -> None:
    assert live(edge.page(), "/live/jobs/job_nowhere").status_code == 404


def test_the_webhooks_page_is_sent_whole_and_then_what_changed(edge: Edge) -> None:
    caller = Caller(owner="alice", scopes=frozenset({auth.WRITE}))
    shop = EndpointIn(url="https://shop.test/hooks")
    made, _ = webhook_endpoints.create(edge.deps, caller, shop)
    browser = edge.page()
    answer, other = live(browser, "/live/webhooks"), live(browser, "/live/webhooks?to=we_other")
    _, whole = some_of(answer, 2)
    assert "https://shop.test/hooks" in next(messages(whole)).data
    some_of(other, 2)
    sent = webhook_endpoints.send_test(edge.deps, lambda *_: None, caller, made.id)
    (news,) = some_of(answer, 1)
    (message,) = messages(news)
    assert f'id="delivery-{sent.id}"' in message.data
    assert "1 waiting" in message.data
    (news,) = some_of(other, 1)  # whose filter leaves it out
    (message,) = messages(news)
    assert sent.id not in message.data
    assert "1 waiting" in message.data


def run_well(edge: Edge) -> None:
    """No alarm stands: those count the seconds since something was last seen."""
    with edge.store.transaction() as tx:
        for name in ("worker", "reconcile", brakes.SWEEP):
            tx.beat(name, edge.clock())


def test_the_money_page_is_sent_whole_and_then_what_changed(edge: Edge) -> None:
    run_well(edge)
    with edge.store.transaction() as tx:
        tx.save_host(HostRecord(machine_id="7", gpu_name="RTX 4090", good=3))
    answer = live(edge.page(), "/live/money?days=7&by=host")
    _, whole = some_of(answer, 2)
    for part in ("renting", "now", "guards", "spend", "hosts-table"):
        assert f'id="{part}"' in next(messages(whole)).data
    job = edge.job()
    edge.rent(job)
    (news,) = some_of(answer, 1)
    (message,) = messages(news)
    assert job.id in message.data
    assert 'id="spend"' in message.data
    assert 'id="hosts-table"' not in message.data
    with edge.store.transaction() as tx:
        tx.save_host(hosts.blocked(tx.host("7"), "throttles <b>badly</b>"))
    (news,) = some_of(answer, 1)
    (message,) = messages(news)
    assert "throttles &lt;b&gt;badly" in message.data
    assert 'id="now"' not in message.data


def test_money_is_counted_anew_each_minute_only_while_something_burns(edge: Edge) -> None:
    run_well(edge)
    answer = live(edge.page(), "/live/money")
    some_of(answer, 2)
    assert some_of(answer, 2) == [streams.BEAT] * 2
    edge.rent(edge.job())
    some_of(answer, 1)
    began = edge.clock()
    while b'id="spend"' not in some_of(answer, 1)[0]:
        run_well(edge)
    assert timedelta() < edge.clock() - began <= timedelta(minutes=1)


def test_nothing_of_one_session_is_in_a_live_page(edge: Edge) -> None:
    caller = Caller(owner="alice", scopes=frozenset({auth.WRITE}))
    made, _ = webhook_endpoints.create(edge.deps, caller, EndpointIn(url="https://shop.test/"))
    _, whole = some_of(live(edge.page(), "/live/webhooks"), 2)
    assert "csrf" not in whole.decode()
    assert made.secret not in whole.decode()


def test_a_live_page_of_no_such_view_is_refused(edge: Edge) -> None:
    for path in ("/live/money?days=8", "/live/webhooks?status=lost", "/live/webhooks?cursor=x"):
        assert live(edge.page(), path).status_code == 422, path
