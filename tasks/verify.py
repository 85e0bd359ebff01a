"""Reading back what the agent uploaded, before anybody is told that it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.storage import Storage
from state import policy, record
from state.errors import IllegalMove, NotFound, StorageError
from state.events import Artefact
from state.job import Job, Reason
from state.policy import Policy
from state.store import Store


def attempt_key(job: str, attempt: int, name: str) -> str:
    """Where an attempt may upload a file."""
    return f"jobs/{job}/attempts/{attempt}/{name}"


def result_key(job: str, name: str) -> str:
    """Where a verified file is kept: no agent ever had a URL for it."""
    return f"jobs/{job}/result/{name}"


@dataclass(frozen=True, kw_only=True)
class Verifier:
    store: Store
    storage: Storage
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT

    def verify(self, job_id: str) -> bool:
        """Check the uploaded files of a job that waits for it; whether it is completed now.

        What does not check out stalls the job, to be tried on another machine. A store or
        storage that cannot be reached raises, and the job stays due.
        """
        with self.store.transaction() as tx:
            try:
                job = tx.job(job_id)
            except NotFound:
                return False
        if not policy.to_verify(job):
            return False
        try:
            artefacts = [self._checked(job, item) for item in _claimed(job)]
        except NotFound as error:
            return self._refuse(job, f"a result file is missing: {error}")
        except StorageError as error:
            if error.retryable:
                raise
            return self._refuse(job, str(error))
        if not any(item.name.endswith(".safetensors") for item in artefacts):
            return self._refuse(job, "the agent uploaded no weights")
        try:
            with self.store.transaction() as tx:
                record.verified(tx, job.id, job.attempt, self.clock(), self.rules)
                tx.put_artefacts(artefacts)
        except IllegalMove:
            return False  # cancelled, or verified by another worker, meanwhile
        return True

    def _checked(self, job: Job, claim: Mapping[str, Any]) -> Artefact:
        name, size, sha256 = claim["name"], claim["bytes"], claim["sha256"]
        target = result_key(job.id, name)
        # Our copy is what is looked at: the agent's URL may still put something else at the source.
        self.storage.copy(attempt_key(job.id, job.attempt, name), target)
        if name.endswith(".safetensors"):
            self.storage.verify_safetensors(target, bytes=size, sha256=sha256)
        else:
            self.storage.verify(target, bytes=size, sha256=sha256)
        return Artefact(
            job=job.id,
            name=name,
            attempt=job.attempt,
            key=target,
            bytes=size,
            sha256=sha256,
            created_at=self.clock(),
            verified=True,
        )

    def _refuse(self, job: Job, why: str) -> bool:
        reason = Reason(code="weights.invalid", message=why)
        try:
            with self.store.transaction() as tx:
                record.stall(tx, job.id, reason, self.clock(), self.rules)
        except IllegalMove:
            pass
        return False


def _claimed(job: Job) -> list[Mapping[str, Any]]:
    """The files that the agent says it uploaded. Raises: StorageError, for any nonsense."""
    files = job.progress.get("upload", {}).get("files")
    if not isinstance(files, list) or not files or len(files) > 1000:
        raise StorageError("the agent named no result files", retryable=False)
    for item in files:
        fine = (
            isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("bytes"), int)
            and isinstance(item.get("sha256"), str)
            and ".." not in item["name"]
        )
        if not fine:
            raise StorageError("the agent's list of result files cannot be read", retryable=False)
    return files
