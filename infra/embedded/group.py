"""Start the servers that no setting names, hand out where they are, and end them.

    with start(settings) as servers:
        run(servers.settings)

Each server listens on 127.0.0.1 alone and wants a password. They belong to a supervisor process
(`supervise`), which ends them when this process ends, in whatever way. Files stay in
`settings.data_dir` and are used again by the next start.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.embedded import postgres, redis, s3
from infra.embedded.errors import EmbeddedError
from infra.embedded.program import Program
from infra.embedded.secrets import Secrets
from infra.embedded.supervisor import Supervisor
from infra.settings import Settings
from state.events import Secret

#: `progress(name, state)`: name is postgresql, redis or s3; state is installing, starting, ready
Progress = Callable[[str, str], None]

_NEEDED_BYTES = 1_000_000_000
_POLL_S = 0.05
_PORT_NAMES = ("postgresql", "redis", "account", "container", "object", "proxy")


def start(
    settings: Settings,
    *,
    progress: Progress = lambda name, state: None,
    needed_bytes: int = _NEEDED_BYTES,
    patience_s: float = 5.0,
) -> Running:
    """Start every server that `settings` does not name, in parallel.

    `patience_s` is how long to wait for a Stoker that is just ending in the same `data_dir`.

    Raises:
        EmbeddedError: another Stoker runs in `data_dir`, the disk is full, or a server cannot
            run here. Nothing is left running.
    """
    wanted = [
        name
        for name, named in (
            ("postgresql", settings.database_url.reveal()),
            ("redis", settings.redis_url.reveal()),
            ("s3", settings.s3_endpoint or settings.s3_access_key),
        )
        if not named
    ]
    if not wanted:
        return Running(settings, None, None, {})
    root = _prepare(settings.data_dir, needed_bytes)
    lock = _lock(root, patience_s)
    group = None
    try:
        group = _Group(root, lock, Secrets.load(root), _ports(root), settings, progress)
        seconds = group.start(wanted)
        filled = group.fill(wanted)
        _write_private(root / "running.json", json.dumps(_public(filled)))
        return Running(filled, group.supervisor, lock, seconds)
    except BaseException:
        if group is not None:
            group.supervisor.close()
        os.close(lock)
        raise


def running(settings: Settings) -> Settings | None:
    """`settings` filled with the servers of the Stoker that runs in `data_dir` now, if any.

    For commands beside it (`stoker ps`): they share its servers and end nothing.
    """
    root = settings.data_dir
    try:
        lock = os.open(root / "lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        return None
    finally:
        os.close(lock)
    try:
        values = json.loads((root / "running.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return dataclasses.replace(
        settings,
        database_url=Secret(values["database_url"]),
        redis_url=Secret(values["redis_url"]),
        s3_endpoint=values["s3_endpoint"],
        s3_region=values["s3_region"],
        s3_access_key=values["s3_access_key"],
        s3_secret_key=Secret(values["s3_secret_key"]),
        secret_keys=tuple(Secret(key) for key in values["secret_keys"]),
    )


class Running:
    """Servers that were started. `settings` says where they are; `seconds` how long each took."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor | None,
        lock: int | None,
        seconds: Mapping[str, float],
    ) -> None:
        self.settings = settings
        self.seconds = dict(seconds)
        self._supervisor, self._lock = supervisor, lock

    @property
    def pids(self) -> dict[str, int]:
        """Of the supervisor and of each server, by name."""
        return self._supervisor.pids if self._supervisor else {}

    def run(self, program: Program) -> None:
        """Run one more program beside the servers: restarted when it ends, gone when we are."""
        if self._supervisor is None:
            self._supervisor = Supervisor()
        self._supervisor.launch(program)

    def close(self) -> None:
        """End everything in good order. May be called again."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        (self.settings.data_dir / "running.json").unlink(missing_ok=True)
        supervisor.close()
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Group:
    """The supervisor process and what it runs for us."""

    def __init__(
        self,
        root: Path,
        lock: int,
        secrets: Secrets,
        ports: Mapping[str, int],
        settings: Settings,
        progress: Progress,
    ) -> None:
        self._root, self._secrets, self._ports = root, secrets, ports
        self._settings, self._progress = settings, progress
        self.supervisor = Supervisor(hold=lock)

    def start(self, names: list[str]) -> dict[str, float]:
        verbs = {
            "postgresql": self._start_postgres,
            "redis": self._start_redis,
            "s3": self._start_s3,
        }

        def timed(name: str) -> float:
            began = time.monotonic()
            self._progress(name, "starting")
            verbs[name]()
            self._progress(name, "ready")
            return time.monotonic() - began

        with ThreadPoolExecutor(len(names), thread_name_prefix="embedded") as pool:
            tasks = {name: pool.submit(timed, name) for name in names}
            wait(tasks.values())
            return {name: task.result() for name, task in tasks.items()}

    def fill(self, names: list[str]) -> Settings:
        secrets, ports, settings = self._secrets, self._ports, self._settings
        if "postgresql" in names:
            url = postgres.url(ports["postgresql"], password=secrets.database_password)
            settings = dataclasses.replace(
                settings,
                database_url=Secret(url),
                secret_keys=settings.secret_keys or (Secret(secrets.fernet_key),),
            )
        if "redis" in names:
            url = f"redis://:{secrets.redis_password}@127.0.0.1:{ports['redis']}/0"
            settings = dataclasses.replace(settings, redis_url=Secret(url))
        if "s3" in names:
            settings = dataclasses.replace(
                settings,
                s3_endpoint=f"http://127.0.0.1:{ports['proxy']}",
                s3_access_key=secrets.s3_access_key,
                s3_secret_key=Secret(secrets.s3_secret_key),
            )
        return settings

    def _start_postgres(self) -> None:
        root, port = self._root / "postgresql", self._ports["postgresql"]
        password = self._secrets.database_password
        if not postgres.data(root).exists():
            self._progress("postgresql", "installing")
            self.supervisor.run_once(postgres.initialise(root, password=password))
            postgres.adopt(root)
        program = postgres.configure(root, port)
        self.supervisor.launch(program)
        self.supervisor.until(program, lambda: postgres.ready(port, password=password))

    def _start_redis(self) -> None:
        password, port = self._secrets.redis_password, self._ports["redis"]
        program = redis.configure(self._root / "redis", port, password=password)
        self.supervisor.launch(program)
        self.supervisor.until(program, lambda: redis.ready(port, password=password))

    def _start_s3(self) -> None:
        s3.check_possible(self._root)
        ports = {name: self._ports[name] for name in ("account", "container", "object", "proxy")}
        program = s3.configure(
            self._root / "s3",
            ports,
            access_key=self._secrets.s3_access_key,
            secret_key=self._secrets.s3_secret_key,
            region=self._settings.s3_region,
        )
        self.supervisor.launch(program)
        self.supervisor.until(program, lambda: s3.ready(ports["proxy"]))


def _prepare(root: Path, needed_bytes: int) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as exc:
        raise EmbeddedError(
            f"{root} cannot be used for data: {exc.strerror}", "set STOKER_DATA to a directory"
        ) from exc
    if free < needed_bytes:
        raise EmbeddedError(
            f"the disk of {root} is nearly full: {free / 1e9:.1f} GB free, "
            f"{needed_bytes / 1e9:.1f} GB needed",
            "free some space, or set STOKER_DATA to a directory on another disk",
        )
    return root


def _lock(root: Path, patience_s: float) -> int:
    """Take the directory; the descriptor to hold. The file says who has it."""
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(lock)
            raise EmbeddedError(
                f"another Stoker runs in {root} (pid {holder})",
                "end that one, or set STOKER_DATA to another directory",
            ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _ports(root: Path) -> dict[str, int]:
    """A free port for each server; those of last time where they are free still."""
    path = root / "ports.json"
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        before = {}
    held: list[socket.socket] = []
    ports: dict[str, int] = {}
    try:
        for name in _PORT_NAMES:
            listener = _bind(int(before.get(name, 0)))
            held.append(listener)
            ports[name] = listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
    path.write_text(json.dumps(ports))
    return ports


def _bind(port: int) -> socket.socket:
    for candidate in (port, 0):
        listener = socket.socket()
        # as the servers do: a connection of the last run may linger on the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", candidate))
        except OSError:
            listener.close()
            continue
        return listener
    raise EmbeddedError("there is no free port on 127.0.0.1", "end some programs")


def _public(settings: Settings) -> dict[str, Any]:
    return {
        "database_url": settings.database_url.reveal(),
        "redis_url": settings.redis_url.reveal(),
        "s3_endpoint": settings.s3_endpoint,
        "s3_region": settings.s3_region,
        "s3_access_key": settings.s3_access_key,
        "s3_secret_key": settings.s3_secret_key.reveal(),
        "secret_keys": [key.reveal() for key in settings.secret_keys],
    }


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
