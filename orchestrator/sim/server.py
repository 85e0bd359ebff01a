"""The server's side of the wire, and the stores behind it, with the ways in which they fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from gpu_agent import wire
from gpu_agent.wire import Order
from orchestrator.attempt_auth import AttemptAuth
from orchestrator.sim.invariants import Checker
from orchestrator.sim.kernel import Crash, Kernel
from state import record
from state.errors import AttemptOver, NotFound, StorageError, TokenRefused
from state.events import Secret
from state.memory import Changes, MemoryStore, MemoryTransaction
from state.policy import Policy
from tasks.verify import attempt_key, result_key


class Store(MemoryStore):
    """The store in memory, whose users may die or be kept waiting before and after a commit."""

    def __init__(self, watch: Callable[[Changes], None], boundary: Callable[[str], None]) -> None:
        super().__init__(watch)
        self._boundary = boundary
        #: Somebody is within a transaction.
        self.within = False

    def begin(self) -> MemoryTransaction:
        self._boundary("before a transaction")
        self.within = True
        return super().begin()

    def finish(self, transaction: MemoryTransaction, *, commit: bool) -> None:
        died: Crash | None = None
        if commit:
            try:
                self._boundary("before the commit")
            except Crash as crash:
                died = crash
        self.within = False
        super().finish(transaction, commit=commit and died is None)
        if died is not None:
            raise died
        if commit:
            self._boundary("after the commit")


class Storage:
    """The part of `infra.storage` that verifying uses; a wrong checksum stands for any damage."""

    def __init__(self, hit: Callable[[str], bool], boundary: Callable[[str], None]) -> None:
        self._hit, self._boundary = hit, boundary
        self._objects: dict[str, bytes] = {}

    def upload(self, job: str, attempt: int, name: str, body: bytes) -> None:
        """By an agent, through a presigned URL."""
        self._objects[attempt_key(job, attempt, name)] = body

    def verify(self, key: str, *, bytes: int, sha256: str) -> None:
        body = self._at(key)
        if (len(body), hashlib.sha256(body).hexdigest()) != (bytes, sha256):
            raise StorageError(f"{key} is something else", code="checksum", retryable=False)

    verify_safetensors = verify

    def copy(self, source: str, target: str) -> None:
        self._objects[target] = self._at(source)

    def wrong_with(self, job: str) -> str:
        """What is wrong with a completed job's result; empty when it is what was trained."""
        body = self._objects.get(result_key(job, "lora.safetensors"), b"")
        if not body:
            return "completed, and there is no result"
        return (
            ""
            if body.startswith(f"weights of {job}.".encode()) and body[-1:] != b"!"
            else ("completed, and its result is damaged")
        )

    def _at(self, key: str) -> bytes:
        self._boundary("before storage")
        if self._hit("storage.fails"):
            raise StorageError("the object store does not answer")
        if key not in self._objects:
            raise NotFound(f"{key} is not in the store")
        return self._objects[key]


class Server:
    """What agents talk to. An answer of 0 is none: the connection was cut, or nobody listened."""

    def __init__(
        self,
        kernel: Kernel,
        store: Store,
        rules: Policy,
        checker: Checker,
        wake: Callable[[str, list[str]], None],
        as_process: Callable[[bool], bool],
    ) -> None:
        self.kernel, self.store, self.rules, self.checker = kernel, store, rules, checker
        self._wake, self._as_process = wake, as_process
        self._auth = AttemptAuth(store, self.clock)
        #: How much this process's clock is ahead of the others' (seconds).
        self.skew = 0.0
        self.down = False
        #: Since when, without a break, somebody listens.
        self.listens_since = kernel.t
        self.taken = self.known_twice = self.refused = 0
        self._secrets = 0

    def clock(self) -> datetime:
        return self.kernel.now() + timedelta(seconds=self.skew)

    def hello(self, token: str, nonce: str, machine: str) -> tuple[int, Mapping[str, Any]]:
        """As `orchestrator.agent_api` does it. Crashes are no answer."""
        if self.down:
            return 0, {}
        before = self._as_process(True)
        try:
            return self._hello(token, nonce, machine)
        except Crash:
            return 0, {}
        finally:
            self._as_process(before)

    def _hello(self, token: str, nonce: str, machine: str) -> tuple[int, Mapping[str, Any]]:
        hashed = hashlib.sha256(token.encode()).hexdigest()
        try:
            with self.store.transaction() as tx:
                now = self.clock()
                seen = record.knock(tx, hashed, nonce, now, lock=True)
                secret = record.admit(
                    tx,
                    seen,
                    nonce=nonce,
                    secret=Secret(self._new_secret()),
                    now=now,
                    machine={"machine_id": machine},
                    rules=self.rules,
                )
        except TokenRefused:
            with self.store.transaction() as tx:
                job = record.token_reused(tx, hashed, nonce, self.clock(), self.rules)
            if job is not None:
                self._wake_all(job.id, record.wakes(job))
            return 401, {}
        except AttemptOver:
            return 410, {}
        self.kernel.note(seen.job.id, f"hello from {seen.lease.id}")
        self._wake_all(seen.job.id, ("deallocate",))
        return 200, {
            "job": seen.job.id,
            "attempt": seen.attempt.number,
            "secret": secret.reveal(),
            "lease_ends_at": (seen.lease.expires_at - _EPOCH).total_seconds(),
        }

    def _new_secret(self) -> str:
        """A secret that is the same in every run of a seed."""
        self._secrets += 1
        return wire.SECRET_PREFIX + f"{self._secrets:040d}"

    def report(
        self, job: str, attempt: int, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[int, tuple[Order, ...]]:
        """As `orchestrator.webhook` does it: verify, read, apply, commit, answer."""
        status, orders, _ = self.judge(job, attempt, raw, headers)
        return status, orders

    def judge(
        self, job: str, attempt: int, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[int, tuple[Order, ...], int]:
        """The answer to a report, and how many rows it changed."""
        if self.down:
            return 0, (), 0
        before = self._as_process(True)
        try:
            return self._judge(job, attempt, raw, headers)
        except Crash:
            return 0, (), 0
        finally:
            self._as_process(before)

    def _judge(
        self, job: str, attempt: int, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[int, tuple[Order, ...], int]:
        try:
            name = self._auth.verify(job, attempt, raw, headers)
            report = wire.Report.from_bytes(raw)
            if (report.job, report.attempt, report.webhook_id) != (job, attempt, name):
                return 422, (), 0
            with self.store.transaction() as tx:
                taken = record.take_reports(tx, [report], self.clock(), self.rules)[0]
                wrote = len(tx.changes())
        except wire.SignatureError:
            self.refused += 1
            return 401, (), 0
        except wire.WireError:
            return 422, (), 0
        outcome = taken.outcome.value
        self.checker.answered(name, job, outcome, wrote)
        self._count(outcome)
        self._wake_all(job, taken.wake)
        self.kernel.note(job, f"{report.type} {name} {outcome}")
        if outcome in ("stale", "unknown_job"):
            return 410, (), wrote
        return 200, taken.orders, wrote

    def _count(self, outcome: str) -> None:
        self.taken += outcome == "applied"
        self.known_twice += outcome == "duplicate"

    def _wake_all(self, job: str, tasks: tuple[str, ...]) -> None:
        for task in tasks:
            self._wake(task, [job])


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
