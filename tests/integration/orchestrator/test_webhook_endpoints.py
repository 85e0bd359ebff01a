"""`/v1/webhook-endpoints` and `/v1/deliveries`: made, turned, tried, listened at, replayed."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from state import record
from state.endpoints import MOST, TYPES
from state.events import OutgoingStatus
from tasks.relay import Answer, NoAnswer, Relay

URL = "https://example.com/hooks"
PATH = "/v1/webhook-endpoints"


class World:
    """The customers' servers: whoever is in `down` does not answer; the others answer `answer`."""

    def __init__(self, edge: Any) -> None:
        self.edge, self.down, self.answer = edge, set[str](), 204
        self.got: list[tuple[str, str, dict[str, Any]]] = []
        self.signed: dict[str, dict[str, str]] = {}

    def __call__(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        if url in self.down:
            raise NoAnswer("the connection was refused")
        self.signed[headers["webhook-id"]] = {**headers, "body": body.decode()}
        self.got.append((url, headers["webhook-id"], json.loads(body)))
        return Answer(self.answer, {})

    def relay(self) -> None:
        """What the workers do, until nothing is due."""
        edge = self.edge
        relay = Relay(store=edge.store, post=self, clock=edge.clock, random=random.Random(1))
        while True:
            with edge.store.transaction() as tx:
                queues = tx.claim_due_outgoing(edge.clock(), edge.clock(), 100)
            if not queues:
                return
            for queue in queues:
                relay.relay(queue)

    def ids(self, url: str = URL) -> list[str]:
        return [name for to, name, _ in self.got if to == url]


@pytest.fixture
def world(edge: Any) -> World:
    return World(edge)


@pytest.fixture
def made(client: Any, alice: Any) -> Any:
    """An endpoint of Alice's, with its secret."""
    answer = client.post(PATH, json={"url": URL}, headers=alice)
    assert answer.status_code == 201, answer.text
    return answer.json


def test_an_endpoint_is_made_shown_changed_and_deleted(client, alice):
    body = {"url": URL, "events": ["job.completed"], "description": "production"}
    answer = client.post(PATH, json=body, headers=alice)
    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    made, path = answer.json, answer.headers["Location"]
    assert made["id"].startswith("we_")
    assert made["secret"].startswith("whsec_")

    shown = client.get(path, headers=alice).json
    assert "secret" not in shown
    assert {key: shown[key] for key in body} == body
    assert client.get(PATH, headers=alice).json["data"] == [shown]

    news = {"url": URL + "/2", "events": [], "description": "both"}
    assert client.patch(path, json=news, headers=alice).status_code == 200
    shown = client.get(path, headers=alice).json
    assert {key: shown[key] for key in news} == news
    only = client.patch(path, json={"description": "one"}, headers=alice).json
    assert (only["description"], only["url"]) == ("one", URL + "/2")

    assert client.delete(path, headers=alice).status_code == 204
    assert client.get(PATH, headers=alice).json["data"] == []
    assert client.delete(path, headers=alice).status_code == 404


#: What cannot be an endpoint, and where that is.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "/url"),
    ({"url": "http://example.com"}, "/url"),
    ({"url": "ftp://example.com"}, "/url"),
    ({"url": "https://user:pass@example.com"}, "/url"),
    ({"url": "https://exa mple.com"}, "/url"),
    ({"url": "https://" + "x" * 3000}, "/url"),
    ({"url": 7}, "/url"),
    ({"url": URL, "events": ["job.exploded"]}, "/events/0"),
    ({"url": URL, "description": "\x00"}, "/description"),
    ({"url": URL, "secret": "hunter2"}, "/secret"),
    ({"url": URL, "secret": "whsec_AAAA"}, "/secret"),
    ({"url": URL, "colour": "red"}, "/colour"),
]


def test_what_cannot_be_an_endpoint_is_refused_with_its_place(client, alice, problem):
    for body, pointer in REFUSED:
        told = problem(client.post(PATH, json=body, headers=alice), 422, "invalid")
        assert [item["pointer"] for item in told["errors"]] == [pointer], body
    assert client.get(PATH, headers=alice).json["data"] == []


