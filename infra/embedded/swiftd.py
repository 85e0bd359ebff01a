"""OpenStack Swift's four servers in one process: `python -P swiftd.py CONFIG_DIR`.

Run as a file, in a process of its own: eventlet replaces the standard library's blocking calls.
`CONFIG_DIR` is written by `infra.embedded.s3`. There is one replica and no memcached; what Swift
would keep there (does this container exist?) is kept in a dictionary of this process, without
which every request asks the account and the container server again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

SERVERS = ("account", "container", "object", "proxy")
#: entries; beyond it the whole cache is dropped
_CACHE_LIMIT = 10_000
#: ring partitions are 2 to the power of this; one device needs no more
_PART_POWER = 4


class ProcessCache:
    """The part of Swift's memcache client that a proxy uses."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Any, float]] = {}

    def set(self, key: str, value: Any, time: float = 0, **_: Any) -> None:
        if len(self._rows) >= _CACHE_LIMIT:
            self._rows.clear()
        self._rows[key] = (value, _now() + time if time else float("inf"))

    def get(self, key: str, **_: Any) -> Any:
        value, until = self._rows.get(key, (None, 0.0))
        return value if until > _now() else None

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        value = max(0, int(self.get(key) or 0) + delta)
        self.set(key, value, time=time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        return self.incr(key, -delta, time)

    def delete(self, key: str, server_key: str | None = None) -> None:
        self._rows.pop(key, None)


def _now() -> float:
    return time.monotonic()


def _with_cache(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    cache = ProcessCache()

    def cached(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["swift.cache"] = cache
        return app(environ, start_response)

    return cached


def _write_ring(directory: Path, name: str, port: int) -> None:
    """Where Swift looks up which server holds what: one device, one replica."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(_PART_POWER, 1, 1)
    builder.add_dev(
        {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0}
    )
    builder.rebalance()
    builder.get_ring().save(str(directory / f"{name}.ring.gz"))


def log_to_stderr(*arguments: Any) -> None:
    """Named in the configuration (`log_custom_handlers`); Swift hands its logger over."""
    logger: logging.Logger = arguments[5]
    if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        logger.addHandler(logging.StreamHandler(sys.stderr))


def main(directory: Path) -> None:
    import eventlet  # type: ignore[import-untyped]
    import eventlet.wsgi  # type: ignore[import-untyped]
    from swift.common import utils, wsgi

    utils.monkey_patch()
    os.environ["TZ"] = "UTC+0"
    time.tzset()
    utils.set_swift_dir(str(directory))
    listening = []
    for name in SERVERS:
        path = directory / f"{name}.conf"
        config = RawConfigParser()
        config.read(path)
        address = (config["DEFAULT"]["bind_ip"], int(config["DEFAULT"]["bind_port"]))
        if name != "proxy":
            _write_ring(directory, name, address[1])
        app = wsgi.loadapp(str(path), global_conf={"log_name": name})
        sock = eventlet.listen(address, backlog=1024)
        listening.append(
            eventlet.spawn(
                eventlet.wsgi.server,
                sock,
                _with_cache(app) if name == "proxy" else app,
                utils.NullLogger(),
                protocol=wsgi.SwiftHttpProtocol,
                custom_pool=eventlet.GreenPool(256),
                # the AWS clients want "ETag" as it is written
                capitalize_response_headers=False,
                socket_timeout=60,
            )
        )
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    for server in listening:
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
