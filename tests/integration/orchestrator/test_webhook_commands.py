"""`stoker webhooks`, `deliveries`, `events`, `trigger` and `listen` against the application itself,
over sockets, with a customer's server that verifies by the reference library."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from werkzeug.serving import make_server

from orchestrator.app import create_app
from orchestrator.cli.app import run
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit
from orchestrator.cli.listen import Desk
from state import record
from state.memory import MemoryStore
from tasks.relay import Answer, NoAnswer, Relay

URL = "https://example.com/hooks"


class Stoker:
    """An installation whose worker does at once what it is woken for."""

    def __init__(self, edge: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.edge, self.capsys = edge, capsys
        self.answer: Any = 204
        self.got: list[str] = []
        relay = Relay(store=edge.store, post=self.post, clock=edge.clock, random=random.Random(1))

        def wake(task: str, subject: str) -> None:
            if task == "relay":
                relay.relay(subject)

        self.deps = dataclasses.replace(edge.deps, wake=wake)
        self.server = make_server("127.0.0.1", 0, create_app(self.deps), threaded=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.key = edge.key("alice")["Authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("STOKER_URL", self.url)
        monkeypatch.setenv("STOKER_API_KEY", self.key)

    def post(self, url: str, *, headers: Any, body: bytes, timeout: float) -> Answer:
        if isinstance(self.answer, Exception):
            raise self.answer
        self.got.append(headers["webhook-id"])
        return Answer(self.answer, {})

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Run a command: its exit code, stdout, stderr."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(list(words))
        said = self.capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    def json(self, *words: str, code: int = 0) -> Any:
        ended, out, err = self(*words, "--json")
        assert ended == code, err + out
        return json.loads(out)

    def job_that_is_cancelled(self) -> str:
        """It owes two webhooks."""
        job = self.edge.job()
        with self.edge.store.transaction() as tx:
            record.cancel(tx, job.id, self.edge.clock())
        return str(job.id)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def stoker(edge: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Stoker]:
    running = Stoker(edge, monkeypatch, capsys)
    yield running
    running.server.shutdown()
    running.server.server_close()


class Local:
    """A developer's own server, which verifies as the docs say."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any], bool]] = []
        self.secret, self.status = "", 204
        local = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                try:
                    good = bool(Webhook(local.secret).verify(body, headers))
                except WebhookVerificationError:
                    good = False
                local.got.append((headers["webhook-id"], json.loads(body), good))
                self.send_response(local.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks"

    @property
    def ids(self) -> list[str]:
        return [name for name, *_ in self.got]


@pytest.fixture
def local() -> Iterator[Local]:
    running = Local()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_an_endpoint_s_life_by_command(stoker: Stoker) -> None:
    made = stoker.json("webhooks", "add", URL, "--events", "job.completed, job.failed")
    assert made["events"] == ["job.completed", "job.failed"]
    name, secret = made["id"], made["secret"]
    code, out, _ = stoker("webhooks", "ls")
    assert (code, name in out, URL in out) == (0, True, True)
    assert secret not in out
    assert "secret" not in stoker.json("webhooks", "show", name)

    (sent,) = stoker.json("webhooks", "test", name)
    assert (sent["status"], stoker.got) == ("delivered", [sent["id"]])
    turned = stoker.json("webhooks", "rotate", name, "--overlap", "1")
    assert turned["secret"] != secret
    assert stoker.json("webhooks", "disable", name)["enabled"] is False
    code, _, said = stoker("webhooks", "test", name)
    assert code == 1
    assert "disabled" in said
    assert "stoker webhooks ls" in said
    assert stoker.json("webhooks", "enable", name)["enabled"] is True
    assert stoker.json("webhooks", "rm", name) == {"deleted": name}
    assert stoker.json("webhooks", "ls") == []


def test_a_new_endpoint_shows_its_secret_once_on_stdout(stoker: Stoker) -> None:
    code, out, err = stoker("webhooks", "add", URL)
    assert code == 0
    assert "whsec_" in out
    assert "not shown again" in err


#: A command, its exit code, and what must be among its words.
WRONG: list[tuple[tuple[str, ...], int, str]] = [
    (("webhooks", "add", "http://example.com"), 2, "/url must begin with https://"),
    (("webhooks", "add", URL, "--events", "job.exploded"), 2, "/events/0"),
    (("webhooks", "show", "we_none"), 5, "`stoker webhooks ls`"),
    (("webhooks", "rm", "../jobs"), 5, "`stoker webhooks ls`"),
    (("events", "resend", "job_none.1"), 5, "`stoker deliveries ls`"),
    (("deliveries", "ls", "--status", "lost"), 2, "/status"),
    (("trigger", "job.completed"), 1, "stoker listen"),
    (("listen", "--forward-to", "ftp://x"), 2, "is no URL"),
    (("listen", "--forward-to", "http://[bad"), 2, "is no URL"),
    (("listen", "--secret", "hunter2"), 2, "the secret is no use"),
]


def test_what_goes_wrong_is_said_in_three_lines(stoker: Stoker) -> None:
    for words, code, said in WRONG:
        ended, out, err = stoker(*words)
        assert (ended, out) == (code, ""), words
        assert said in err
        assert "hunter2" not in err
        heads = [line.split(":")[0].strip() for line in err.splitlines()]
        assert heads == ["error", "why", "next"], err


def test_a_webhook_that_nobody_took_is_listed_and_sent_again(stoker: Stoker) -> None:
    name = stoker.json("webhooks", "add", URL)["id"]
    stoker.answer = NoAnswer("the connection was refused")
    (sent,) = stoker.json("webhooks", "test", name, code=1)
    assert sent["tries"][0]["error"] == "the connection was refused"
    code, out, _ = stoker("deliveries", "ls", "--status", "waiting")
    assert code == 0
    assert sent["id"] in out
    assert "the connection was refused" in out
    assert stoker("deliveries", "ls", "--status", "delivered")[1] == ""
    stoker.answer = 200
    stoker.edge.clock.advance(6)
    code, out, err = stoker("events", "resend", sent["id"])
    assert (code, stoker.got) == (0, [sent["id"]]), err
    assert "200" in out
    code, out, _ = stoker("deliveries", "show", sent["id"])
    assert (code, "webhook.test" in out) == (0, True)
    shown = stoker.json("deliveries", "show", sent["id"])
    assert [item["answer"] for item in shown["tries"]] == [0, 200]


def test_a_triggered_event_goes_to_every_enabled_endpoint(stoker: Stoker) -> None:
    names = [stoker.json("webhooks", "add", URL)["id"] for _ in range(3)]
    stoker.json("webhooks", "disable", names[2])
    sent = stoker.json("trigger", "job.completed")
    assert {item["endpoint"] for item in sent} == set(names[:2])
    assert {item["type"] for item in sent} == {"job.completed"}
    (one,) = stoker.json("trigger", "job.failed", "--endpoint", names[1], "--wait", "0")
    assert one["endpoint"] == names[1]


def test_listening_shows_and_forwards_each_webhook_signed(stoker: Stoker, local: Local) -> None:
    """Whatever the job says of webhooks: nothing had to be set up."""
    local.secret = "whsec_" + "C" * 44
    words = ("--forward-to", local.url, "--secret", local.secret, "--json")
    made: list[str] = []
    later = threading.Timer(0.2, lambda: made.append(stoker.job_that_is_cancelled()))
    later.start()
    code, out, err = stoker("listen", *words, "--count", "2")
    later.join()
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["type"], line["seq"], line["answer"]) for line in lines] == [
        ("job.pending_gpu", 1, 204),
        ("job.cancelled", 2, 204),
    ]
    assert all(good for *_, good in local.got)
    assert local.ids == [line["id"] for line in lines]
    assert {line["job"] for line in lines} == set(made)

    # what happened while nobody listened comes next time, and nothing comes twice
    again = stoker.job_that_is_cancelled()
    local.status = 500
    code, out, err = stoker("listen", *words, "--count", "2")
    assert "listening again" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["job"], line["answer"]) for line in lines] == [(again, 500)] * 2
    assert len(local.ids) == len(set(local.ids)) == 4
    (tried,) = stoker.json("deliveries", "show", lines[0]["id"])["tries"]
    assert tried["answer"] == 500