def test_a_body_that_is_no_json_is_refused_everywhere(client, alice, problem, made):
    for path in (PATH, f"{PATH}/{made['id']}/test", f"{PATH}/{made['id']}/rotate-secret"):
        garbage = client.post(path, data=b"{", content_type="application/json", headers=alice)
        problem(garbage, 400, "bad_json")
        problem(client.post(path, data=b"url=x", headers=alice), 415, "not_json")


def test_what_is_somebody_elses_is_not_there(edge, client, problem, made, alice):
    bob, operator = edge.key("bob"), edge.key("operations", "operator")
    path = f"{PATH}/{made['id']}"
    delivery = client.post(f"{path}/test", headers=alice).json["id"]
    for ask in (
        lambda who: client.get(path, headers=who),
        lambda who: client.patch(path, json={"description": "x"}, headers=who),
        lambda who: client.post(f"{path}/test", headers=who),
        lambda who: client.get(f"/v1/deliveries/{delivery}", headers=who),
        lambda who: client.post(f"/v1/deliveries/{delivery}/replay", headers=who),
        lambda who: client.post(f"{path}/rotate-secret", headers=who),
        lambda who: client.delete(path, headers=who),
    ):
        problem(ask(bob), 404, "not_found")
        assert ask(operator).status_code < 300
    assert client.get("/v1/deliveries", headers=bob).json["data"] == []
    assert client.get(PATH, headers=bob).json["data"] == []
    problem(client.get(PATH), 401)
    reader = edge.key("alice", "jobs:read")
    problem(client.post(PATH, json={"url": URL}, headers=reader), 403)


def test_an_unknown_name_is_not_found(client, alice, problem):
    for name in ("we_none", "%00", "x" * 200, "..", "we_'; drop table jobs"):
        problem(client.get(f"{PATH}/{name}", headers=alice), 404)
        problem(client.get(f"/v1/deliveries/{name}", headers=alice), 404)
        problem(client.post(f"/v1/deliveries/{name}/replay", headers=alice), 404)


def test_the_same_key_makes_one_endpoint_and_shows_its_secret_again(client, alice, problem):
    headers = {**alice, "Idempotency-Key": "one"}
    first = client.post(PATH, json={"url": URL}, headers=headers)
    again = client.post(PATH, json={"url": URL}, headers=headers)
    assert (again.json, again.headers["Idempotent-Replayed"]) == (first.json, "true")
    problem(client.post(PATH, json={"url": URL + "2"}, headers=headers), 422)
    assert len(client.get(PATH, headers=alice).json["data"]) == 1


def test_there_is_a_most(edge, client, alice, problem):
    for _ in range(MOST):
        assert client.post(PATH, json={"url": URL}, headers=alice).status_code == 201
    problem(client.post(PATH, json={"url": URL}, headers=alice), 409, "too_many")
    assert client.post(PATH, json={"url": URL}, headers=edge.key("bob")).status_code == 201


def test_a_test_is_sent_at_once_and_seen_in_the_log(edge, client, alice, world, made, soon):
    answer = client.post(f"{PATH}/{made['id']}/test", headers=alice)
    assert answer.status_code == 202
    queue = f"{made['id']}/{made['id']}"
    soon(lambda: ("relay", queue) in edge.woken)
    world.relay()
    (_, name, payload), *_ = world.got
    assert name == answer.json["id"]
    assert (payload["type"], payload["data"]["seq"]) == ("webhook.test", 1)
    Webhook(made["secret"])  # the reference library takes the secret as we show it
    shown = client.get(f"/v1/deliveries/{name}", headers=alice).json
    assert (shown["status"], shown["job"], shown["endpoint"]) == ("delivered", None, made["id"])
    assert [item["answer"] for item in shown["tries"]] == [204]
    assert shown["payload"] == payload


