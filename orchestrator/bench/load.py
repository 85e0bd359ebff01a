"""A small HTTP load client: keep-alive connections, requests made beforehand, one thread.

Python's own HTTP clients cost more than the server under test, and both share the processors.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Load:
    """What came back: seconds in all, latency of each answer in seconds, answers by status."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class _Line:
    """One connection and what it still has to send."""

    def __init__(self, address: tuple[str, int], requests: Sequence[bytes]) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = iter(requests)
        self.sent_at = 0.0
        self._got = b""

    def send(self) -> bool:
        """Whether there was anything left to send."""
        following = next(self._requests, None)
        if following is None:
            return False
        self.sent_at = time.perf_counter()
        self.socket.sendall(following)
        return True

    def receive(self) -> int:
        """The status of a complete answer, or 0 while it is not complete."""
        chunk = self.socket.recv(65536)
        if not chunk:
            raise ConnectionError("the server closed a connection in mid-answer")
        self._got += chunk
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found:
            return 0
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0])
        if len(body) < length:
            return 0
        self._got = b""
        return int(head[9:12])


def send(address: tuple[str, int], queues: Sequence[Sequence[bytes]], seconds: float) -> Load:
    """Send each queue over a connection of its own, one request at a time, for `seconds`.

    Raises:
        OSError: the server cannot be reached, or broke off.
    """
    load = Load()
    selector = selectors.DefaultSelector()
    lines = [_Line(address, requests) for requests in queues]
    began = time.perf_counter()
    for line in lines:
        if line.send():
            selector.register(line.socket, selectors.EVENT_READ, line)
    try:
        while selector.get_map():
            for key, _ in selector.select(timeout=10):
                _heard(load, selector, key.data, began + seconds)
        load.seconds = time.perf_counter() - began
    finally:
        selector.close()
        for line in lines:
            line.socket.close()
    return load


def _heard(load: Load, selector: selectors.BaseSelector, line: _Line, until: float) -> None:
    status = line.receive()
    if status == 0:
        return
    now = time.perf_counter()
    load.latencies.append(now - line.sent_at)
    load.statuses[status] = load.statuses.get(status, 0) + 1
    if now >= until or not line.send():
        selector.unregister(line.socket)
