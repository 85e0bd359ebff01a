"""Reports to the server: kept on disk, numbered, signed, sent in order until acknowledged.

A report gets its number when it is first sent, not when it is made. So progress that waits can
be merged with newer progress of its kind without leaving a gap, and what was once sent under a
number stays what it was: number and bytes are on disk before the first try, and after a crash
the same bytes go out again under the same webhook-id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import requests

from gpu_agent.clock import Clock
from gpu_agent.halt import Halt
from gpu_agent.wire import MAX_BODY, Fact, JobSpec, Order, Report, orders_from_bytes, sign

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Of these the latest counts; those that wait are merged.
MERGED = frozenset(
    {
        Fact.IMAGES_PROGRESS,
        Fact.MODEL_PROGRESS,
        Fact.TRAINING_PROGRESS,
        Fact.LOG_LINES,
        Fact.HEARTBEAT,
    }
)
#: These say how far everything moved.
COUNTED = frozenset(
    {Fact.IMAGES_PROGRESS, Fact.MODEL_PROGRESS, Fact.TRAINING_PROGRESS, Fact.HEARTBEAT}
)
#: Lists of which a merge keeps both parts, and how many of the newest items.
SERIES = {"points": 5_000, "lines": 200}
#: A report that grew past this is left as it is and a new one begun (bytes).
FULL = MAX_BODY // 4
#: Waits between tries (seconds); the last one repeats.
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
#: Connecting, and waiting for each part of an answer (seconds).
TIMEOUT = (10.0, 30.0)
LONGEST_RETRY_AFTER = 300.0


def cleaned(value: Any) -> Any:
    """`value` as JSON and every database can keep it: no NaN, no infinity, no NUL, no surrogate."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.replace("\x00", "").encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {cleaned(str(key)): cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item) for item in value]
    return value


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    for key, most in SERIES.items():
        parts = [part.get(key) for part in (old, new)]
        if all(isinstance(part, list) for part in parts):
            both[key] = [*old[key], *new[key]][-most:]
    return both


def _fitting(data: dict[str, Any]) -> dict[str, Any]:
    """`data`, without its series where they alone would make the report too long to be taken."""
    if len(json.dumps(data)) < MAX_BODY // 2:
        return data
    return {key: value for key, value in data.items() if key not in SERIES}


