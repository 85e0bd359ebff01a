"""Webhook truth: whatever networks do to reports in and webhooks out, the same story is told.

A job's whole life (an attempt that fails, one that succeeds) goes over two lines that lose
requests, lose answers after the commit, repeat, delay, and are dead for hours. What is stored and
what the customer holds in the end must be what the undisturbed life leaves behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import run_wsgi_app

from gpu_agent import wire
from gpu_agent.clock import Clock
from gpu_agent.halt import Halt
from gpu_agent.report import Reporter, Spool
from gpu_agent.wire import Fact
from state import record
from state.events import OutgoingStatus, Secret
from state.job import Status
from tasks.relay import Answer, NoAnswer, Relay

CUSTOMER = "whsec_" + "A" * 44
#: Seconds between an agent's tries, at most.
AGENT_PAUSE = 60
SEEDS = {"memory": range(40), "postgres": range(4)}

SETTING_UP = [
    (Fact.GPU_READY, {"gpu_name": "RTX 4090"}),
    (Fact.IMAGES_PROGRESS, {"bytes": 5, "total": 10}),
    (Fact.IMAGES_READY, {"files": 10}),
    (Fact.MODEL_PROGRESS, {"bytes": 5, "total": 10}),
    (Fact.LOG_LINES, {"lines": ["caf\u00e9 \u732b"]}),
    (Fact.MODEL_READY, {}),
    (Fact.FILES_POSITIONED, {}),
    (Fact.TRAINING_STARTED, {"total": 40}),
    (Fact.TRAINING_PROGRESS, {"step": 10, "total": 40, "loss": 0.5, "points": [[10, 0.5]]}),
    (Fact.HEARTBEAT, {}),
    (Fact.TRAINING_PROGRESS, {"step": 20, "total": 40, "loss": 0.25, "points": [[20, 0.25]]}),
]
FAILING = [(Fact.ERROR, {"code": "gpu.lost", "message": "the GPU is gone", "retryable": True})]
SUCCEEDING = [
    (Fact.TRAINING_SAMPLE, {"step": 40, "name": "samples/40.png"}),
    (Fact.TRAINING_COMPLETED, {"steps": 40}),
]
UPLOADED = [(Fact.WEIGHTS_UPLOADED, {"files": [{"name": "w", "bytes": 1, "sha256": "0" * 64}]})]


@dataclass
class Line:
    """What lies between two parties. With `trouble` 0 it is perfect."""

    random: random.Random
    clock: Any
    trouble: float = 1.0
    dead_until: float = 0.0
    late: list[Any] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)

    def carry(self, deliver: Any, message: Any) -> Any:
        """The answer to `message`, or None when the sender hears nothing."""
        if self.clock().timestamp() < self.dead_until:
            return self._hears_nothing("dead")
        if self._chance(0.15):
            return self._hears_nothing("requests")
        answer = deliver(message)
        if self._chance(0.2):
            self.lost["repeated"] += 1
            deliver(message)
        if self._chance(0.2):
            self.late.append(message)
        if self.late and self._chance(0.3):
            self.lost["overtaken"] += 1
            deliver(self.late.pop(self.random.randrange(len(self.late))))
        if self._chance(0.15):
            return self._hears_nothing("answers")
        return answer

    def _chance(self, share: float) -> bool:
        return self.random.random() < share * self.trouble

    def _hears_nothing(self, why: str) -> None:
        self.lost[why] += 1


class Customer:
    """An endpoint that believes nothing unsigned, and keeps all that comes."""

    def __init__(self, line: Line, clock: Any) -> None:
        self.line, self.clock = line, clock
        self.got: list[dict[str, Any]] = []

    def __call__(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        answer = self.line.carry(self.take, (dict(headers), body))
        if answer is None:
            raise NoAnswer("no answer in time")
        if self.line.trouble and self.line.random.random() < 0.1:
            return Answer(503, {"retry-after": str(self.line.random.randrange(1, 4000))})
        return answer

    def take(self, message: tuple[dict[str, str], bytes]) -> Answer:
        headers, body = message
        try:
            name = wire.verify(body, headers, secrets=[CUSTOMER], now=self.clock().timestamp())
        except wire.SignatureError:
            return Answer(401, {})  # a copy that was under way for too long
        self.got.append({"id": name, **wire.json.loads(body)})
        return Answer(204, {})

    def story(self) -> list[dict[str, Any]]:
        """Repeats left out, in the order of `seq`."""
        return sorted(
            {item["id"]: item for item in self.got}.values(), key=lambda item: item["data"]["seq"]
        )


@dataclass
class Life:
    """One job, from the order to its end, over the lines given."""

    edge: Any
    inward: Line
    customer: Customer
    in_order: bool = False

    def live(self) -> None:
        self.job = self.edge.job(webhook_url="https://customer.example/hook").id
        self.relay = Relay(
            store=self.edge.store,
            post=self.customer,
            clock=self.edge.clock,
            random=self.inward.random,
        )
        first = self.edge.agent(self.edge.stored(self.job), token=f"first of {self.job}")
        self.tell(first, SETTING_UP)
        self.tell(first, FAILING)
        with self.edge.store.transaction() as tx:
            again = record.retry(tx, self.job, self.edge.clock())
        second = self.edge.agent(again, token=f"second of {self.job}")
        # a machine that was thought lost comes back, and goes on as if nothing had been
        for fact, data in SETTING_UP + SUCCEEDING + UPLOADED:
            assert first.report(fact, **data).status_code == 410
        self.tell(second, SETTING_UP + SUCCEEDING)
        self.tell(second, UPLOADED)
        with self.edge.store.transaction() as tx:
            record.verified(tx, self.job, 2, self.edge.clock())
        while self.inward.late:  # what is still under way arrives after the end
            self.deliver(self.inward.late.pop())
        self.settle()

    def tell(self, agent: Any, facts: Any) -> None:
        """Report until all is acknowledged; four at once are under way, in any order."""
        waiting = [(agent, agent.say(fact, **data)) for fact, data in facts]
        at_once = 1 if self.in_order else 4
        while waiting:
            index = self.inward.random.randrange(min(at_once, len(waiting)))
            answer = self.inward.carry(self.deliver, self.signed(*waiting[index]))
            if answer is None:
                self.edge.clock.advance(self.inward.random.uniform(1, AGENT_PAUSE))
            else:
                # An error ends its attempt: of its repeat, the agent need only know that.
                over = 410 if waiting[index][1].type is Fact.ERROR else 200
                assert answer.status_code in (200, over), answer.text
                waiting.pop(index)
            if self.inward.random.random() < 0.3:
                self.relay.relay(self.job)

    def signed(self, agent: Any, report: wire.Report) -> Any:
        body = report.to_bytes()
        return agent.path, body, agent.signed(body, report.webhook_id)

    def deliver(self, message: Any) -> Any:
        path, body, headers = message
        return self.edge.client().post(path, data=body, headers=headers)

    def settle(self) -> None:
        """Relay whenever something is due, until nothing is owed."""
        while True:
            self.relay.relay(self.job)
            with self.edge.store.transaction() as tx:
                row = tx.next_outgoing(self.job)
            if row is None:
                return
            wait = (row.due_at - self.edge.clock()).total_seconds()
            self.edge.clock.advance(max(wait, 0.001))

    def facts(self) -> Any:
        """What was stored, as far as it may not depend on luck."""
        with self.edge.store.transaction() as tx:
            job, events = tx.job(self.job), tx.events(self.job, limit=10_000)
            rows = tx.list_outgoing(self.job)
        assert [event.seq for event in events] == list(range(1, job.seq + 1)), "no gap"
        assert [row.seq for row in rows] == list(range(1, job.owed + 1)), "no gap"
        assert {row.status for row in rows} == {OutgoingStatus.DELIVERED}
        reports = [event for event in events if event.agent_seq is not None]
        told = {(event.attempt, event.agent_seq): (event.type, event.data) for event in reports}
        assert len(told) == len(reports), "each once"
        steps = [event.data for event in events if event.type == "transition"]
        return {
            "status": job.status,
            "attempt": job.attempt,
            "known": job.known,
            "transitions": [(step["from"], step["to"]) for step in steps],
            "reports": told,
        }

    def webhooks(self) -> Any:
        """What the customer knows, but for progress, which is told at the speed that there is."""
        story = self.customer.story()
        seqs = [item["data"]["seq"] for item in story]
        assert seqs == list(range(1, self.edge.stored(self.job).owed + 1)), "no gap"
        firsts = list({item["id"]: item["data"]["seq"] for item in self.customer.got}.values())
        assert firsts == seqs, "and first seen in order"
        told = [item for item in story if item["type"] != "job.progress"]
        return {
            "all": Counter(item["type"] for item in told),
            "steps": [
                (item["data"]["from"], item["data"]["to"], item["data"]["attempt"])
                for item in told
                if item["type"] != "job.sample"
            ],
        }


@pytest.fixture
def lives(edge: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts lives of a seed; None is the undisturbed one."""
    create = record.create_job

    def with_secret(tx: Any, *args: Any, **named: Any) -> Any:
        return create(tx, *args, **named, webhook_secrets=[Secret(CUSTOMER)])

    monkeypatch.setattr(record, "create_job", with_secret)

    def live(seed: int | None, **changes: Any) -> Life:
        trouble = 0.0 if seed is None else 1.0
        dice = random.Random(seed or 0)
        inward = Line(dice, edge.clock, trouble)
        outward = Line(dice, edge.clock, trouble)
        if trouble:
            now = edge.clock().timestamp()
            inward.dead_until = now + dice.choice([0, 0, 3 * 3600])
            outward.dead_until = now + dice.choice([0, 0, 20 * 3600])
        life = Life(edge, inward, Customer(outward, edge.clock), **changes)
        life.live()
        return life

    return live


