"""The command line, run in this process against a server that says what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from orchestrator.cli.app import run


@dataclass
class FakeApi:
    """Answers by `METHOD path`: a function of the request's body, or (status, body[, headers]).

    A list is played one by one, its last element for ever. What is not named is a 404.
    """

    url: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append(f"{method} {path}")
        self.bodies.append(body)
        found = self.answers.get(f"{method} {urlsplit(path).path}")
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if callable(found):
            found = found(body)
        if found is None:
            found = (404, {"detail": "there is no such thing", "code": "not_found"})
        status, said, *more = found
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        return status, data, dict(more[0]) if more else {}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, data, headers = fake.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STOKER_URL", fake.url)
    monkeypatch.setenv("STOKER_API_KEY", "stk_test_of_a_test_key")
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def stoker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Callable[..., Ran]:
    """Runs a command; what it said, and its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            run(arguments)
        said = capsys.readouterr()
        return Ran(int(left.value.code or 0), said.out, said.err)

    return command


def make_job(**changes: Any) -> dict[str, Any]:
    return {
        "id": "job_01",
        "status": "training",
        "attempt": 1,
        "max_attempts": 3,
        "base": "civitai:1",
        "created_at": "2026-11-22T12:00:00Z",
        "progress": {"training": {"step": 40, "total": 100, "loss": 0.25, "loss_best": 0.2}},
        "cost": {"display": "$0.0400", "cap": 5_000_000, "so_far": 40_000},
        "host": {"gpu": "RTX 4090", "machine_id": "m1"},
        "reason": None,
        "transitions": [
            {
                "source": "pending",
                "target": "pendingGpu",
                "at": "2026-11-22T12:00:02Z",
                "reason": None,
            }
        ],
        "result_files": [],
        **changes,
    }


@pytest.fixture(name="make_job")
def _make_job() -> Callable[..., dict[str, Any]]:
    return make_job
