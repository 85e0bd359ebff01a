"""The pages beside the receiver: `stoker bench pages`.

One database with 500 jobs and 20,000 events, one server. First how long Fleet takes, alone. Then
agents report as fast as they are answered, in runs that take turns: with nobody looking, and with
50 streams of Fleet open. A pair's ratio of the 99th percentiles is one figure, the median over the
pairs the result; what the streams were sent meanwhile proves that they lived. Load client, readers,
servers and database share the processors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import requests

from gpu_agent import wire
from gpu_agent.recipe import Recipe
from infra.crypto import SecretBox
from infra.store import SqlStore
from orchestrator.api import auth
from orchestrator.api.ids import new_id
from orchestrator.api.keys import hash_of
from orchestrator.bench.load import Load, send
from orchestrator.bench.place import machine, own_database
from orchestrator.bench.webhooks import AGENTS, WARM_UP, WEB_WORKERS, Agent, request_of, serving
from state.events import ApiKey, Attempt, Dataset, DatasetStatus, Event, Secret
from state.job import Job, JobRequest, Reason, Status
from state.lease import Lease, LeaseStatus

#: ms of server time for Fleet; with streams to without, of the receiver's p99.
BAR_FLEET_MS, BAR_RATIO = 300.0, 1.2
STREAMS = 50
#: Views of Fleet that are timed.
VIEWS = 60
#: Reports of a job that are in the database before it starts.
REPORTED = 1000
_TOKEN = re.compile(r'name="csrf-token" content="([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Jobs by what they do; each with `events` events."""

    training: int = 256
    waiting: int = 30
    stalled: int = 14
    ended: int = 200
    events: int = 40

    @property
    def jobs(self) -> int:
        return self.training + self.waiting + self.stalled + self.ended