class Spool:
    """Reports that wait, in an SQLite file. Safe to use from several threads.

    When the disk is full it goes on in memory and removes the file: numbers must never be
    handed out twice, and a restart without the file asks the server anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._db = self._opened(str(path))
        except sqlite3.OperationalError as error:
            log.warning("the spool begins in memory: %s", error)
            self._db = self._opened(":memory:")

    def _opened(self, path: str) -> sqlite3.Connection:
        """Raises: sqlite3.OperationalError."""
        db = sqlite3.connect(path, check_same_thread=False)
        # one wait for the disk per commit instead of three, and as safe with synchronous=FULL
        db.execute("PRAGMA journal_mode = WAL")
        with db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY, seq INTEGER UNIQUE,"
                " type TEXT NOT NULL, at REAL NOT NULL, data TEXT NOT NULL)"
            )
            db.execute("CREATE TABLE IF NOT EXISTS counter (last INTEGER NOT NULL)")
            db.execute("INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM counter)")
        return db

    def put(self, fact: Fact, data: Mapping[str, Any], at: float) -> None:
        with self._lock:
            if not self._closed:
                self._durably(lambda: self._put(fact, data, at))

    def first(self, is_due: Callable[[Fact], bool]) -> tuple[int, Fact, float, dict[str, Any]]:
        """The next report to send, numbered now if it was not: seq, fact, at, data.

        Progress that is not due is passed over, unless something that cannot wait is behind it:
        then all goes out in the order in which it happened.

        Raises:
            LookupError: nothing is to be sent now.
        """
        with self._lock:
            return self._durably(lambda: self._first(is_due))

    def drop(self, seq: int) -> None:
        """Forget an acknowledged (or refused) report."""
        with self._lock:
            self._durably(lambda: self._drop(seq))

    def waiting(self) -> int:
        with self._lock:
            if self._closed:
                return 0
            (count,) = self._db.execute("SELECT count(*) FROM outbox").fetchone()
            return int(count)

    def close(self) -> None:
        """Keep nothing more; what is on disk stays there. Late `put`s do nothing."""
        with self._lock:
            self._closed = True
            self._db.close()

    def _durably(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except sqlite3.OperationalError as error:
            log.warning("the spool goes on in memory: %s", error)
            self._to_memory()
            return work()

    def _to_memory(self) -> None:
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.backup(memory)
        self._db.close()
        self._db = memory
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _put(self, fact: Fact, data: Mapping[str, Any], at: float) -> None:
        with self._db:
            if fact in MERGED:
                row = self._db.execute(
                    "SELECT id, data FROM outbox WHERE type = ? AND seq IS NULL"
                    " ORDER BY id DESC LIMIT 1",
                    (str(fact),),
                ).fetchone()
                if row is not None and len(row[1]) < FULL:
                    data = _merged(json.loads(row[1]), data)
                    self._db.execute("DELETE FROM outbox WHERE id = ?", (row[0],))
            self._db.execute(
                "INSERT INTO outbox (type, at, data) VALUES (?, ?, ?)",
                (str(fact), at, json.dumps(data)),
            )

    def _first(self, is_due: Callable[[Fact], bool]) -> tuple[int, Fact, float, dict[str, Any]]:
        rows = self._db.execute("SELECT id, seq, type FROM outbox ORDER BY id").fetchall()
        numbered = [row for row in rows if row[1] is not None]
        urgent = any(Fact(row[2]) not in MERGED for row in rows)
        due = numbered or [row for row in rows if urgent or is_due(Fact(row[2]))]
        if not due:
            raise LookupError("nothing is to be sent now")
        number, seq, kind = due[0]
        if seq is None:
            seq = self._number(number)
        at, data = self._db.execute(
            "SELECT at, data FROM outbox WHERE id = ?", (number,)
        ).fetchone()
        return seq, Fact(kind), at, json.loads(data)

    def _number(self, row: int) -> int:
        """Give a report its number, for good."""
        with self._db:
            (last,) = self._db.execute("SELECT last FROM counter").fetchone()
            self._db.execute("UPDATE counter SET last = ?", (last + 1,))
            self._db.execute("UPDATE outbox SET seq = ? WHERE id = ?", (last + 1, row))
        return int(last) + 1

    def _drop(self, seq: int) -> None:
        with self._db:
            self._db.execute("DELETE FROM outbox WHERE seq = ?", (seq,))


class Reporter:
    """The thread that sends what is in the spool, and a heartbeat when none of it says how far
    the work moved.

    Args:
        on_order: called with every order that an answer brings, on the reporter's thread.
        on_heard: called whenever the server itself answered, so that silence can be measured.
        status: what a heartbeat says.
        moved: how far the work moved, as `Moved` counts it.
        log_lines: takes the lines that were logged since it was last asked.
    """

    def __init__(
        self,
        spec: JobSpec,
        spool: Spool,
        *,
        clock: Clock,
        halt: Halt,
        on_order: Callable[[Order], None],
        on_heard: Callable[[], None],
        status: Callable[[], Mapping[str, Any]] = dict,
        moved: Callable[[], int] = int,
        log_lines: Callable[[], list[str]] = list,
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self._spec, self._spool, self._clock, self._halt = spec, spool, clock, halt
        self._on_order, self._on_heard, self._status = on_order, on_heard, status
        self._moved, self._log_lines, self._delays = moved, log_lines, delays
        #: The facts that the server has taken.
        self.taken: set[Fact] = set()
        self._session = requests.Session()
        self._session.trust_env = False  # neither a netrc nor a proxy of the image's maker
        self._wake = threading.Condition()
        self._closed = False
        self._flushing = False
        self._news = False
        self._counted_at = clock.monotonic()
        self._sent: dict[Fact, float] = {}
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, fact: Fact, data: Mapping[str, Any] | None = None) -> None:
        """Keep a report for sending; returns as soon as it is on disk."""
        self._keep(fact, data or {})
        with self._wake:
            self._news = True
            self._wake.notify_all()

    def _keep(self, fact: Fact, data: Mapping[str, Any]) -> None:
        if fact in COUNTED:
            data = {**data, "moved": self._moved()}
        self._spool.put(fact, _fitting(cleaned(data)), self._clock.now())

    def flush(self, seconds: float) -> bool:
        """Send all that waits without regard to pace; whether all was acknowledged in time.

        From now on no lines of the log are added: there would be no end.
        """
        deadline = self._clock.monotonic() + seconds
        with self._wake:
            self._flushing = self._news = True
            self._wake.notify_all()
            while self._spool.waiting() and not self._closed:
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(min(left, 1.0))
        return not self._closed and self._spool.waiting() == 0

    def close(self) -> None:
        """Send no more. A request in flight is left to its timeout."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _run(self) -> None:
        with contextlib.closing(self._spool):
            self._send_all()

    def _send_all(self) -> None:
        while not self._closed:
            with self._wake:
                self._news = False
            self._collect_log()
            self._beat()
            try:
                seq, fact, at, data = self._spool.first(self._is_due)
            except LookupError:
                self._idle()
                continue
            spec = self._spec
            self._deliver(
                Report(job=spec.job, attempt=spec.attempt, seq=seq, type=fact, at=at, data=data)
            )
            with self._wake:
                self._wake.notify_all()

    def _collect_log(self) -> None:
        if not self._flushing and (lines := self._log_lines()):
            self._keep(Fact.LOG_LINES, {"lines": lines})

    def _beat(self) -> None:
        """A heartbeat, where nothing else said for long how far the work moved."""
        now = self._clock.monotonic()
        if now - self._counted_at >= self._spec.heartbeat_s:
            self._counted_at = now
            self._sent.pop(Fact.HEARTBEAT, None)
            self._keep(Fact.HEARTBEAT, self._status())

    def _is_due(self, fact: Fact) -> bool:
        last = self._sent.get(fact)
        return (
            self._flushing
            or last is None
            or self._clock.monotonic() - last >= self._spec.progress_s
        )

    def _idle(self) -> None:
        """Wait for a report, for progress to come due, or for the heartbeat."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._news or self._closed,
                min(1.0, self._spec.heartbeat_s, max(self._spec.progress_s, 0.01)),
            )

    def _deliver(self, report: Report) -> None:
        tries = 0
        while not self._closed:
            self._sent[report.type] = self._clock.monotonic()
            if report.type in COUNTED:
                self._counted_at = self._sent[report.type]
            done, wait = self._send(report)
            if done:
                self._spool.drop(report.seq)
                return
            delay = self._delays[min(tries, len(self._delays) - 1)]
            tries += 1
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closed, max(delay * (0.8 + 0.4 * random.random()), wait)
                )

    def _send(self, report: Report) -> tuple[bool, float]:
        """One try: whether the report is done with, and how long the server wants us to wait."""
        body = report.to_bytes()
        headers = sign(
            body,
            secrets=[self._spec.secret],
            webhook_id=report.webhook_id,
            at=self._clock.now(),
        )
        try:
            answer = self._session.post(
                self._spec.report_url,
                data=body,
                headers={**headers, "content-type": "application/json"},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            # never the error's text: it holds addresses, and addresses hold signatures
            log.warning("report %d: %s", report.seq, type(error).__name__)
            return False, 0.0
        return self._read(report, answer)

    def _read(self, report: Report, answer: requests.Response) -> tuple[bool, float]:
        status = answer.status_code
        if 200 <= status < 300:
            self._on_heard()
            self.taken.add(report.type)
            for order in orders_from_bytes(answer.content):
                self._on_order(order)
            return True, 0.0
        log.warning("report %d (%s): answered with %d", report.seq, report.type, status)
        if status == 401:
            self._clock.learn(answer.headers.get("date"))
        elif status == 410:
            self._halt.call("gone")
            self.close()
        elif status in (413, 422):
            self._on_heard()
            return True, 0.0
        elif status == 429:
            self._on_heard()
        return False, retry_after(answer)


def retry_after(answer: requests.Response) -> float:
    """Seconds that the answer asks us to wait; 0 when it does not say."""
    text = answer.headers.get("retry-after", "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return 0.0
    return min(float(text), LONGEST_RETRY_AFTER)
