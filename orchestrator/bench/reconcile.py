"""What a reconcile pass costs, and on what it does not depend: `stoker bench reconcile`.

Three databases of the same run, each with the same number of due jobs: few active jobs, many, and
few beside many finished ones. Passes over them take turns, so that a busy moment of the machine
meets all alike. Each is compared with the others of its turn; the median of that is the figure.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from infra.crypto import SecretBox
from infra.store import SqlStore
from orchestrator.api.ids import new_id
from orchestrator.bench.place import commit_ms, machine, own_database
from state.events import Dataset, DatasetStatus, Outgoing, OutgoingStatus
from state.job import Job, JobRequest, Status
from state.lease import Lease, LeaseStatus
from tasks.reconcile import reconcile

BAR = 1.3
WARM = 6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Jobs in each database."""

    few: int = 1_000
    many: int = 10_000
    finished: int = 100_000
    due: int = 100


def run(
    database_url: str,
    *,
    passes: int = 40,
    sizes: Sizes = Sizes(),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure in databases of its own on the server of `database_url`, which are dropped after.

    Returns: what it ran on; `cases` (ms per pass); `limits`: single-row commits, and what the
    pass's transactions cost when each is only that; `ratios` to a pass over few active jobs,
    medians over the turns, and of the fastest passes alone; `bar`.
    """
    with contextlib.ExitStack() as stack:
        filled = [("few", sizes.few, 0), ("many", sizes.many, 0)]
        filled.append(("finished", sizes.few, sizes.finished))
        cases = []
        for name, active, finished in filled:
            say(f"filling: {active} active jobs, {sizes.due} of them due, {finished} finished")
            url = stack.enter_context(own_database(database_url))
            case = Case(name, url, active, finished, sizes.due)
            stack.callback(case.store.close)
            case.fill()
            cases.append(case)
        _settle(database_url)
        ran_on = machine(database_url)
        commit = commit_ms(cases[0].url)
        say(f"{passes} passes over each, in turn")
        for turn in range(WARM + passes):
            for case in cases if turn % 2 else reversed(cases):
                case.one_pass(keep=turn >= WARM)
        few, many, old = cases
        transactions = cases[0].transactions
        return {
            "ran_on": ran_on,
            "cases": {case.name: case.figures() for case in cases},
            "limits": {
                "commit_ms": round(commit, 3),
                "transactions": transactions,
                "commits_alone_ms": round(transactions * commit, 2),
            },
            "ratios": {
                "many_to_few": _ratio(many, few),
                "finished_to_none": _ratio(old, few),
                "many_to_few_fastest": round(min(many.took) / min(few.took), 3),
                "finished_to_none_fastest": round(min(old.took) / min(few.took), 3),
                "few_to_commits_alone": round(1000 * few.median / (transactions * commit), 2),
            },
            "bar": {"many_to_few": BAR},
        }


def _ratio(case: Case, other: Case) -> float:
    return round(statistics.median(a / b for a, b in zip(case.took, other.took, strict=True)), 3)


def _settle(url: str) -> None:
    """What the filling left to be written is written now, not under the passes."""
    with (
        psycopg.connect(url, autocommit=True) as connection,
        contextlib.suppress(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("CHECKPOINT")


@dataclass
class Case:
    """One database: `active` jobs, `due` of them due, `finished` ones beside."""

    name: str
    url: str
    active: int
    finished: int
    due: int
    took: list[float] = field(default_factory=list)
    woken: list[tuple[str, Sequence[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = SqlStore(self.url, SecretBox([SecretBox.new_key()]))
        self.now = datetime.now(UTC)

    @property
    def median(self) -> float:
        return statistics.median(self.took)

    @property
    def transactions(self) -> int:
        """Of one pass: two claims, and one for each job whose next look is moved ahead."""
        return 2 + self.due - self.due // 2

    def figures(self) -> dict[str, Any]:
        counts = {"active": self.active, "due": self.due, "finished": self.finished}
        times = {"median": self.median, "min": min(self.took), "max": max(self.took)}
        return counts | {f"{name}_ms": round(1000 * value, 2) for name, value in times.items()}

    def one_pass(self, *, keep: bool) -> None:
        """Make all due again, and time a pass. Raises: RuntimeError, it found other work."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                "UPDATE jobs SET due_at = %s WHERE metadata @> %s",
                (self.now - timedelta(seconds=1), '{"due": "yes"}'),
            )
        self.woken.clear()
        began = time.perf_counter()
        found = reconcile(self.store, self._wake, self.now)
        took = time.perf_counter() - began
        if found.jobs != self.due or found.total != self.due:
            raise RuntimeError(f"the pass found {found}, not the {self.due} jobs that are due")
        if keep:
            self.took.append(took)

    def _wake(self, task: str, ids: Sequence[str]) -> None:
        self.woken.append((task, ids))

    # filling: one pattern of each kind goes through the store, and SQL makes the others of it

    def fill(self) -> None:
        """Half of the due jobs wait for a GPU and want a wake-up; the others train, and want a
        later look. Every tenth active job has a webhook whose retry comes later."""
        patterns = self._patterns()
        waiting = self.due // 2
        later = self.now + timedelta(hours=1)
        training = self.active - waiting
        with psycopg.connect(self.url, autocommit=True) as connection:
            if waiting:
                _multiply(connection, patterns[Status.PENDING_GPU], 1, waiting, later)
            _multiply(connection, patterns[Status.TRAINING], waiting + 1, training, later)
            if self.finished:
                _multiply(
                    connection, patterns[Status.COMPLETED], self.active + 1, self.finished, None
                )
            for table in ("jobs", "leases", "outgoing"):
                connection.execute(
                    f"DELETE FROM {table} WHERE id LIKE 'pattern%'".encode()  # noqa: S608 -- ours
                )
            due = [
                waiting + 1 + n * training // (self.due - waiting)
                for n in range(self.due - waiting)
            ]
            connection.execute(
                "UPDATE jobs SET metadata = %s WHERE id = ANY(%s)",
                ('{"due": "yes"}', [_name(n) for n in (*range(1, waiting + 1), *due)]),
            )
            connection.execute("VACUUM (ANALYZE)")

    def _patterns(self) -> Mapping[Status, str]:
        now, names = self.now, {}
        with self.store.transaction() as tx:
            tx.add_dataset(
                Dataset(id=new_id("ds", now), owner="bench", created_at=now).evolve(
                    status=DatasetStatus.READY
                )
            )
            for status in (Status.PENDING_GPU, Status.TRAINING, Status.COMPLETED):
                names[status] = f"pattern_{status}"
                over = status is Status.COMPLETED
                rented = status is not Status.PENDING_GPU
                job = Job(
                    id=names[status],
                    owner="bench",
                    request=JobRequest(
                        dataset_id="ds",
                        base="civitai:1",
                        webhook_url="https://bench.invalid/hook",
                    ),
                    created_at=now,
                    entered_at=now,
                    status=status,
                    dataset_ready=True,
                    deadline_at=None if over else now + timedelta(hours=2),
                    last_heard_at=now - timedelta(seconds=10) if rented else None,
                    finished_at=now if over else None,
                )
                tx.add_job(job)
                if rented:
                    tx.add_lease(_lease(job, now))
                tx.add_outgoing([_outgoing(job, seq, now) for seq in (1, 2, 3)])
        return names


