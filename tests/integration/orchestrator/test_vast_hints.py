"""Vast.ai's own notifications: a good one has us look, and none of them is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import threading

import pytest
from werkzeug.serving import make_server

from gpu_agent import wire
from gpu_agent.wire import Fact
from infra.sandbox.notify import Notifier
from orchestrator.app import create_app
from state.events import Secret
from state.job import Status

PATH = "/vast/v1/notifications"
SECRET = "what-vast-signs-with"
TRAINS = (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED)
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)


@pytest.fixture
def edge(edge):
    settings = dataclasses.replace(edge.deps.settings, vast_webhook_secret=Secret(SECRET))
    edge.deps = dataclasses.replace(edge.deps, settings=settings)
    edge.app = create_app(edge.deps)
    return edge


def notification(kind="outbid", event="e1", instance=1001, **more):
    data = None if instance is None else {"instance_id": instance, "machine_id": 30137}
    return json.dumps({"event_id": event, "notif_type": kind, "data": data, **more}).encode()


def signed(body, at, secret=SECRET):
    """Written by hand from the page that describes the format, not by our own code."""
    mac = hmac.new(secret.encode(), b"%d." % int(at) + body, hashlib.sha256)
    return {"X-Vast-Timestamp": str(int(at)), "X-Vast-Signature-256": f"sha256={mac.hexdigest()}"}


def notify(edge, body, headers=None):
    given = signed(body, edge.clock().timestamp()) if headers is None else headers
    return edge.client().post(PATH, data=body, headers=given)


def training(edge):
    """An agent whose job trains on instance 1001."""
    agent = edge.agent()
    with edge.store.transaction() as tx:
        (lease,) = tx.leases_of(agent.spec.job)
        tx.save_lease(lease.evolve(instance_id="1001"))
    for fact in TRAINS:
        agent.report(fact)
    assert edge.stored(agent.spec.job).status is Status.TRAINING
    return agent


def everything(edge, job):
    """All that a notification could touch."""
    with edge.store.transaction() as tx:
        return tx.job(job), tx.leases_of(job), tx.events(job, limit=1000), tx.beats()


def test_an_outbid_machine_that_trains_is_told_to_save_and_the_account_is_looked_at(edge, soon):
    agent = training(edge)
    job, leases, events, _ = everything(edge, agent.spec.job)
    assert notify(edge, notification()).status_code == 200
    soon(lambda: ("sweep", "account") in edge.woken)
    after = everything(edge, agent.spec.job)
    assert after[1:3] == (leases, events), "no lease, no event"
    assert after[0] == job.evolve(orders=("checkpoint_now",)), "the job is where it was"
    assert agent.report(Fact.HEARTBEAT).json == {"orders": ["checkpoint_now"]}


@without_database
def test_an_instance_that_only_the_subject_names_is_found_too(edge):
    agent = training(edge)
    words = "Your Interruptible Instance #1001 Has Been Outbid"
    assert notify(edge, notification(instance=None, subject=words)).status_code == 200
    assert edge.stored(agent.spec.job).orders == ("checkpoint_now",)


@without_database
def test_an_outbid_of_none_of_ours_orders_nothing(edge):
    agent = training(edge)
    for number, instance in enumerate([1002, None, "1001", True, -1, 2**80, [1001]]):
        assert notify(edge, notification(event=f"e{number}", instance=instance)).status_code == 200
        assert edge.stored(agent.spec.job).orders == (), instance


@without_database
def test_an_outbid_machine_that_does_not_train_yet_has_nothing_to_save(edge, soon):
    agent = edge.agent()
    with edge.store.transaction() as tx:
        (lease,) = tx.leases_of(agent.spec.job)
        tx.save_lease(lease.evolve(instance_id="1001"))
    assert notify(edge, notification()).status_code == 200
    assert edge.stored(agent.spec.job).orders == ()
    soon(lambda: ("sweep", "account") in edge.woken)


@without_database
def test_what_may_have_changed_the_account_has_it_looked_at_and_nothing_else(edge, soon):
    agent = training(edge)
    before = everything(edge, agent.spec.job)
    for kind in ("low_credit", "client:low_credit", "instance_stopped", "instance_offline"):
        edge.woken.clear()
        edge.clock.advance(10)
        assert notify(edge, notification(kind, event=kind)).status_code == 200
        soon(lambda: ("sweep", "account") in edge.woken)
        assert everything(edge, agent.spec.job)[:3] == before[:3]


@without_database
def test_what_is_none_of_our_business_is_taken_and_does_nothing(edge):
    agent = training(edge)
    before = everything(edge, agent.spec.job)
    for kind in ("webhook_test", "host_payout", "client:"):
        assert notify(edge, notification(kind, event=kind)).status_code == 200
        assert everything(edge, agent.spec.job) == before, kind


def test_the_same_event_again_does_nothing_however_it_is_signed(edge, soon):
    agent = training(edge)
    assert notify(edge, notification()).status_code == 200
    soon(lambda: ("sweep", "account") in edge.woken)
    agent.report(Fact.HEARTBEAT)  # takes the order
    edge.woken.clear()
    for _ in range(3):
        edge.clock.advance(60)
        assert notify(edge, notification()).status_code == 200
    assert edge.stored(agent.spec.job).orders == ()
    assert edge.woken == []


@without_database
def test_a_burst_of_notifications_has_the_account_looked_at_once(edge, soon):
    for number in range(20):
        assert notify(edge, notification("instance_stopped", f"e{number}")).status_code == 200
    soon(lambda: edge.woken)
    assert edge.woken == [("sweep", "account")]
    edge.clock.advance(6)
    notify(edge, notification("instance_stopped", "another"))
    soon(lambda: len(edge.woken) == 2)


def forged(body, at):
    good = signed(body, at)
    return {
        "no headers": {},
        "no signature": {"X-Vast-Timestamp": good["X-Vast-Timestamp"]},
        "another secret": signed(body, at, "another"),
        "the empty secret": signed(body, at, ""),
        "another body": signed(body + b" ", at),
        "another time": {**good, "X-Vast-Timestamp": str(int(at) - 1)},
        "a replay": signed(body, at - 301),
        "the future": signed(body, at + 302),
        "a fraction": {**good, "X-Vast-Timestamp": f"{int(at)}.0"},
        "no number": {**good, "X-Vast-Timestamp": "now"},
        "a huge number": {**good, "X-Vast-Timestamp": "9" * 5000},
        "a strange digit": {**good, "X-Vast-Timestamp": "\u0661"},
        "bare hex": {**good, "X-Vast-Signature-256": good["X-Vast-Signature-256"][7:]},
        "upper case": {**good, "X-Vast-Signature-256": good["X-Vast-Signature-256"].upper()},
        "garbage": {**good, "X-Vast-Signature-256": "sha256=\u00ff"},
        "a long one": {**good, "X-Vast-Signature-256": "sha256=" + "0" * 20_000},
        "the agents' way": wire.sign(body, secrets=[wire.new_secret()], webhook_id="e1", at=at),
    }


@without_database
def test_a_forged_notification_is_refused_and_changes_nothing(edge, problem):
    agent = training(edge)
    before, body = everything(edge, agent.spec.job), notification()
    for kind, headers in forged(body, edge.clock().timestamp()).items():
        headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
        problem(notify(edge, body, headers), 401, "bad_signature")
        assert everything(edge, agent.spec.job) == before, kind
    # its event id was not noted either: the true one is still heard
    assert notify(edge, body).status_code == 200
    assert edge.stored(agent.spec.job).orders == ("checkpoint_now",)


@without_database
def test_well_signed_garbage_is_refused_for_good(edge, problem):
    agent = training(edge)
    before = everything(edge, agent.spec.job)
    for body in (
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"event_id": "e1"}',
        b'{"notif_type": "outbid"}', notification(event=""), notification(event=7),
        notification(event="e\x00"), notification(event="e" * 129), notification(kind=None),
        notification(kind="a b"), notification(event="\ud800"),
    ):  # fmt: skip
        problem(notify(edge, body), 422)
        assert everything(edge, agent.spec.job) == before, body[:50]


@without_database
def test_a_long_body_is_refused_unread(edge, problem):
    problem(notify(edge, b"x" * (wire.MAX_BODY + 1)), 413, "too_long")


@without_database
def test_without_a_secret_there_is_no_such_door(edge, problem):
    edge.app = create_app(
        dataclasses.replace(
            edge.deps,
            settings=dataclasses.replace(edge.deps.settings, vast_webhook_secret=Secret("")),
        )
    )
    body = notification()
    for headers in (None, signed(body, edge.clock().timestamp(), "")):
        problem(notify(edge, body, headers), 404)


@without_database
def test_the_public_description_does_not_tell_of_it(edge):
    assert "/vast/" not in edge.client().get("/openapi.json").text


@without_database
def test_what_the_sandbox_sends_is_understood(edge, soon):
    """The same words and the same signature, as far as Vast.ai's own are described."""
    agent = training(edge)
    server = make_server("127.0.0.1", 0, edge.app)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    url = f"http://127.0.0.1:{server.port}{PATH}"
    notifier = Notifier([url], SECRET, clock=lambda: edge.clock().timestamp())
    try:
        notifier("outbid", instance_id=1001, machine_id=30137, bid=0.2, min_bid=0.25)
        soon(lambda: notifier.sent)
    finally:
        notifier.close()
        server.shutdown()
        serving.join()
        server.server_close()
    assert edge.stored(agent.spec.job).orders == ("checkpoint_now",)
    soon(lambda: edge.woken[-1:] == [("sweep", "account")])
