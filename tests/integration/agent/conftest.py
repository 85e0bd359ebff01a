"""The other side of the agent, on a real socket: Stoker, its storage and the GPU market."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import struct
import textwrap
import threading
import time
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_agent import wire
from gpu_agent.agent import Agent, Charge
from gpu_agent.clock import Clock
from gpu_agent.deadman import Instance
from gpu_agent.halt import Halt
from gpu_agent.journal import Journal
from gpu_agent.methods import Launch, Paths
from gpu_agent.methods.lora import Lora
from gpu_agent.work import Patience

TOKEN = "boot-token-canary"
KEY = "instance-key-canary"
CONTAINER = "77"


def _until(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for something that a process or thread does; its value. Fails when it never comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := holds():
            return value
        time.sleep(0.01)
    pytest.fail(f"did not happen within {seconds} s")


def safetensors(tensors: int = 2, floats: int = 16) -> bytes:
    header = {
        f"t{number}": {
            "dtype": "F32",
            "shape": [floats],
            "data_offsets": [4 * floats * number, 4 * floats * (number + 1)],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4 * floats * tensors)


def zipped(*names: str, content: bytes = b"not really an image, but nobody looks here") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return packed.getvalue()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Stoker:
    """A server with a script: what is in `faults[route]` is done first, one per request.

    A fault is a status to answer with, `cut` (hang up before anything happened), `lost` (do it,
    then hang up instead of answering) or a function of the handler.
    Routes are hello, report, files, get, put, document, destroy and stop. For a document,
    ("part", n) serves the first n bytes as if they were all.
    """

    def __init__(self, address: str) -> None:
        self.url = address
        self.secret = wire.new_secret()
        self.attempt = 1
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: dict[str, deque[Any]] = defaultdict(deque)
        self.always: dict[str, Any] = {}
        self.reports: list[wire.Report] = []
        self.bodies: dict[str, bytes] = {}
        self.repeats: list[str] = []
        self.orders: list[wire.Order] = []
        self.over = False
        self.over_after = ""
        self.requests: list[Request] = []
        self.hellos: list[dict[str, Any]] = []
        self.documents: dict[str, bytes] = {}
        self.container = {
            "STOKER_TOKEN": TOKEN,
            "CONTAINER_ID": CONTAINER,
            "CONTAINER_API_KEY": KEY,
        }
        self.destroyed = threading.Event()
        self.stopped = threading.Event()
        self.generation = 0
        self.expired = False
        self.spec: dict[str, Any] = {}
        self.offer(dataset=zipped("a.jpg", "b.png", "b.txt"), base=safetensors())

    def offer(self, **objects: bytes) -> None:
        self.objects |= objects

    def download(self, what: str, name: str, sha256: str = "") -> wire.Download:
        body = self.objects[what]
        return wire.Download(
            url=self.address_of(what),
            name=name,
            bytes=len(body),
            sha256=sha256 or hashlib.sha256(body).hexdigest(),
        )

    def job_spec(self) -> wire.JobSpec:
        given = {
            "job": "job_1",
            "attempt": self.attempt,
            "dataset": self.download("dataset", "dataset.zip"),
            "base": self.download("base", "tiny.safetensors"),
            "base_family": "sd1",
            "method": "fake",
            "recipe": {"steps": 3},
            "secret": self.secret,
            "report_url": f"{self.url}/agent/v1/jobs/job_1/attempts/{self.attempt}/reports",
            "files_url": f"{self.url}/agent/v1/jobs/job_1/attempts/{self.attempt}/files",
            "lease_ends_at": time.time() + 3600,
            "heartbeat_s": 0.2,
            "progress_s": 0.05,
        }
        return wire.JobSpec(**(given | self.spec))

    def move(self) -> None:
        """The machine is lost: another one resumes from what was uploaded, in another attempt."""
        reported = [item for item in self.reports if item.type == "training.checkpoint"]
        files = [file["name"] for item in reported[:-3:-1] for file in item.data["files"]]
        self.offer(**{name: self.uploads[name] for name in files})
        self.spec["resume"] = tuple(self.download(name, name) for name in files)
        self.attempt += 1
        self.hellos.clear()

    def address_of(self, what: str) -> str:
        return f"{self.url}/s3/{what}?X-Signature=url-canary-{self.generation}"

    def facts(self) -> list[str]:
        return [str(report.type) for report in self.reports]

    def milestones(self) -> list[str]:
        """The facts, each once, without those that come when they like."""
        passing = ("heartbeat", "log.lines")
        return list(dict.fromkeys(fact for fact in self.facts() if fact not in passing))

    def report(self, fact: str) -> wire.Report:
        return next(item for item in self.reports if item.type == fact)

    def has(self, fact: str) -> bool:
        return fact in self.facts()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stoker: Stoker

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        kind = self.path.rsplit("/", 1)[-1].removesuffix("s")
        self._serve({"hello": "hello", "report": "report", "file": "files"}[kind])

    def do_GET(self) -> None:
        self._serve("get" if self.path.startswith("/s3/") else "document")

    def do_DELETE(self) -> None:
        self._serve("destroy")

    def do_PUT(self) -> None:
        self._serve("stop" if self.path.startswith("/api/") else "put")

    def _serve(self, route: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        lowered = {name.lower(): value for name, value in self.headers.items()}
        self.stoker.requests.append(Request(self.command, self.path, lowered, body))
        faults = self.stoker.faults[route]
        fault = faults.popleft() if faults else self.stoker.always.get(route)
        if callable(fault):
            fault = fault(self)
        if isinstance(fault, tuple):
            self.answer(200, self.stoker.documents[self.path][: fault[1]])
            return
        if fault == "cut":
            self._hang_up()
            return
        if isinstance(fault, int):
            self.answer(fault, b"scripted")
            return
        if fault == "done":
            return
        status, answer = getattr(self, f"_{route}")(body)
        if fault == "lost":
            self._hang_up()
            return
        if answer is not None:
            self.answer(status, answer)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _hello(self, body: bytes) -> tuple[int, bytes]:
        said = json.loads(body)
        known = self.stoker.hellos
        if said["token"] != TOKEN or any(item["nonce"] != said["nonce"] for item in known):
            return 401, b"{}"
        known.append(said)
        return 200, self.stoker.job_spec().to_bytes()

    def _verified(self, body: bytes) -> str:
        headers = {name.lower(): value for name, value in self.headers.items()}
        return wire.verify(body, headers, secrets=[self.stoker.secret], now=time.time())

    def _report(self, body: bytes) -> tuple[int, bytes]:
        stoker = self.stoker
        webhook_id = self._verified(body)
        report = wire.Report.from_bytes(body)
        assert report.webhook_id == webhook_id
        if stoker.over:
            return 410, b"{}"
        if webhook_id in stoker.bodies:
            assert stoker.bodies[webhook_id] == body
            stoker.repeats.append(webhook_id)
            return 200, wire.answer_to_bytes([])
        stoker.bodies[webhook_id] = body
        stoker.reports.append(report)
        stoker.over = report.type == stoker.over_after
        orders, stoker.orders = stoker.orders, []
        return 200, wire.answer_to_bytes(orders)

    def _files(self, body: bytes) -> tuple[int, bytes]:
        self._verified(body)
        asked = json.loads(body)
        stoker = self.stoker
        stoker.generation += 1
        stoker.expired = False
        spec = stoker.job_spec()
        put = {
            item["name"]: {
                "url": f"{stoker.url}/s3/put/{item['name']}?X-Signature=url-canary",
                "headers": {"content-type": "application/octet-stream", "if-none-match": "*"},
            }
            for item in asked.get("put", [])
        }
        offered = {"dataset": spec.dataset, "base": spec.base}
        offered |= {item.name: item for item in spec.resume if item.name in stoker.objects}
        offered |= {f"base/{item.name}": item for item in spec.base_parts}
        get = {
            what: {
                "url": stoker.address_of(what),
                "name": offered[what].name,
                "bytes": offered[what].bytes,
                "sha256": offered[what].sha256,
            }
            for what in asked.get("get", [])
            if what in offered
        }
        return 200, json.dumps({"put": put, "get": get}).encode()

    def _get(self, body: bytes) -> tuple[int, bytes | None]:
        if self.stoker.expired:
            return 403, b"<Error><Code>AccessDenied</Code></Error>"
        name = self.path.split("?")[0].removeprefix("/s3/")
        content = self.stoker.objects.get(name)
        if content is None:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>"
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if wanted:
            start = int(wanted[1])
            if start >= len(content):
                self.answer(416, b"", content_range=f"bytes */{len(content)}")
                return 416, None
            end = f"{start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], content_range=f"bytes {end}")
            return 206, None
        return 200, content

    def _document(self, body: bytes) -> tuple[int, bytes]:
        content = self.stoker.documents.get(self.path)
        return (404, b"") if content is None else (200, content)

    def _put(self, body: bytes) -> tuple[int, bytes]:
        name = self.path.split("?")[0].removeprefix("/s3/put/")
        if name in self.stoker.uploads:
            return 412, b""
        self.stoker.uploads[name] = body
        return 200, b""

    def _market(self) -> bool:
        return (
            self.path == f"/api/v0/instances/{CONTAINER}/"
            and self.headers.get("authorization") == f"Bearer {KEY}"
        )

    def _destroy(self, body: bytes) -> tuple[int, bytes]:
        if not self._market():
            return 404, b'{"success": false, "error": "no_such_instance"}'
        assert json.loads(body) == {}
        self.stoker.destroyed.set()
        return 200, b'{"success": true, "msg": "Instance destroyed successfully"}'

    def _stop(self, body: bytes) -> tuple[int, bytes]:
        assert self._market()
        assert json.loads(body) == {"state": "stopped"}
        self.stoker.stopped.set()
        return 200, b'{"success": true}'


def cut_after(count: int) -> Callable[[Any], str]:
    """A fault of a GET: promise it all (from the range's start), send `count` bytes, hang up."""

    def do(handler: Any) -> str:
        content = handler.stoker.objects[handler.path.split("?")[0].removeprefix("/s3/")]
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("range", ""))
        start = int(wanted[1]) if wanted else 0
        handler.send_response(206 if wanted else 200)
        handler.send_header("content-length", str(len(content) - start))
        if wanted:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.send_header("content-range", span)
        handler.end_headers()
        handler.wfile.write(content[start : start + count])
        handler.wfile.flush()
        return "cut"

    return do


