"""The receiver of agents' reports: garbage, forgeries, repeats, disorder, lateness."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu_agent import wire
from gpu_agent.wire import Fact
from state import record
from state.errors import StoreUnavailable
from state.job import Reason, Status
from state.record import Outcome

#: What is refused before any database is asked needs none.
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)

ALL = (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED)


def test_a_report_moves_the_job_and_rings_after_the_commit(edge, soon):
    job = edge.job(webhook_url="https://example.com/hook")
    agent = edge.agent(job)
    answer = agent.report(Fact.GPU_READY, gpu="RTX 4090")
    assert (answer.status_code, answer.json) == (200, {"orders": []})
    assert answer.headers["X-Request-Id"]
    assert edge.stored(job.id).status is Status.PENDING_IMAGES
    soon(lambda: ("relay", job.id) in edge.woken)


def test_a_repeated_report_is_answered_alike_and_changes_nothing(edge):
    agent = edge.agent()
    report = agent.say(Fact.GPU_READY)
    assert agent.post(report).status_code == 200
    before = edge.stored(agent.spec.job)
    for _ in range(10):
        assert agent.post(report).status_code == 200
    assert edge.stored(agent.spec.job) == before


def test_the_same_report_from_many_threads_is_applied_once(edge):
    agent = edge.agent()
    report = agent.say(Fact.HEARTBEAT)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: agent.post(report).status_code, range(24)))
    assert set(answers) == {200}
    assert edge.events(agent.spec.job).count("heartbeat") == 1
    assert edge.stored(agent.spec.job).seq == len(edge.events(agent.spec.job))


def test_facts_in_any_order_lead_to_training(edge):
    agent = edge.agent()
    reports = [agent.say(fact) for fact in ALL]
    for report in (reports[3], reports[2], reports[1], reports[1], reports[0]):
        assert agent.post(report).status_code == 200
    assert edge.stored(agent.spec.job).status is Status.TRAINING


@pytest.mark.parametrize("why", ["cancelled", "older attempt"])
def test_a_stale_attempt_is_told_to_stop(edge, problem, why):
    agent = edge.agent()
    with edge.store.transaction() as tx:
        if why == "cancelled":
            record.cancel(tx, agent.spec.job, edge.clock())
        else:
            record.stall(
                tx, agent.spec.job, Reason(code="agent.silent", message="silent"), edge.clock()
            )
            record.retry(tx, agent.spec.job, edge.clock())
    before = edge.stored(agent.spec.job)
    answer = agent.report(Fact.GPU_READY)
    problem(answer, 410, "stale_attempt")
    assert wire.orders_from_bytes(answer.data) == [wire.Order.STOP]
    assert edge.stored(agent.spec.job) == before


def test_an_agents_error_stalls_the_job(edge):
    agent = edge.agent()
    answer = agent.report(Fact.ERROR, code="gpu.oom", message="out of memory", retryable=True)
    assert answer.json == {"orders": ["stop"]}
    job = edge.stored(agent.spec.job)
    assert (job.status, job.reason.code) == (Status.STALLED, "gpu.oom")


# --- forgeries ---


def forged(kind, agent, body, good):
    other = wire.new_secret()
    at = agent.edge.clock().timestamp()
    return {
        "no headers": {},
        "another secret": wire.sign(body, secrets=[other], webhook_id=good["webhook-id"], at=at),
        "another body": agent.signed(body + b" ", good["webhook-id"]),
        "another id": {**good, "webhook-id": good["webhook-id"] + "0"},
        "another time": {**good, "webhook-timestamp": str(int(at) + 1)},
        "an old time": agent.signed(body, good["webhook-id"], at=at - 301),
        "a future time": agent.signed(body, good["webhook-id"], at=at + 302),
        "a fraction": {**good, "webhook-timestamp": good["webhook-timestamp"] + ".9"},
        "a negative time": {**good, "webhook-timestamp": "-5"},
        "a huge time": {**good, "webhook-timestamp": "9" * 400},
        "a strange digit": {**good, "webhook-timestamp": "\u0661"},
        "no signature": {**good, "webhook-signature": ""},
        "no version": {**good, "webhook-signature": good["webhook-signature"][3:]},
        "garbage": {**good, "webhook-signature": "v1,\u00ff v1,, v2,x ,, v1"},
        "a long signature": {**good, "webhook-signature": "v1,A " * 10_000},
    }[kind]


@without_database
@pytest.mark.parametrize(
    "kind",
    [
        "no headers", "another secret", "another body", "another id", "another time",
        "an old time", "a future time", "a fraction", "a negative time", "a huge time",
        "a strange digit", "no signature", "no version", "garbage", "a long signature",
    ],
)  # fmt: skip
def test_a_forged_report_is_refused_and_changes_nothing(edge, client, problem, kind):
    agent = edge.agent()
    report = agent.say(Fact.GPU_READY)
    body = report.to_bytes()
    headers = forged(kind, agent, body, agent.signed(body, report.webhook_id))
    before = edge.stored(agent.spec.job)
    # Header values as a server hands them over: bytes read as Latin-1.
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    problem(client.post(agent.path, data=body, headers=headers), 401, "bad_signature")
    assert edge.stored(agent.spec.job) == before


def test_an_unknown_attempt_or_job_is_refused_like_a_bad_signature(edge, client, problem):
    agent = edge.agent()
    report = agent.say(Fact.GPU_READY)
    body = report.to_bytes()
    headers = agent.signed(body, report.webhook_id)
    paths = [
        agent.path.replace("attempts/1", "attempts/2"),
        agent.path.replace("attempts/1", "attempts/999999999"),
        agent.path.replace(agent.spec.job, "job_unknown"),
    ]
    for path in paths:
        problem(client.post(path, data=body, headers=headers), 401, "bad_signature")
    before_hello = edge.job()
    edge.rent(before_hello, token="not used yet")
    path = agent.path.replace(agent.spec.job, before_hello.id)
    problem(client.post(path, data=body, headers=headers), 401, "bad_signature")


def test_an_agent_cannot_report_for_another_one(edge, client, problem):
    mine, theirs = edge.agent(), edge.agent(token="other")
    report = theirs.say(Fact.ERROR, code="x", message="y")
    body = report.to_bytes()
    headers = mine.signed(body, report.webhook_id)
    problem(client.post(mine.path, data=body, headers=headers), 422)
    problem(client.post(theirs.path, data=body, headers=headers), 401)
    assert edge.stored(theirs.spec.job).status is Status.PENDING_GPU


def test_a_webhook_id_that_is_not_the_reports_is_refused(edge, client, problem):
    agent = edge.agent()
    body = agent.say(Fact.GPU_READY).to_bytes()
    problem(client.post(agent.path, data=body, headers=agent.signed(body, "another")), 422)


# --- garbage ---

GARBAGE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\x00" * 100,
    b"\xff\xfe\xfd",
    b"[" * 200_000,
    b'{"job":' * 10_000,
    b'{"version": NaN}',
]


@without_database
@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_well_signed_garbage_is_refused_for_good(edge, client, problem, body):
    agent = edge.agent()
    answer = client.post(agent.path, data=body, headers=agent.signed(body, "x"))
    assert problem(answer, 422)["retryable"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"type": "gpu.explodes"}, {"type": 5}, {"seq": 0}, {"seq": 2**70}, {"seq": "1"},
        {"seq": 1.5}, {"attempt": 0}, {"attempt": True}, {"job": ""}, {"job": 7},
        {"data": []}, {"data": {"a": "\x00"}}, {"at": "now"}, {"at": 1e300},
        {"version": 0}, {"version": 99}, {"data": {"a": "\ud800"}},
    ],
)  # fmt: skip
def test_a_well_signed_report_with_a_wrong_field_does_no_harm(edge, client, change):
    agent = edge.agent()
    report = agent.say(Fact.GPU_READY)
    body = json.dumps({**json.loads(report.to_bytes()), **change}).encode()
    answer = client.post(agent.path, data=body, headers=agent.signed(body, report.webhook_id))
    assert answer.status_code in (422, 200), answer.text
    assert agent.report(Fact.HEARTBEAT).status_code == 200, "the next report is taken"


@without_database
def test_a_body_of_ten_megabytes_is_refused_unread(edge, problem):
    agent = edge.agent()

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            got = super().read(size)
            self.taken += len(got)
            return got

    for stated in ("10000000", ""):
        source = Counted(b"x" * 10_000_000)
        environ = {"CONTENT_LENGTH": stated, "wsgi.input": source, "wsgi.input_terminated": True}
        answer = edge.client().post(agent.path, environ_overrides=environ)
        problem(answer, 413, "too_long")
        assert source.taken <= wire.MAX_BODY + 1


@without_database
@pytest.mark.parametrize("stated", ["-1", "abc", "1e3", "9" * 30, "\u0663"])
def test_a_nonsense_length_is_refused(edge, problem, stated):
    agent = edge.agent()
    answer = edge.client().post(agent.path, environ_overrides={"CONTENT_LENGTH": stated})
    problem(answer, 400, "bad_length")


def test_a_body_that_ends_early_is_worth_another_try(edge, problem):
    agent = edge.agent()
    environ = {"CONTENT_LENGTH": "100", "wsgi.input": io.BytesIO(b"{")}
    answer = edge.client().post(agent.path, environ_overrides=environ)
    assert problem(answer, 400, "truncated")["retryable"] is True


@without_database
def test_only_post_reports(edge, problem):
    agent = edge.agent()
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS"):
        answer = edge.client().open(agent.path, method=method)
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "POST"


# --- the database ---


def test_without_a_database_a_report_is_kept_by_its_agent(edge, monkeypatch, problem):
    agent = edge.agent()
    agent.report(Fact.GPU_READY)

    def gone():
        raise StoreUnavailable("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(edge.store, "transaction", gone)
        report = agent.say(Fact.IMAGES_READY)
        answer = agent.post(report)
        assert problem(answer, 503, "database_unavailable")["retryable"] is True
        assert answer.headers["Retry-After"]
    assert agent.post(report).status_code == 200
    assert edge.stored(agent.spec.job).status is Status.PENDING_MODEL


def test_a_new_secret_of_the_same_attempt_is_noticed(edge, problem):
    """The first machine died before it reported; another was rented within the same attempt."""
    agent = edge.agent()
    agent.report(Fact.HEARTBEAT)
    with edge.store.transaction() as tx:
        fresh = wire.new_secret()
        attempt = tx.attempt(agent.spec.job, 1, lock=True)
        tx.save_attempt(attempt.evolve(secret=type(attempt.secret)(fresh)))
    report = agent.say(Fact.HEARTBEAT)
    body = report.to_bytes()
    signed = wire.sign(
        body, secrets=[fresh], webhook_id=report.webhook_id, at=edge.clock().timestamp()
    )
    assert edge.client().post(agent.path, data=body, headers=signed).status_code == 200
    problem(agent.report(Fact.HEARTBEAT), 401)


def test_a_report_that_breaks_its_group_fails_alone(edge, monkeypatch):
    """Many reports wait for one commit; one of them makes the transaction fail."""
    agents = [edge.agent(token=f"token {i}") for i in range(6)]
    poison = agents[3].spec.job
    real, first = record.take_reports, threading.Event()

    def take(tx, reports, now):
        if not first.is_set():
            # Hold the first commit until all the others wait for theirs.
            first.set()
            assert all_sent.wait(10)
        if any(report.job == poison for report in reports):
            raise RuntimeError("this one breaks it")
        return real(tx, reports, now)

    all_sent = threading.Event()
    monkeypatch.setattr(record, "take_reports", take)
    starter = edge.agent(token="starter")
    with ThreadPoolExecutor(8) as pool:
        begun = pool.submit(starter.report, Fact.GPU_READY)
        assert first.wait(10)
        answers = [pool.submit(agent.report, Fact.GPU_READY) for agent in agents]
        all_sent.set()
        statuses = [answer.result().status_code for answer in answers]
    assert begun.result().status_code == 200
    assert statuses == [200, 200, 200, 500, 200, 200]
    assert edge.stored(poison).status is Status.PENDING_GPU
    assert all(
        edge.stored(agent.spec.job).status is Status.PENDING_IMAGES
        for agent in agents
        if agent.spec.job != poison
    )


def test_a_doorbell_that_fails_costs_the_agent_nothing(edge, soon):
    job = edge.job(webhook_url="https://example.com/hook")
    agent = edge.agent(job)
    rung = []

    def broken(task, subject):
        rung.append(task)
        raise ConnectionError("no broker")

    edge.app.wsgi_app.receiver.taker._waker._wake = broken
    assert agent.report(Fact.GPU_READY).status_code == 200
    soon(lambda: "relay" in rung)
    assert agent.report(Fact.IMAGES_READY).status_code == 200


def test_outcomes_are_counted(edge, client):
    agent = edge.agent()
    agent.report(Fact.GPU_READY)
    agent.post(agent.say(Fact.GPU_READY, seq=1))
    text = client.get("/metrics").text
    for outcome in (Outcome.APPLIED, Outcome.DUPLICATE):
        assert f'stoker_reports_total{{outcome="{outcome.value}"}} 1.0' in text
    assert "stoker_report_group_size_count 2.0" in text