def test_a_sample_looks_like_what_a_job_sends(client, alice, world, made):
    """Of every event, whatever the filter says; never with the id of a job that could be."""
    client.patch(f"{PATH}/{made['id']}", json={"events": ["webhook.test"]}, headers=alice)
    kinds = [kind for kind in TYPES if kind != "webhook.test"]
    for kind in kinds:
        client.post(f"{PATH}/{made['id']}/test", json={"type": kind}, headers=alice)
    world.relay()
    assert [payload["type"] for _, _, payload in world.got] == kinds
    for _, _, payload in world.got:
        assert {"job", "seq", "status", "attempt", "metadata"} <= set(payload["data"])
        assert payload["data"]["job"] == "job_" + "0" * 26


def test_samples_of_transitions_have_the_fields_of_real_ones(edge, client, alice, world, made):
    job = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    for kind in ("job.pending_gpu", "job.cancelled"):
        client.post(f"{PATH}/{made['id']}/test", json={"type": kind}, headers=alice)
    world.relay()
    fields: dict[str, list[set[str]]] = {}
    for _, _, payload in world.got:
        fields.setdefault(payload["type"], []).append(set(payload["data"]))
    for real, sample in fields.values():
        assert real == sample


def test_two_secrets_sign_during_a_rotation_and_one_after_it(edge, client, alice, world, made):
    path = f"{PATH}/{made['id']}"
    turned = client.post(f"{path}/rotate-secret", json={"overlap_s": 3600}, headers=alice).json
    until = datetime.fromisoformat(turned["old_secret_until"])
    assert until == edge.clock() + timedelta(hours=1)
    both = _sent(client, alice, world, path)
    assert _verifies(edge, made["secret"], both)
    assert _verifies(edge, turned["secret"], both)
    edge.clock.advance(3601)
    later = _sent(client, alice, world, path)
    assert not _verifies(edge, made["secret"], later)
    assert _verifies(edge, turned["secret"], later)
    assert client.get(path, headers=alice).json["old_secret_until"] is None


def _sent(client: Any, alice: Any, world: World, path: str) -> dict[str, str]:
    name = client.post(f"{path}/test", headers=alice).json["id"]
    world.relay()
    return world.signed[name]


def _verifies(edge: Any, secret: str, sent: dict[str, str]) -> bool:
    """By the reference library's own reckoning of the signature; its clock cannot be set."""
    stamp = datetime.fromtimestamp(int(sent["webhook-timestamp"]), edge.clock().tzinfo)
    wanted = Webhook(secret).sign(sent["webhook-id"], stamp, sent["body"])
    return wanted in sent["webhook-signature"].split(" ")


def test_a_rotation_ends_no_secret_before_its_time_unless_told_to(client, alice, problem, made):
    path = f"{PATH}/{made['id']}/rotate-secret"
    headers = {**alice, "Idempotency-Key": "turn"}
    first = client.post(path, headers=headers).json
    assert client.post(path, headers=headers).json == first  # the answer was lost; asked again
    problem(client.post(path, headers=alice), 409, "rotating")
    last = client.post(path, json={"overlap_s": 0}, headers=alice).json
    assert last["secret"] not in (first["secret"], made["secret"])
    assert last["old_secret_until"] is None


def test_a_job_is_told_where_it_says_and_at_every_endpoint_that_wants_it(
    edge, client, alice, world, made
):
    path = PATH
    picky = client.post(
        path, json={"url": URL + "/end", "events": ["job.cancelled"]}, headers=alice
    )
    client.post(path, json={"url": URL + "/bob"}, headers=edge.key("bob"))
    job = edge.job(webhook_url="https://example.com/own")
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    world.relay()
    assert world.ids() == [f"{job.id}.{seq}.{made['id']}" for seq in (1, 2)]
    assert world.ids("https://example.com/own") == [f"{job.id}.1", f"{job.id}.2"]
    assert world.ids(URL + "/end") == [f"{job.id}.2.{picky.json['id']}"]
    assert world.ids(URL + "/bob") == []
    seqs = {payload["data"]["seq"] for to, _, payload in world.got if to == URL + "/end"}
    assert seqs == {2}