def run(
    database_url: str,
    *,
    pairs: int = 4,
    seconds: float = 4.0,
    sizes: Sizes = Sizes(),
    streams: int = STREAMS,
    views: int = VIEWS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure in a database of its own on the server of `database_url`, which is dropped after.

    Returns: what it ran on; `fleet` (ms); `receiver`: figures without and with streams, and the
    ratio of p99 in each pair; `streams`: what each was sent while the receiver was under load;
    `bar`.
    """
    with own_database(database_url) as url:
        ran_on = {
            **machine(url),
            "jobs": sizes.jobs,
            "events": sizes.jobs * sizes.events,
            "agents": AGENTS,
            "streams": streams,
            "web": f"granian, {WEB_WORKERS} processes",
        }
        say(f"filling: {sizes.jobs} jobs, {sizes.jobs * sizes.events} events")
        key = SecretBox.new_key()
        with contextlib.closing(SqlStore(url, SecretBox([key]))) as store:
            fleet = Fleet(store, sizes)
        env = {"DATABASE_URL": url, "STOKER_SECRET_KEYS": key.reveal()}
        with serving("rsgi", "server", env) as address:
            browser = Browser(address, fleet.key)
            say(f"Fleet, {views} times")
            page = browser.times(views)
            send(address, fleet.queues(1.0), 1.0)  # the first reports of each job cost more
            rounds = []
            for pair in range(pairs):
                say(f"the receiver with and without streams: {pair + 1} of {pairs}")
                order = (False, True) if pair % 2 else (True, False)
                both = {
                    looked: _round(address, fleet, browser, streams if looked else 0, seconds)
                    for looked in order
                }
                rounds.append((both[False], both[True]))
        ratios = [
            with_.load.percentile_ms(0.99) / without.load.percentile_ms(0.99)
            for without, with_ in rounds
        ]
        return {
            "ran_on": ran_on,
            "fleet": page,
            "receiver": {
                "without": _figures([without.load for without, _ in rounds]),
                "with": _figures([with_.load for _, with_ in rounds]),
                "p99_ratio": round(statistics.median(ratios), 3),
                "p99_ratios": [round(ratio, 3) for ratio in ratios],
            },
            "streams": _told([with_.told for _, with_ in rounds]),
            "bar": {"fleet_ms": BAR_FLEET_MS, "p99_ratio": BAR_RATIO},
        }


@dataclass(frozen=True)
class Round:
    """One run of the receiver, and what the readers say of theirs."""

    load: Load
    told: dict[str, Any]


def _round(
    address: tuple[str, int], fleet: Fleet, browser: Browser, streams: int, seconds: float
) -> Round:
    queues = fleet.queues(seconds)
    told: dict[str, Any] = {}
    with looking(address, browser.cookie, streams, told):
        send(address, [queue[:WARM_UP] for queue in queues], seconds)
        load = send(address, [queue[WARM_UP:] for queue in queues], seconds)
    return Round(load, told)


def _figures(loads: Sequence[Load]) -> dict[str, Any]:
    whole = Load()
    for load in loads:
        whole.seconds += load.seconds
        whole.latencies += load.latencies
        for status, count in load.statuses.items():
            whole.statuses[status] = whole.statuses.get(status, 0) + count
    return {
        "per_s": round(whole.per_second),
        "p50_ms": round(whole.percentile_ms(0.5), 2),
        "p99_ms": round(whole.percentile_ms(0.99), 2),
        "p99_ms_of_each": [round(load.percentile_ms(0.99), 2) for load in loads],
        "statuses": {str(status): count for status, count in sorted(whole.statuses.items())},
    }


def _told(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(told["seconds"] for told in rounds)
    messages = [count for told in rounds for count in told["messages"]]
    return {
        "seconds": round(seconds, 1),
        "fewest_messages_of_one": min(messages),
        "messages_per_s_of_one": round(sum(messages) / len(messages) * len(rounds) / seconds, 2),
        "kb_per_s_of_all": round(sum(told["bytes"] for told in rounds) / seconds / 1000),
        "ended": sum(told["ended"] for told in rounds),
    }


# --- who looks --------------------------------------------------------------------------------


class Browser:
    """An operator's session."""

    def __init__(self, address: tuple[str, int], key: str) -> None:
        self._url = f"http://{address[0]}:{address[1]}"
        self._session = requests.Session()
        page = self._session.get(f"{self._url}/login", timeout=30)
        token = _TOKEN.search(page.text)
        form = {"key": key, "csrf_token": token[1] if token else ""}
        self._session.post(f"{self._url}/login", data=form, timeout=30).raise_for_status()
        self.cookie = "; ".join(f"{name}={value}" for name, value in self._session.cookies.items())

    def times(self, views: int) -> dict[str, float]:
        """ms from asking for Fleet until all of it came, over the loopback."""
        took = []
        for _ in range(views + 5):
            began = time.perf_counter()
            answer = self._session.get(self._url, timeout=30)
            took.append(1000 * (time.perf_counter() - began))
            answer.raise_for_status()
        kept = sorted(took[5:])
        return {
            "median_ms": round(statistics.median(kept), 1),
            "p95_ms": round(kept[min(int(0.95 * len(kept)), len(kept) - 1)], 1),
            "kb": round(len(answer.content) / 1000),
        }


@contextlib.contextmanager
def looking(
    address: tuple[str, int], cookie: str, streams: int, told: dict[str, Any]
) -> Iterator[None]:
    """So many open streams of Fleet; at the end `told` has what they were sent."""
    if not streams:
        yield
        return
    argv = [sys.executable, "-m", "orchestrator.bench.readers", address[0], str(address[1])]
    with subprocess.Popen(
        [*argv, str(streams), "/live/fleet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the readers have no pipes")
        try:
            process.stdin.write(cookie + "\n")
            process.stdin.flush()
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the streams did not open")
            yield
            process.stdin.close()
            told.update(json.loads(process.stdout.readline()))
        finally:
            process.kill()


# --- what is in the database ------------------------------------------------------------------

_PATH = (Status.PENDING_GPU, Status.PENDING_IMAGES, Status.PENDING_MODEL, Status.TRAINING)


class Fleet:
    """The jobs, and the agents of those that train."""

    def __init__(self, store: SqlStore, sizes: Sizes) -> None:
        self._now, self._events = datetime.now(UTC), sizes.events
        self._agents: list[Agent] = []
        self._seq = REPORTED
        with store.transaction() as tx:
            dataset = Dataset(id=new_id("ds", self._now), owner="bench", created_at=self._now)
            tx.add_dataset(dataset.evolve(status=DatasetStatus.READY))
            self._dataset = dataset.id
            self.key = self._new_key(tx)
        made = [
            *[Status.COMPLETED] * (sizes.ended - sizes.ended // 10),
            *[Status.FAILED] * (sizes.ended // 10),
            *[Status.TRAINING] * sizes.training,
            *[Status.STALLED] * sizes.stalled,
            *[Status.PENDING_GPU] * sizes.waiting,
        ]
        for place, status in enumerate(made):
            with store.transaction() as tx:
                self._add(tx, status, self._now - timedelta(seconds=10 * (len(made) - place)))

    def queues(self, seconds: float) -> list[list[bytes]]:
        """Requests for each agent's connection, as many as may be sent; each report once."""
        per_job = int(seconds * 12_000 / len(self._agents)) + WARM_UP
        begin, self._seq = self._seq, self._seq + per_job
        return [
            [
                request_of(agent, begin + number)
                for number in range(per_job)
                for agent in self._agents[place::AGENTS]
            ]
            for place in range(min(AGENTS, len(self._agents)))
        ]

    def _new_key(self, tx: Any) -> str:
        name = new_id("key", self._now)
        text = f"stk_live_{name}"
        tx.add_api_key(
            ApiKey(
                id=name,
                owner="bench",
                name="bench",
                hash=hash_of(text),
                scopes=frozenset({auth.OPERATOR}),
                created_at=self._now,
            )
        )
        return text

    def _add(self, tx: Any, status: Status, began: datetime) -> None:
        ended = status in (Status.COMPLETED, Status.FAILED)
        job = Job(
            id=new_id("job", began),
            owner="bench",
            request=JobRequest(
                dataset_id=self._dataset,
                base="civitai:128713",
                recipe=Recipe().to_dict(),
                webhook_url="https://bench.invalid/hook",
                metadata={"customer": "bench"},
            ),
            created_at=began,
            entered_at=began + timedelta(seconds=8),
            status=status,
            dataset_ready=True,
            seq=self._events,
            last_heard_at=self._now if status is Status.TRAINING else None,
            stalled_from=Status.TRAINING if status is Status.STALLED else None,
            reason=None
            if status in (Status.TRAINING, Status.PENDING_GPU, Status.COMPLETED)
            else Reason(code="host_lost", message="the machine is gone"),
            started_at=began + timedelta(seconds=8),
            finished_at=self._now if ended else None,
            progress={"training": {"step": 10, "total": 1000, "loss": 0.1}},
        )
        tx.add_job(job)
        secret = wire.new_secret()
        tx.add_attempt(Attempt(job=job.id, number=1, created_at=began, secret=Secret(secret)))
        if status is Status.TRAINING:
            self._agents.append(Agent(job.id, secret))
        tx.add_lease(self._lease(job, began, open_=status is Status.TRAINING))
        tx.add_events(self._history(job, began))

    def _lease(self, job: Job, began: datetime, *, open_: bool) -> Lease:
        return Lease(
            id=new_id("ls", began),
            job=job.id,
            attempt=1,
            label=f"bench/{job.id}/1",
            created_at=began,
            expires_at=self._now + timedelta(hours=12),
            status=LeaseStatus.RENTED if open_ else LeaseStatus.RELEASED,
            machine_id=f"m{job.id[-4:]}",
            gpu_name="RTX 4090",
            geo="NO",
            price=360_000,
            instance_id="i" + job.id,
            rented_at=began + timedelta(seconds=1),
            running_at=began + timedelta(seconds=4),
            released_at=None if open_ else self._now,
            ended_at=None if open_ else self._now,
        )

    def _history(self, job: Job, began: datetime) -> list[Event]:
        """Its transitions, and reports up to its number of events."""
        path = [Status.PENDING, *_PATH]
        if job.status is Status.PENDING_GPU:
            path = path[:2]
        elif job.status is not Status.TRAINING:
            path.append(job.status)
        moves = [
            {"from": source.value, "to": target.value, "cause": "bench"}
            for source, target in itertools.pairwise(path)
        ]
        events = [
            Event(
                job=job.id,
                seq=seq,
                attempt=1,
                type="transition",
                at=began + timedelta(seconds=2 * seq),
                data=data,
            )
            for seq, data in enumerate(moves, 1)
        ]
        return events + [
            Event(
                job=job.id,
                seq=seq,
                attempt=1,
                type=wire.Fact.TRAINING_PROGRESS.value,
                at=began + timedelta(seconds=10),
                data={"step": seq, "total": 1000, "loss": 0.1},
                agent_seq=seq,
                webhook_id=f"bench_{job.id}_{seq}",
            )
            for seq in range(len(moves) + 1, self._events + 1)
        ]