def send(content: bytes, status: int = 200, **headers: str) -> Callable[[Any], str]:
    """A fault of a GET: these bytes, whatever was asked for."""

    def do(handler: Any) -> str:
        handler.answer(status, content, **headers)
        return "done"

    return do


def hang(released: threading.Event) -> Callable[[Any], str]:
    """A fault: not a byte until the test is over."""

    def do(handler: Any) -> str:
        released.wait(60)
        return "cut"

    return do


@pytest.fixture
def until() -> Callable[..., Any]:
    return _until


@pytest.fixture
def faults(released: threading.Event) -> SimpleNamespace:
    """What a request can meet; see `Stoker.faults`."""
    return SimpleNamespace(cut_after=cut_after, send=send, hang=hang(released))


@pytest.fixture
def trainer_head() -> str:
    """What every fake trainer begins with."""
    return HEAD


@pytest.fixture
def files() -> SimpleNamespace:
    """Makes small files of the right kind."""
    return SimpleNamespace(safetensors=safetensors, zipped=zipped)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets go of requests that `hang`."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def stoker(released: threading.Event) -> Iterator[Stoker]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.block_on_close = False
    script = Stoker(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"stoker": script})
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


# --- a trainer that does what a test says -----------------------------------------------------

HEAD = """
import json, os, signal, sys, threading, time
job = json.load(open(sys.argv[sys.argv.index("--job") + 1]))
def say(event, **more):
    print(json.dumps({"event": event, **more}), flush=True)
def keep(name, content=b"result"):
    path = os.path.join(job["output_dir"], name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").write(content)
    return path
def complete():
    files = [{"name": "lora.safetensors", "path": keep("lora.safetensors")}]
    say("completed", files=files, loss_first=0.9, loss_best=0.4, best_step=2, label="validation")
"""
GOOD = """
assert sorted(os.listdir(job["images_dir"])) == ["a.jpg", "b.png", "b.txt"]
assert open(job["base_file"], "rb").read(8)
say("started", total=3, loss_first=0.9, parameters=1000)
for step in range(1, 4):
    say("progress", step=step, total=3, loss=1 / step, lr=1e-4, points=[[step, 1 / step]])
say("validation", step=3, loss=0.4, stderr=0.01)
complete()
"""