def _lease(job: Job, now: datetime) -> Lease:
    over = job.status is Status.COMPLETED
    return Lease(
        id=job.id,
        job=job.id,
        attempt=1,
        label=f"bench/{job.id}/1",
        created_at=now,
        expires_at=now + timedelta(hours=12),
        status=LeaseStatus.RELEASED if over else LeaseStatus.RENTED,
        offer_id="1",
        machine_id="1",
        gpu_name="RTX 4090",
        geo="",
        price=400_000,
        storage_price=0,
        instance_id="1",
        rented_at=now,
        released_at=now if over else None,
        due_at=None if over else now + timedelta(hours=12),
        why="a bench",
    )


def _outgoing(job: Job, seq: int, now: datetime) -> Outgoing:
    payload = {"type": "job.training", "data": {"job": job.id, "seq": seq}}
    return Outgoing(
        id=f"{job.id}.{seq}",
        job=job.id,
        seq=seq,
        type="job.training",
        created_at=now,
        payload=payload,
        status=OutgoingStatus.DELIVERED,
    )


def _name(number: int) -> str:
    return f"job_{number:08d}"


def _multiply(
    connection: psycopg.Connection[Any], pattern: str, first: int, count: int, due: datetime | None
) -> None:
    """`count` jobs like `pattern`, numbered from `first`, with their leases and webhooks."""
    values = {"pattern": pattern, "first": first, "last": first + count - 1, "due": due}
    name = "'job_' || lpad(n::text, 8, '0')"
    # due times lie apart, as those of real jobs do
    due_at = "%(due)s::timestamptz + n * interval '1 ms'"
    changes = {
        "jobs": f"'id', {name}, 'due_at', {due_at}",
        "leases": f"'id', {name}, 'job', {name}, 'label', {name}",
        "outgoing": f"'id', {name} || '.' || pattern.seq, 'job', {name}",
    }
    for table, changed in changes.items():
        key = "id" if table == "jobs" else "job"
        connection.execute(
            f"INSERT INTO {table} SELECT made.* FROM {table} AS pattern"  # noqa: S608 -- our own names
            " CROSS JOIN generate_series(%(first)s::int, %(last)s::int) AS n"
            f" CROSS JOIN LATERAL jsonb_populate_record(pattern, jsonb_build_object({changed}))"
            f" AS made WHERE pattern.{key} = %(pattern)s".encode(),
            values,
        )
    if due is not None:
        connection.execute(
            "UPDATE outgoing SET status = 'waiting', due_at = %(due)s WHERE seq = 3"
            " AND right(job, 1) = '0' AND job >= %(from)s AND job <= %(to)s",
            {"due": due, "from": _name(first), "to": _name(first + count - 1)},
        )