def test_a_receiver_that_was_down_gets_everything_by_itself(edge, client, alice, world, made):
    """Friendliness check 6: dead, the job runs, back again; then one is replayed."""
    world.down.add(URL)
    job = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    for _ in range(3):
        world.relay()
        edge.clock.advance(400)
    assert world.got == []
    world.down.clear()
    edge.clock.advance(3600)
    world.relay()
    names = [f"{job.id}.1.{made['id']}", f"{job.id}.2.{made['id']}"]
    assert world.ids() == names
    answers = client.get(f"/v1/deliveries/{names[0]}", headers=alice).json["tries"]
    assert [item["answer"] for item in answers] == [0, 0, 0, 204]

    again = client.post(f"/v1/deliveries/{names[0]}/replay", headers=alice)
    assert (again.status_code, again.json["status"]) == (202, "waiting")
    twice = client.post(f"/v1/deliveries/{names[0]}/replay", headers=alice)
    assert twice.json == again.json
    world.relay()
    assert world.ids() == [*names, names[0]]


def test_a_replay_brings_forward_what_waits_for_its_next_try(edge, client, alice, world, made):
    world.down.add(URL)
    name = client.post(f"{PATH}/{made['id']}/test", headers=alice).json["id"]
    world.relay()
    edge.clock.advance(6)
    world.relay()  # the next try is in five minutes
    world.down.clear()
    world.relay()
    assert world.got == []
    client.post(f"/v1/deliveries/{name}/replay", headers=alice)
    world.relay()
    assert world.ids() == [name]


def test_an_endpoint_that_says_410_is_disabled_and_told_so(
    edge, client, alice, problem, world, made
):
    world.answer = 410
    path = f"{PATH}/{made['id']}"
    jobs = [edge.job(), edge.job()]
    world.relay()
    shown = client.get(path, headers=alice).json
    assert (shown["enabled"], shown["disabled_why"]) == (False, "it answered 410 Gone")
    assert len(world.got) == 1, "what waited for it must not be sent"
    rows = client.get(f"/v1/deliveries?endpoint={made['id']}", headers=alice).json["data"]
    assert [row["status"] for row in rows] == ["disabled", "disabled"]
    problem(client.post(f"{path}/test", headers=alice), 409, "endpoint_disabled")
    replay = f"/v1/deliveries/{jobs[0].id}.1.{made['id']}/replay"
    problem(client.post(replay, headers=alice), 409, "endpoint_disabled")
    with edge.store.transaction() as tx:
        record.cancel(tx, jobs[0].id, edge.clock())
        assert len(tx.list_outgoing(jobs[0].id)) == 1, "nothing is owed to what is disabled"

    world.answer = 204
    enabled = client.patch(path, json={"enabled": True}, headers=alice).json
    assert (enabled["enabled"], enabled["disabled_at"]) == (True, None)
    assert client.post(replay, headers=alice).status_code == 202
    world.relay()
    assert world.ids()[-1] == f"{jobs[0].id}.1.{made['id']}"


def test_what_a_deleted_or_disabled_endpoint_was_owed_does_not_go_out(
    edge, client, alice, problem, world, made
):
    other = client.post(PATH, json={"url": URL + "/2"}, headers=alice).json
    job = edge.job()
    client.patch(f"{PATH}/{made['id']}", json={"enabled": False}, headers=alice)
    client.delete(f"{PATH}/{other['id']}", headers=alice)
    world.relay()
    assert world.got == []
    rows = client.get(f"/v1/jobs/{job.id}/deliveries", headers=alice).json["data"]
    assert {row["status"] for row in rows} == {"disabled"}
    gone = client.post(f"/v1/deliveries/{job.id}.1.{other['id']}/replay", headers=alice)
    problem(gone, 410, "endpoint_deleted")


