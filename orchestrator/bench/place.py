"""Where a bench runs: databases of its own, and what there is to say about the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from infra.migrations import upgrade


@contextlib.contextmanager
def own_database(server_url: str) -> Iterator[str]:
    """A fresh, migrated database on the server of `server_url`; dropped at the end."""
    name = f"stoker_bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        path, mark, options = server_url.partition("?")
        url = f"{path.rpartition('/')[0]}/{name}{mark}{options}"
        try:
            upgrade(url)
            yield url
        finally:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


def machine(database_url: str) -> dict[str, Any]:
    """What every figure depends on, the load that others put on the machine included."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT current_setting('server_version')").fetchone()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(_cpus())
    return {
        "cpus": len(usable),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "postgres": row[0] if row else "",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpus() -> int:
    return os.cpu_count() or 1


def commit_ms(database_url: str, rounds: int = 200) -> float:
    """Median time of a single-row commit on one connection, in ms."""
    took = []
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS bench_commits (body text)")
        for _ in range(rounds):
            began = time.perf_counter()
            connection.execute(
                "INSERT INTO bench_commits (body) VALUES (%s)", ("x" * 200,), prepare=True
            )
            took.append(time.perf_counter() - began)
        connection.execute("DROP TABLE bench_commits")
    return 1000 * statistics.median(took)


def memory_mb(pid: int, field: str = "VmRSS") -> float | None:
    """Resident memory of a process in MB (`VmHWM`: the most so far); None where it is not told."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None


def children(pid: int) -> list[int]:
    """Direct children of a process; none where they are not told."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid …; the name may hold anything
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)
