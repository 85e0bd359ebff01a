"""Markets to test against: the sandbox over its socket, the one in memory, and a hostile server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.provider import Instance, LaunchSpec, Provider
from infra.provider_memory import MemoryProvider
from infra.sandbox.hosts import Host, seeded
from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state.job import GpuNeeds
from state.offer import Offer

ACCOUNT_KEY = "sandbox-account-key"
ANY_GPU = GpuNeeds(
    min_vram_gb=1,
    disk_gb=10,
    max_price=10_000_000,
    min_reliability=0,
    min_download_mbps=0,
    verified_only=False,
    min_cuda=0,
)


def eventually(look: Callable[[], Any], wait: Callable[[], Any], tries: int) -> Any:
    """What `look` returns once it is true."""
    for _ in range(tries):
        if found := look():
            return found
        wait()
    raise AssertionError("it did not come true")


@pytest.fixture
def spec() -> LaunchSpec:
    return LaunchSpec(
        label="test/job/1-abc",
        image="pytorch/pytorch:latest",
        disk_gb=20,
        onstart="echo hello from $CONTAINER_ID; sleep 600",
        env={"STOKER_TOKEN": "one-use-token"},
    )


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with running_sandbox(account_key=ACCOUNT_KEY, boot_s=0.3) as sandbox:
        yield sandbox


@pytest.fixture
def vast(sandbox: Sandbox) -> VastProvider:
    return VastProvider(ACCOUNT_KEY, sandbox.url, spacing=0, timeout=10)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A provider under test, and how its time passes."""

    provider: Provider
    wait: Callable[[], Any]

    def until(self, look: Callable[[], Any]) -> Any:
        return eventually(look, self.wait, 300)

    def offer(self) -> Offer:
        return min(self.provider.offers(ANY_GPU), key=lambda offer: offer.price)

    def reaches(self, instance_id: str, phase: str) -> Instance:
        def look() -> Instance | None:
            instance = self.provider.instance(instance_id)
            return instance if instance and instance.phase == phase else None

        found: Instance = self.until(look)
        return found


def memory_offer(host: Host, number: int) -> Offer:
    return Offer(
        id=str(number),
        machine_id=str(host.machine_id),
        gpu_name=host.gpu_name,
        num_gpus=1,
        vram_gb=host.gpu_ram / 1000,
        price=round(host.dph_base * 1_000_000) + 5000,
        storage_price=5000,
        download_price=1000,
        upload_price=1000,
        download_mbps=host.inet_down,
        upload_mbps=host.inet_up,
        reliability=host.reliability,
        verified=host.verification == "verified",
        cuda=host.cuda_max_good,
        disk_gb=host.disk_space,
    )


@dataclass(frozen=True, kw_only=True)
class Markets:
    """Opens markets of one kind."""

    kind: str
    clock: Any
    stack: contextlib.ExitStack

    def open(
        self, *, hosts: list[Host] | None = None, boot_s: float = 0.3, credit: float = 100.0
    ) -> Tried:
        hosts = hosts or seeded(0)
        if self.kind == "memory":
            provider = MemoryProvider(
                self.clock,
                [memory_offer(host, 100 + index) for index, host in enumerate(hosts)],
                boot_s=lambda offer: boot_s,
                credit=round(credit * 1_000_000),
            )
            return Tried(provider=provider, wait=lambda: self.clock.advance(1))
        sandbox = self.stack.enter_context(
            running_sandbox(account_key=ACCOUNT_KEY, hosts=hosts, boot_s=boot_s, credit=credit)
        )
        vast = VastProvider(ACCOUNT_KEY, sandbox.url, spacing=0, timeout=10)
        return Tried(provider=vast, wait=lambda: time.sleep(0.05))


@pytest.fixture(params=["memory", "vast"])
def markets(request: pytest.FixtureRequest, clock: Any) -> Iterator[Markets]:
    with contextlib.ExitStack() as stack:
        yield Markets(kind=request.param, clock=clock, stack=stack)


@pytest.fixture
def tried(markets: Markets) -> Tried:
    return markets.open()


# --- a server that answers whatever it is told, byte by byte -------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


#: What is done with a connection after its request was read.
Reply = Callable[[socket.socket, threading.Event], None]


def raw(data: bytes) -> Reply:
    return lambda connection, over: connection.sendall(data)


def http(status: int, body: Any, **headers: str) -> Reply:
    """A whole answer; `body` is sent as JSON, or as it is when it is text."""
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, str) else "application/json"
    lines = {"Content-Type": kind, "Content-Length": str(len(content)), "Connection": "close"}
    lines |= {key.replace("_", "-"): value for key, value in headers.items()}
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    return raw(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + content)


def dropped(connection: socket.socket, over: threading.Event) -> None:
    """The connection ends without an answer."""


def silence(connection: socket.socket, over: threading.Event) -> None:
    over.wait()


def drip(connection: socket.socket, over: threading.Event) -> None:
    """A byte of a header now and then: no socket timeout ever sees it."""
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not over.wait(0.05):
            connection.sendall(b"z")


@dataclass
class Hostile:
    """A server whose answers are scripted; the last one is repeated."""

    http = staticmethod(http)
    raw = staticmethod(raw)
    dropped = staticmethod(dropped)
    silence = staticmethod(silence)
    drip = staticmethod(drip)
    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def answers(self, *replies: Reply) -> None:
        self.replies[:] = replies

    def provider(self, timeout: float = 5.0) -> VastProvider:
        return VastProvider(ACCOUNT_KEY, self.url, spacing=0, timeout=timeout)


def _receive(connection: socket.socket) -> Seen | None:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    method, path, _ = first.split(" ")
    return Seen(method=method, path=path, headers=headers, body=body)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Hostile(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    over = threading.Event()
    workers: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            request = _receive(connection)
            if request is None:
                return
            reply = server.replies[0]
            if len(server.replies) > 1:
                server.replies.pop(0)
            server.seen.append(request)
            with contextlib.suppress(OSError):
                reply(connection, over)

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            worker = threading.Thread(target=serve, args=(connection,), daemon=True)
            workers.append(worker)
            worker.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    yield server
    over.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in (acceptor, *workers):
        thread.join()