def test_deliveries_come_in_pages_newest_first(edge, client, alice, problem, made):
    names = []
    for _ in range(5):
        names.append(client.post(f"{PATH}/{made['id']}/test", headers=alice).json["id"])
        edge.clock.advance(1)
    job = edge.job(webhook_url="https://example.com/own")
    seen, cursor = [], None
    while True:
        query = f"&cursor={cursor}" if cursor else ""
        page = client.get(f"/v1/deliveries?limit=3{query}", headers=alice).json
        seen += [item["id"] for item in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert seen == [f"{job.id}.1.{made['id']}", f"{job.id}.1", *reversed(names)]

    def ids(query: str) -> list[str]:
        page = client.get(f"/v1/deliveries?{query}", headers=alice)
        return [item["id"] for item in page.json["data"]]

    assert ids(f"job={job.id}") == seen[:2]
    assert ids("endpoint=job") == [f"{job.id}.1"]
    assert ids(f"endpoint={made['id']}&job={job.id}") == seen[:1]
    assert ids("status=delivered") == []
    assert ids("status=waiting&limit=1") == seen[:1]
    for query in ("cursor=garbage", "cursor=%00", "limit=0", "status=lost", "colour=red"):
        problem(client.get(f"/v1/deliveries?{query}", headers=alice), 422)


def test_a_listener_fetches_and_answers_what_it_is_owed(edge, client, alice, problem, world):
    made = client.post(PATH, json={"url": None, "events": []}, headers=alice).json
    path = f"{PATH}/{made['id']}"
    job = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    world.relay()
    assert world.got == [], "nothing is sent to a listener"
    waiting = client.get(f"{path}/waiting", headers=alice).json["data"]
    assert [row["payload"]["data"]["seq"] for row in waiting] == [1, 2]
    assert client.get(f"{path}/waiting", headers=alice).json["data"] == waiting

    said = {"delivery": waiting[0]["id"], "answer": 500, "took_ms": 12}
    for taken in (1, 0):  # the second time it is known
        answer = client.post(f"{path}/answers", json={"data": [said]}, headers=alice)
        assert answer.json == {"taken": taken}
    left = client.get(f"{path}/waiting", headers=alice).json["data"]
    assert left == waiting[1:]
    done = client.get(f"/v1/deliveries/{waiting[0]['id']}", headers=alice).json
    assert (done["status"], [item["answer"] for item in done["tries"]]) == ("delivered", [500])

    client.post(f"/v1/deliveries/{waiting[0]['id']}/replay", headers=alice)
    assert client.get(f"{path}/waiting", headers=alice).json["data"][0]["id"] == waiting[0]["id"]
    problem(client.patch(path, json={"url": URL}, headers=alice), 409, "listener")
    for bad in ({"data": []}, {"data": [{**said, "answer": 900}]}, {"data": [said] * 101}):
        problem(client.post(f"{path}/answers", json=bad, headers=alice), 422)


def test_only_a_listener_can_fetch_and_only_its_own(client, alice, problem, made):
    path = f"{PATH}/{made['id']}"
    problem(client.get(f"{path}/waiting", headers=alice), 409, "no_listener")
    name = client.post(f"{path}/test", headers=alice).json["id"]
    said = {"data": [{"delivery": name, "answer": 200}]}
    problem(client.post(f"{path}/answers", json=said, headers=alice), 409, "no_listener")
    listener = client.post(PATH, json={"url": None}, headers=alice).json
    problem(client.post(f"{PATH}/{listener['id']}/answers", json=said, headers=alice), 404)


def test_a_listener_that_left_is_owed_nothing_more_and_goes(edge, client, alice, world):
    made = client.post(PATH, json={"url": None}, headers=alice).json
    first = edge.job()
    edge.clock.advance(3601)
    world.relay()
    with edge.store.transaction() as tx:
        assert tx.list_outgoing(first.id)[0].status is OutgoingStatus.DISABLED
    later = edge.job()
    with edge.store.transaction() as tx:
        assert tx.list_outgoing(later.id) == []
    edge.clock.advance(2 * 86_400)
    other = client.post(PATH, json={"url": None}, headers=alice).json
    assert [row["id"] for row in client.get(PATH, headers=alice).json["data"]] == [other["id"]]
    assert made["id"] != other["id"]
