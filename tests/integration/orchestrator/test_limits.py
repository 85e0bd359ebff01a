"""Nobody asks too often; and what counts may be gone without anybody noticing."""

from __future__ import annotations

import dataclasses
import socket
import threading
from contextlib import closing

import pytest
from limits.errors import StorageError

from infra import embedded
from infra.settings import Settings
from orchestrator.api.limits import Circuit
from orchestrator.app import create_app
from state.events import Secret


@pytest.fixture
def with_settings(edge):
    """A client of the same installation under other settings."""

    def make(**changes):
        edge.deps = dataclasses.replace(
            edge.deps, settings=dataclasses.replace(edge.deps.settings, **changes)
        )
        edge.app = create_app(edge.deps)
        return edge.app.test_client()

    return make


def refused_by(answer, problem):
    problem(answer, 429, "rate_limited")
    return int(answer.headers["Retry-After"])


def test_whoever_asks_too_often_is_told_when_to_ask_again(edge, alice, problem, with_settings):
    client = with_settings(rate_reads=3)
    assert client.get("/v1/jobs", headers=alice).headers["RateLimit"] == '"reads";r=2;t=60'
    edge.clock.advance(20)
    assert client.get("/v1/jobs/job_0", headers=alice).headers["RateLimit"] == '"reads";r=1;t=40'
    last = client.get("/v1/jobs", headers=alice)
    assert last.headers["RateLimit"] == '"reads";r=0;t=40'
    assert last.headers["RateLimit-Policy"] == '"reads";q=3;w=60'

    answer = client.get("/v1/jobs", headers=alice)
    assert refused_by(answer, problem) == 40
    assert answer.headers["RateLimit"] == '"reads";r=0;t=40'
    edge.clock.advance(40)  # the first of the three is a minute old: one more, not three
    assert client.get("/v1/jobs", headers=alice).status_code == 200
    assert refused_by(client.get("/v1/jobs", headers=alice), problem) == 20


def test_keys_do_not_use_up_each_others_quota_nor_reads_that_of_writes(
    edge, alice, problem, with_settings
):
    client = with_settings(rate_reads=1, rate_writes=1)
    assert client.get("/v1/jobs", headers=alice).status_code == 200
    assert client.get("/v1/jobs", headers=alice).status_code == 429
    assert client.get("/v1/jobs", headers=edge.key("alice")).status_code == 200
    assert client.post("/v1/datasets", headers=alice, json={}).status_code == 422
    refused_by(client.post("/v1/datasets", headers=alice, json={}), problem)


def test_agents_health_metrics_and_whoever_has_no_key_are_not_counted(edge, with_settings):
    client = with_settings(rate_reads=1, rate_writes=1)
    agent = edge.agent()
    for _ in range(3):
        assert agent.report("heartbeat").status_code == 200
        for path in ("/healthz", "/metrics", "/openapi.json"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "RateLimit" not in answer.headers
        assert client.get("/v1/jobs").status_code == 401


def test_a_limit_of_nought_is_none(alice, with_settings):
    client = with_settings(rate_reads=0)
    answers = [client.get("/v1/jobs", headers=alice) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    assert "RateLimit" not in answers[0].headers


def test_failed_logins_are_limited_and_a_right_one_is_not_counted(edge, with_settings):
    with_settings(rate_logins=2)
    for _ in range(3):
        edge.page()
    browser = edge.app.test_client()
    browser.environ_base["wsgi.url_scheme"] = "https"

    def fail():
        token = edge.csrf_of(browser.get("/login"))
        return browser.post("/login", data={"key": "stk_live_" + 20 * "x", "csrf_token": token})

    assert [fail().status_code for _ in range(4)] == [401, 401, 429, 429]
    assert int(fail().headers["Retry-After"]) == 60
    edge.clock.advance(60)
    assert fail().status_code == 401


def test_every_public_route_says_that_it_may_refuse_for_now(edge, client):
    paths = client.get("/openapi.json").get_json()["paths"]
    answers = [item["responses"] for path in paths.values() for item in path.values()]
    assert answers
    assert all("429" in known for known in answers)


# --- with Redis, and without -----------------------------------------------------------------


@pytest.fixture
def redis_url(tmp_path):
    """A Redis of this test's own, and nothing else."""
    elsewhere = {"database_url": Secret("postgresql://db"), "s3_endpoint": "https://s3.test"}
    with embedded.start(Settings(data_dir=tmp_path / "data", **elsewhere)) as servers:
        yield servers.settings.redis_url


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_all_web_processes_count_together(edge, alice, problem, with_settings, redis_url, soon):
    clients = [with_settings(rate_reads=3, redis_url=redis_url) for _ in range(2)]

    def counts(client):
        return "RateLimit" in client.get("/v1/jobs", headers=edge.key()).headers

    for client in clients:
        soon(lambda client=client: counts(client))
    answers = [client.get("/v1/jobs", headers=alice) for client in 2 * clients]
    assert [answer.headers["RateLimit"].split(";")[1] for answer in answers] == [
        "r=2",
        "r=1",
        "r=0",
        "r=0",
    ]
    assert 55 <= refused_by(answers[3], problem) <= 60


def free_port():
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_while_redis_is_gone_requests_pass_unlimited_and_unhindered(alice, with_settings):
    client = with_settings(
        rate_reads=1, redis_url=Secret(f"redis://:hush@127.0.0.1:{free_port()}/0")
    )
    assert {client.get("/v1/jobs", headers=alice).status_code for _ in range(20)} == {200}


def test_what_was_gone_once_is_asked_no_more_until_it_answers_a_look(soon):
    asked, back, looked = [], threading.Event(), threading.Event()

    def is_well():
        looked.set()
        return back.wait()

    def answer():
        asked.append("answered")
        return "counted"

    def fail():
        asked.append("failed")
        raise StorageError(ConnectionError("gone"))

    circuit = Circuit(is_well)
    back.set()
    soon(lambda: circuit(answer) == "counted")
    back.clear(), looked.clear(), asked.clear()
    assert [circuit(fail) for _ in range(20)] == [None] * 20
    assert asked == ["failed"]
    looked.wait()
    back.set()
    soon(lambda: circuit(answer) == "counted")


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("url", ["redis://[", "memcached://somewhere", "cache"])
def test_a_redis_url_that_cannot_count_does_not_take_the_api_down(alice, with_settings, url):
    client = with_settings(rate_reads=1, redis_url=Secret(url))
    assert {client.get("/v1/jobs", headers=alice).status_code for _ in range(3)} == {200}
