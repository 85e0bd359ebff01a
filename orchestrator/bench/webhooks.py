"""Durable reports per second: `stoker bench webhooks`.

Three figures of the same minute on the same machine: single-row commits of PostgreSQL by 32
connections, a bare Flask under the same server, and the receiver (signature checked, report
applied and on disk before the answer). Client, server and database share the processors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg

from gpu_agent import wire
from gpu_agent.recipe import Recipe
from infra.crypto import SecretBox
from infra.store import SqlStore
from orchestrator.api.ids import new_id
from orchestrator.bench.load import Load, send
from orchestrator.bench.place import machine, own_database
from orchestrator.cli.stage import free_port
from state.events import Attempt, Dataset, DatasetStatus, Secret
from state.job import Job, JobRequest, Status

#: Of PostgreSQL's limit.
CONNECTIONS = 32
#: Agents that report at once, each over a connection of its own, one report at a time.
AGENTS = 128
JOBS = 256
#: Requests per agent that are not measured.
WARM_UP = 20
WEB_WORKERS = 2


def run(
    database_url: str,
    *,
    seconds: float = 5.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure in a database of its own on the server of `database_url`, which is dropped after.

    Returns: what it ran on; `limits` (per second); `receiver` (per second, latencies in ms,
    answers by status); `ratio` of the receiver to PostgreSQL's limit.
    """
    with own_database(database_url) as url:
        ran_on = {
            **machine(url),
            "postgres_connections": CONNECTIONS,
            "agents": AGENTS,
            "web": f"granian, {WEB_WORKERS} processes",
        }
        say("PostgreSQL: single-row commits by 32 connections")
        before = commits_per_second(url, seconds)
        say("bare Flask under the same server")
        with serving("wsgi", "bare", {}) as address:
            flask = send(address, _bare_queues(seconds), seconds)
        say("the receiver")
        key = SecretBox.new_key()
        env = {"DATABASE_URL": url, "STOKER_SECRET_KEYS": key.reveal()}
        queues = _prepared(SqlStore(url, SecretBox([key])), seconds)
        with serving("rsgi", "server", env) as address:
            send(address, [queue[:WARM_UP] for queue in queues], seconds)
            load = send(address, [queue[WARM_UP:] for queue in queues], seconds)
        say("PostgreSQL again")
        after = commits_per_second(url, seconds)
        limit = (before + after) / 2
        return {
            "ran_on": ran_on,
            "limits": {
                "postgres_commits_per_s": round(limit),
                "postgres_before_after": [round(before), round(after)],
                "bare_flask_per_s": round(flask.per_second),
            },
            "receiver": _figures(load),
            "ratio": round(load.per_second / limit, 3),
        }


def _figures(load: Load) -> dict[str, Any]:
    return {
        "per_s": round(load.per_second),
        "p50_ms": round(load.percentile_ms(0.5), 2),
        "p99_ms": round(load.percentile_ms(0.99), 2),
        "max_ms": round(load.percentile_ms(1.0), 2),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
    }


# --- PostgreSQL's own limit -------------------------------------------------------------------


def commits_per_second(url: str, seconds: float) -> float:
    """Rows inserted, each in a transaction of its own, by 32 connections of one process."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS bench_rows"
            " (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text)"
        )
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(CONNECTIONS)
        ]
        counts = [0] * CONNECTIONS
        until = time.perf_counter() + seconds

        def insert(place: int) -> None:
            while time.perf_counter() < until:
                connections[place].execute(
                    "INSERT INTO bench_rows (body) VALUES (%s)", ("x" * 200,), prepare=True
                )
                counts[place] += 1

        began = time.perf_counter()
        threads = [threading.Thread(target=insert, args=(i,)) for i in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - began)


# --- the server -------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(interface: str, what: str, env: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Granian with one of the applications of `orchestrator.bench.target`."""
    address = ("127.0.0.1", free_port())
    argv = [
        sys.executable, "-m", "granian", "--interface", interface, "--factory", "--no-ws",
        "--host", address[0], "--port", str(address[1]), "--workers", str(WEB_WORKERS),
        "--log-level", "warning",
        f"orchestrator.bench.target:{what}",
    ]  # fmt: skip
    process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    try:
        _await(process, address)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], address: tuple[str, int]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(address, timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the server under test did not start")


# --- the load ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agent:
    """Who reports for a training job."""

    job: str
    secret: str


def _prepared(store: SqlStore, seconds: float) -> list[list[bytes]]:
    """Requests for each connection, of agents whose jobs are training; as many as may be sent."""
    try:
        agents = _agents(store)
    finally:
        store.close()
    per_job = int(seconds * 12_000 / JOBS) + WARM_UP
    queues: list[list[bytes]] = []
    for place in range(AGENTS):
        mine = agents[place::AGENTS]
        queues.append([request_of(agent, seq + 1) for seq in range(per_job) for agent in mine])
    return queues


def _agents(store: SqlStore) -> list[Agent]:
    now = datetime.now(UTC)
    agents = []
    with store.transaction() as tx:
        dataset = Dataset(id=new_id("ds", now), owner="bench", created_at=now)
        tx.add_dataset(dataset.evolve(status=DatasetStatus.READY))
        for _ in range(JOBS):
            job = Job(
                id=new_id("job", now),
                owner="bench",
                request=JobRequest(
                    dataset_id=dataset.id,
                    base="civitai:1",
                    recipe=Recipe().to_dict(),
                    webhook_url="https://bench.invalid/hook",
                ),
                created_at=now,
                entered_at=now,
                status=Status.TRAINING,
                dataset_ready=True,
                last_heard_at=now,
            )
            secret = wire.new_secret()
            tx.add_job(job)
            tx.add_attempt(
                Attempt(
                    job=job.id,
                    number=1,
                    created_at=now,
                    secret=Secret(secret),
                )
            )
            agents.append(Agent(job.id, secret))
    return agents


def request_of(agent: Agent, seq: int) -> bytes:
    """A signed report of progress, as it goes over the line."""
    at = time.time()
    report = wire.Report(
        job=agent.job,
        attempt=1,
        seq=seq,
        type=wire.Fact.TRAINING_PROGRESS,
        at=at,
        data={"step": seq, "total": 1000, "loss": 0.1234, "lr": 1e-4, "eta_s": 12.5},
    )
    body = report.to_bytes()
    headers = wire.sign(body, secrets=[agent.secret], webhook_id=report.webhook_id, at=at)
    return _http(agent.job, body, headers)


def _bare_queues(seconds: float) -> Sequence[Sequence[bytes]]:
    request = _http("job", b"x" * 250, {"webhook-id": "x"})
    return [[request] * int(seconds * 1000)] * CONNECTIONS


def _http(job: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [
        f"POST /agent/v1/jobs/{job}/attempts/1/reports HTTP/1.1",
        "host: bench",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
