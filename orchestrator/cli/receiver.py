"""A customer's webhook receiver, as the demo plays it: verify, keep, answer."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from gpu_agent import wire

MAX_BODY = 64 * 1024


class Receiver:
    """Listens on a free port of this machine until closed.

    `got` holds the payload of every verified webhook in order of arrival, repeats left out;
    `refused` counts those whose signature did not verify.
    """

    def __init__(self, secret: str) -> None:
        self.got: list[dict[str, Any]] = []
        self.refused = 0
        self._seen: set[str] = set()
        self._secret = secret
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(min(length, MAX_BODY))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(204 if receiver.take(body, headers) else 401)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the demo's screen is for the job."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/webhooks"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        try:
            webhook_id = wire.verify(body, headers, secrets=[self._secret], now=time.time())
            payload = json.loads(body)
        except (wire.SignatureError, ValueError):
            with self._lock:
                self.refused += 1
            return False
        with self._lock:
            if webhook_id not in self._seen:
                self._seen.add(webhook_id)
                self.got.append(payload)
        return True

    @property
    def in_order(self) -> bool:
        """Whether `seq` came as 1, 2, 3 … without gap or swap."""
        with self._lock:
            return [item["data"]["seq"] for item in self.got] == list(range(1, len(self.got) + 1))

    def has(self, kind: str) -> bool:
        with self._lock:
            return any(item["type"] == kind for item in self.got)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