def test_listening_makes_a_secret_and_says_it_once(stoker: Stoker, local: Local) -> None:
    sending = threading.Timer(0.2, lambda: stoker.job_that_is_cancelled())
    sending.start()
    code, out, err = stoker("listen", "--forward-to", local.url, "--count", "1")
    sending.join()
    assert code == 0
    assert err.count("whsec_") == 1
    assert "job.pending_gpu" in out
    assert "whsec_" not in out


def test_a_desk_forwards_once_when_its_answer_was_lost(stoker: Stoker, local: Local) -> None:
    """The server is away between the forward and what is said of it."""
    local.secret = "whsec_" + "C" * 44
    desk = Desk(client=Client(stoker.url, stoker.key), target=local.url, secret=local.secret)
    assert desk.open([]) is False
    job = stoker.job_that_is_cancelled()
    (first, second) = desk.fetch()
    away = desk.client
    desk.client = Client("http://127.0.0.1:9", stoker.key)
    desk.forward(first)
    desk.tell()
    desk.client = away
    assert [item["id"] for item in desk.fetch()] == [second["id"]]
    desk.forward(second)
    desk.tell()
    assert desk.fetch() == []
    assert [payload["data"]["job"] for _, payload, _ in local.got] == [job, job]
    assert desk.untold == {}


def test_a_desk_waits_for_a_server_that_is_away_and_ends_when_its_key_is_revoked(
    stoker: Stoker, local: Local
) -> None:
    pauses: list[float] = []
    desk = Desk(client=Client(stoker.url, stoker.key), target="", secret="", sleep=pauses.append)
    desk.open([])
    here = desk.client

    def back(seconds: float) -> None:
        pauses.append(seconds)
        desk.client = here if len(pauses) < 3 else Client(stoker.url, "stk_test_" + "x" * 20)

    desk.sleep = back
    desk.client = Client("http://127.0.0.1:9", stoker.key)
    with pytest.raises(CliError) as ended:
        desk.run(0, lambda line: None)
    assert ended.value.code is Exit.AUTH
    assert pauses == [5.0, 1.0, 1.0]


def test_a_listener_of_somebody_else_is_not_taken_up(stoker: Stoker) -> None:
    """An operator sees all endpoints; the listener must be one's own."""
    mine = Desk(client=Client(stoker.url, stoker.key), target="", secret="")
    mine.open([])
    operator = stoker.edge.key("operations", "operator")["Authorization"].removeprefix("Bearer ")
    theirs = Desk(client=Client(stoker.url, operator), target="", secret="")
    assert theirs.open([]) is False
    assert theirs.endpoint != mine.endpoint