def test_a_life_over_bad_lines_is_told_as_the_undisturbed_one(
    lives: Any, request: pytest.FixtureRequest
) -> None:
    calm = lives(None)
    wanted = calm.facts(), calm.webhooks()
    assert wanted[0]["status"] is Status.COMPLETED
    assert len(wanted[0]["reports"]) == 2 * len(SETTING_UP) + 4
    lost: Counter[str] = Counter()
    for seed in SEEDS[request.node.callspec.params["store"]]:
        life = lives(seed)
        assert (life.facts(), life.webhooks()) == wanted, f"seed {seed}"
        lost += life.inward.lost + life.customer.line.lost
    assert all(lost[kind] > 5 for kind in ("requests", "answers", "repeated", "overtaken")), lost


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_reports_that_come_in_order_have_the_same_causes_too(lives: Any) -> None:
    """As the real agent sends them: the next one only when the last was acknowledged."""

    def causes(life: Life) -> list[str]:
        return [
            item["data"].get("cause")
            for item in life.customer.story()
            if item["type"] not in ("job.progress", "job.sample")
        ]

    wanted = causes(lives(None, in_order=True))
    for seed in range(10):
        assert causes(lives(seed, in_order=True)) == wanted, f"seed {seed}"


# --- the real agent's reporter, over real sockets -----------------------------------------------


