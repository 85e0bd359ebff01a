"""Vast's notification webhooks, as a receiver gets them from the sandbox."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.sandbox.notify import Notifier
from infra.sandbox.server import running_sandbox

SECRET = "a notification's secret"


@dataclass
class Receiver:
    url: str = ""
    #: What is answered, one after the other; the last is repeated.
    statuses: list[int] = field(default_factory=lambda: [204])
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 20
        while len(self.heard) < count:
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.01)
        return [json.loads(body) for _, body in self.heard]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    to = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            to.heard.append((dict(self.headers), body))
            self.send_response(to.statuses.pop(0) if len(to.statuses) > 1 else to.statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    to.url = f"http://127.0.0.1:{server.server_port}/hints"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield to
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def notifier(receiver: Receiver) -> Iterator[Callable[..., Notifier]]:
    with contextlib.ExitStack() as stack:

        def opened(**options: Any) -> Notifier:
            made = Notifier([receiver.url], SECRET, time_scale=1000, **options)
            stack.callback(made.close)
            return made

        yield opened


def test_the_market_tells_of_an_outbid_instance(receiver: Receiver) -> None:
    with running_sandbox(boot_s=0, notify=[receiver.url], notify_secret=SECRET) as sandbox:
        (offer, *_) = sandbox.market.search({"type": "bid"})
        price = offer["min_bid"]
        number = sandbox.market.create(offer["id"], {"image": "x", "price": price}).id
        sandbox.market.tick()
        sandbox.market.outbid(number)
        created, started, outbid = receiver.wait_for(3)
    assert (created["notif_type"], started["notif_type"]) == (
        "instance_created",
        "instance_started",
    )
    assert outbid["notif_type"] == "outbid"
    assert outbid["subject"] == f"Your Interruptible Instance #{number} Has Been Outbid"
    assert outbid["data"].items() >= {"instance_id": number, "bid": price}.items()
    assert outbid["data_truncated"] is False
    headers, body = receiver.heard[2]
    assert headers["X-Vast-Event-Id"] == outbid["event_id"]
    assert headers["X-Vast-Delivery-Attempt"] == "1"
    signed = headers["X-Vast-Timestamp"].encode() + b"." + body
    digest = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["X-Vast-Signature-256"] == f"sha256={digest}"


def test_what_was_not_taken_comes_again_signed_anew(
    receiver: Receiver, notifier: Callable[..., Notifier]
) -> None:
    receiver.statuses = [503, 429, 204]
    now = iter(range(1_800_000_000, 1_900_000_000))
    notifier(clock=lambda: next(now))("webhook_test")
    first, second, third = receiver.wait_for(3)
    assert first == second == third
    assert first["data"] is None
    heads = [headers for headers, _ in receiver.heard]
    assert [head["X-Vast-Delivery-Attempt"] for head in heads] == ["1", "2", "3"]
    assert len({head["X-Vast-Signature-256"] for head in heads}) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 410])
def test_a_refusal_is_final(
    receiver: Receiver, notifier: Callable[..., Notifier], status: int
) -> None:
    receiver.statuses = [status, 204]
    tell = notifier()
    tell("webhook_test")
    tell("instance_deleted", instance_id=1, machine_id=2)
    assert [event["notif_type"] for event in receiver.wait_for(2)] == [
        "webhook_test",
        "instance_deleted",
    ]


def test_nobody_there_is_given_up_at_last() -> None:
    tell = Notifier(["http://127.0.0.1:9/"], SECRET, time_scale=1e6)
    tell("webhook_test")
    deadline = time.monotonic() + 20
    while len(tell.sent) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tell.close()
    assert [item["attempt"] for item in tell.sent] == [1, 2, 3, 4, 5, 6]


def test_some_are_lost_some_come_twice_and_some_say_little(
    receiver: Receiver, notifier: Callable[..., Notifier]
) -> None:
    tell = notifier(rate=0.3, seed=5)
    for number in range(60):
        tell("instance_deleted", instance_id=number, machine_id=2)
    lost = sum(item["outcome"] == "lost" for item in tell.sent)
    assert 5 < lost < 35
    tell("webhook_test")
    deadline = time.monotonic() + 20
    while len({body for _, body in receiver.heard}) < 60 - lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heard = [json.loads(body) for _, body in receiver.heard]
    ids = [event["event_id"] for event in heard]
    assert len(set(ids)) < len(ids)
    assert {event["data"] is None for event in heard} == {True, False}


def test_no_more_webhooks_than_vast_has() -> None:
    with pytest.raises(ValueError, match="4"):
        Notifier(["http://127.0.0.1:9/"] * 5, SECRET)