@dataclass
class FakeMethod:
    """The door of `lora` with another program behind it."""

    code: str
    requirements: tuple[str, ...] = ()
    lora: Lora = field(default_factory=Lora)

    def launch(self, spec: wire.JobSpec, paths: Paths, gpus: int) -> Launch:
        launch = self.lora.launch(spec, paths, gpus)
        program = paths.work / "fake_trainer.py"
        program.write_text(HEAD + textwrap.dedent(self.code))
        argv = list(launch.argv)
        return Launch(argv=(argv[0], "-u", str(program), *argv[3:]), env=launch.env)

    def read(self, line: str) -> dict[str, Any] | None:
        return self.lora.read(line)


class Running:
    """An agent on a thread of this process."""

    def __init__(self, agent: Agent, halt: Halt, home: Path) -> None:
        self.halt, self.home = halt, home
        self.code: int | None = None
        self.agent = agent
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.agent.run()

    def join(self, seconds: float = 30.0) -> int:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the agent does not end"
        assert self.code is not None
        return self.code


@pytest.fixture
def start(stoker: Stoker, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts an agent whose trainer runs the given code."""
    running: list[Running] = []
    handlers: list[logging.Handler] = []
    logger = logging.getLogger("gpu_agent")
    logger.setLevel(logging.INFO)

    def begin(
        code: str = GOOD,
        *,
        requirements: tuple[str, ...] = (),
        grace_s: float = 6.5,
        name: str = "home",
    ) -> Running:
        journal, halt = Journal(), Halt()
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        handlers.extend([journal, logging.FileHandler(home / "agent.log")])
        for handler in handlers[-2:]:
            logger.addHandler(handler)
        charge = Charge(
            url=stoker.url,
            token=TOKEN,
            home=home,
            instance=Instance(id=CONTAINER, api_key=KEY, market_url=stoker.url),
        )
        agent = Agent(
            charge,
            halt=halt,
            clock=Clock(),
            journal=journal,
            methods={"fake": lambda: FakeMethod(code, requirements)},
            delays=(0.02, 0.05),
            hello_delays=(0.02,) * 5,
            patience=Patience(
                file_delays=(0.02,) * 5, stop_grace_s=1.0, grace_s=grace_s, tick_s=0.02
            ),
        )
        running.append(Running(agent, halt, home))
        return running[-1]

    yield begin
    for item in running:
        item.halt.call("the test is over")
        item.join()
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()
