"""Web, worker and beat: how each is run, alone or together."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.embedded import Program
from infra.settings import Settings

#: Threads of one worker: tasks wait for the network, not for the processor.
WORKER_THREADS = 16
#: Two processes by default: one commits while the other reads.
WEB_WORKERS = 2
WEB_THREADS = 16


def web_argv(bind: str, workers: int = WEB_WORKERS) -> tuple[str, ...]:
    host, _, port = bind.rpartition(":")
    return (
        sys.executable, "-m", "granian", "--interface", "wsgi", "--factory",
        "--host", host or "127.0.0.1", "--port", port, "--workers", str(workers),
        "--blocking-threads", str(WEB_THREADS), "--backlog", "1024", "--no-ws",
        "--log-level", "warning", "--respawn-failed-workers", "orchestrator.wsgi:make_app",
    )  # fmt: skip


def worker_argv(threads: int = WORKER_THREADS) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "celery", "-A", "tasks.app", "worker", "--pool", "threads",
        "--concurrency", str(threads), "--without-gossip", "--without-mingle",
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


def become(argv: tuple[str, ...]) -> None:
    """Turn this process into `argv`, so that signals reach it directly."""
    os.execv(argv[0], argv)  # noqa: S606 -- argv is ours; no shell is wanted
