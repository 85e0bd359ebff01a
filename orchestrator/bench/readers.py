"""People who look at a page, imagined: `python -m orchestrator.bench.readers HOST PORT COUNT PATH`.

A process of its own, since the load client beside it measures. The session's cookie comes as the
first line of stdin, where no process list shows it. Prints `ready` once every stream has had its
first message; at the end of stdin one JSON line with what each was sent after that.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

#: Between two messages.
END = b"\n\n"
#: What only messages with parts of a page contain.
PART = b"hx-swap-oob"


class Reader:
    """One stream."""

    def __init__(self, address: tuple[str, int], path: str, cookie: str) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        lines = [f"GET {path} HTTP/1.1", "host: bench", f"cookie: {cookie}", "hx-request: true"]
        lines.append("accept: text/event-stream")
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
        self.status = 0
        self.messages = self.bytes = 0
        self._rest = b""

    def read(self) -> bool:
        """Whether the stream goes on."""
        chunk = self.socket.recv(1 << 18)
        if not self.status and chunk:
            self.status = int(chunk[9:12])
        self.bytes += len(chunk)
        *blocks, self._rest = (self._rest + chunk).split(END)
        self.messages += sum(PART in block for block in blocks)
        return bool(chunk)


def main() -> None:
    host, port, count, path = sys.argv[1:5]
    cookie = sys.stdin.readline().strip()
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    readers = [Reader((host, int(port)), path, cookie) for _ in range(int(count))]
    for reader in readers:
        selector.register(reader.socket, selectors.EVENT_READ, reader)
    ready, ended, over = False, 0, False
    began = time.monotonic()
    while not over:
        for key, _ in selector.select(timeout=5):
            if key.data is None:
                over = not sys.stdin.readline()
            elif not key.data.read():
                ended += 1
                selector.unregister(key.data.socket)
        if not ready and all(reader.messages for reader in readers):
            ready, began = True, time.monotonic()
            for reader in readers:
                reader.messages = reader.bytes = 0
            print("ready", flush=True)  # noqa: T201 -- what the parent waits for
    told = {
        "statuses": sorted({reader.status for reader in readers}),
        "seconds": round(time.monotonic() - began, 1),
        "ended": ended,
        "messages": [reader.messages for reader in readers],
        "bytes": sum(reader.bytes for reader in readers),
    }
    print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
