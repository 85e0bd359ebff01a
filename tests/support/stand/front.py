"""An HTTP proxy in front of the web process that remembers which reports were acknowledged.

It is the witness of I8: what it saw answered with 2xx must be in the database, whatever was
killed a moment later.
"""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from gpu_agent import wire

TIMEOUT_S = 60.0
#: Headers that belong to one connection, and not to the message.
_OWN = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


@dataclass(frozen=True)
class Acknowledged:
    """A report that was answered with 2xx, and how often (the agent may not have heard it)."""

    report: wire.Report
    times: int


class Front:
    """Listens on a port of its own, and passes requests to `port`.

    `acknowledged` has every report that was answered with 2xx, by its webhook-id; `quarrels`
    those that were acknowledged with two different bodies.
    """

    def __init__(self, port: int) -> None:
        self.acknowledged: dict[str, Acknowledged] = {}
        self.quarrels: list[str] = []
        self._lock = threading.Lock()
        self._loses = False
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = TIMEOUT_S

            def do_GET(self) -> None:
                self._pass()

            do_POST = do_PUT = do_DELETE = do_GET

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                given = {k: v for k, v in self.headers.items() if k.lower() not in _OWN}
                onward = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
                try:
                    onward.request(self.command, self.path, body, given)
                    answer = onward.getresponse()
                    text = answer.read()
                except (OSError, http.client.HTTPException):
                    self.close_connection = True  # as the web process did to us
                    return
                finally:
                    onward.close()
                front.note(self.path, body, answer.status)
                if front.loses:
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in _OWN:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: lines that idle are closed after a while."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """An agent that was killed while it asked is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_port)
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def loses(self) -> bool:
        return self._loses

    def lose(self) -> None:
        """The web process takes requests, and nobody hears its answers, until `mend`."""
        self._loses = True

    def mend(self) -> None:
        self._loses = False

    def note(self, path: str, body: bytes, status: int) -> None:
        if not (path.endswith("/reports") and 200 <= status < 300):
            return
        report = wire.Report.from_bytes(body)
        with self._lock:
            known = self.acknowledged.get(report.webhook_id)
            if known is not None and known.report != report:
                self.quarrels.append(report.webhook_id)
            times = known.times + 1 if known else 1
            self.acknowledged[report.webhook_id] = Acknowledged(report, times)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