class Cutting:
    """In front of the server: cuts connections before or after it did its work, and repeats it."""

    def __init__(self, app: Any, dice: random.Random) -> None:
        self._app, self._dice = app, dice
        self.lost: Counter[str] = Counter()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        luck = self._dice.random()
        if luck < 0.15:
            return self._cut(environ, start_response, "requests")
        for _ in range(2 if self._dice.random() < 0.2 else 1):
            answered = run_wsgi_app(self._app, {**environ, "wsgi.input": io.BytesIO(body)}, True)
        if luck < 0.30:
            return self._cut(environ, start_response, "answers")
        said, status, headers = answered
        start_response(status, list(headers))
        return said

    def _cut(self, environ: Any, start_response: Any, why: str) -> Any:
        self.lost[why] += 1
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response("500 Cut", [])
        return []


class Silent(WSGIRequestHandler):
    def log(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_real_reporter_gets_every_fact_through_and_none_twice(
    edge: Any, tmp_path: Path
) -> None:
    agent = edge.agent()
    cutting = Cutting(edge.app.wsgi_app, random.Random(7))
    with serving(cutting) as url:
        reporter = Reporter(
            dataclasses.replace(agent.spec, report_url=url + agent.path),
            Spool(tmp_path / "spool"),
            clock=Clock(wall=lambda: edge.clock().timestamp()),
            halt=Halt(),
            on_order=lambda order: None,
            on_heard=lambda: None,
            delays=(0.001,),
        )
        for fact, data in SETTING_UP[:-3]:
            reporter.put(fact, data)
        for step in range(200):
            reporter.put(Fact.TRAINING_PROGRESS, {"step": step, "total": 200, "points": [step]})
            if step % 10 == 0:
                reporter.put(Fact.TRAINING_SAMPLE, {"step": step})
            if step == 100:
                reporter.start()
        assert reporter.flush(60)
        reporter.close()
    with edge.store.transaction() as tx:
        events = [item for item in tx.events(agent.spec.job, limit=10_000) if item.agent_seq]
        assert tx.job(agent.spec.job).status is Status.TRAINING
    assert [item.agent_seq for item in events] == list(range(1, len(events) + 1))
    told = [item.type for item in events if item.type not in ("training.progress", "heartbeat")]
    assert told == [fact.value for fact, _ in SETTING_UP[:-3]] + ["training.sample"] * 20
    points = [
        point
        for item in events
        if item.type == "training.progress"
        for point in item.data["points"]
    ]
    assert points == list(range(200)), "merged while they waited, and none lost"
    assert min(cutting.lost["requests"], cutting.lost["answers"]) > 0
