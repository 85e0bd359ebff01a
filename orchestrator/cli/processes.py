"""Web, worker and beat: how each is run, alone or together."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from infra.embedded import Program
from infra.settings import Settings
from orchestrator.cli.console import CliError, Exit

#: Threads of one worker: tasks wait for the network, not for the processor.
WORKER_THREADS = 16
#: What a worker takes: `stoker` for all but webhooks out, `relay` for those.
QUEUES = "stoker,relay"
#: Two processes by default: one commits while the other reads.
WEB_WORKERS = 2


def address(bind: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `:PORT` or `PORT`. Raises: CliError."""
    host, _, port = bind.strip().rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise CliError(
            f"{bind!r} is no address to listen on",
            "it must be HOST:PORT",
            "for example --bind 127.0.0.1:8400",
            Exit.USAGE,
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def until_signal() -> threading.Event:
    """Set once SIGINT or SIGTERM comes."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    return over


def check_free(host: str, port: int, then: str) -> None:
    """Raises: CliError, when nobody can listen there; `then` is what to do about it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except OSError as error:
        taken = f"port {port} is taken" if error.errno == errno.EADDRINUSE else ""
        raise CliError(
            taken or f"nothing can listen on {host}:{port}",
            "another program listens on it" if taken else str(error.strerror),
            then,
        ) from None


def last_line(log: Path) -> str:
    """What a process said last; empty when it said nothing."""
    try:
        lines = log.read_text(errors="replace")[-4000:].strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def web_argv(bind: str, workers: int = WEB_WORKERS) -> tuple[str, ...]:
    host, port = address(bind)
    return (
        sys.executable, "-m", "granian", "--interface", "rsgi", "--factory",
        "--host", host, "--port", str(port), "--workers", str(workers),
        "--backlog", "1024", "--no-ws", "--log-level", "warning",
        "--respawn-failed-workers", "orchestrator.wsgi:make_server",
    )  # fmt: skip


def metrics_env(settings: Settings) -> dict[str, str]:
    """Where the processes of one web server share their counters; emptied at each start."""
    shared = settings.data_dir / "metrics"
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    return {"PROMETHEUS_MULTIPROC_DIR": str(shared)}


def worker_argv(threads: int = WORKER_THREADS, queues: str = QUEUES) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "celery", "-A", "tasks.app", "worker", "--pool", "threads",
        "--concurrency", str(threads), "--queues", queues, "--without-gossip", "--without-mingle",
        "--loglevel", "WARNING",
    )  # fmt: skip


def beat_argv() -> tuple[str, ...]:
    return (sys.executable, "-m", "celery", "-A", "tasks.app", "beat", "--loglevel", "WARNING")


def program(
    name: str, argv: tuple[str, ...], settings: Settings, env: Mapping[str, str] | None = None
) -> Program:
    """One of our processes, for the supervisor; its log is `<data_dir>/logs/<name>.log`."""
    logs = settings.data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return Program(
        name=name,
        argv=argv,
        log=logs / f"{name}.log",
        cwd=Path.cwd(),
        env={"PYTHONUNBUFFERED": "1", **settings.to_env(), **(env or {})},
    )


def programs(settings: Settings) -> list[Program]:
    """Web, worker and beat, as one installation runs them together."""
    counted = metrics_env(settings)
    return [
        program("web", web_argv(settings.bind), settings, counted),
        program("worker", worker_argv(), settings, counted),
        program("beat", beat_argv(), settings),
    ]


def become(argv: tuple[str, ...]) -> None:
    """Turn this process into `argv`, so that signals reach it directly."""
    os.execv(argv[0], argv)  # noqa: S606 -- argv is ours; no shell is wanted
