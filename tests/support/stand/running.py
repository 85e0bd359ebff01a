"""A running Stoker, and what a test asks of it: shared by the end-to-end and the chaos tests."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_agent import wire
from infra.provider import Instance
from infra.wiring import Services
from orchestrator.cli.client import Client
from orchestrator.cli.demo import TINY_RECIPE
from orchestrator.cli.follow import ENDED
from orchestrator.cli.receiver import Receiver
from orchestrator.cli.stage import TINY_FILE, Stage, descendants
from state.errors import StoreUnavailable
from state.job import Job
from state.lease import Lease


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """What `condition` brings as soon as that is true; fails, saying `what`, when it is late."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StoreUnavailable):  # a database that was killed comes back
            if got := condition():
                return got
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.02)


class Stoker:
    """A running Stoker, as its customer and as its operator sees it."""

    def __init__(self, stage: Stage, client: Client, services: Services, dataset: str) -> None:
        self.stage, self.client, self.services = stage, client, services
        #: A dataset of four photographs, ready.
        self.dataset = dataset

    # --- the customer's side

    def order(self, receiver: Receiver | None = None, **changes: Any) -> str:
        """Order a training; the job's id."""
        body: dict[str, Any] = {
            "dataset_id": self.dataset,
            "base": TINY_FILE,
            "recipe": TINY_RECIPE,
            **changes,
        }
        if receiver is not None:
            body["webhook"] = {"url": receiver.url, "secret": receiver.secret}
        return str(self.client.post("/v1/jobs", body)["id"])

    def show(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/jobs/{job_id}"))

    def ended(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        """The job, once it is completed, failed or cancelled."""
        until(lambda: self.job(job_id).status in ENDED, f"the end of {job_id}", seconds)
        return self.show(job_id)

    # --- the operator's side: the database and the market, whatever happens to the web process

    def job(self, job_id: str) -> Job:
        with self.services.store.transaction() as tx:
            return tx.job(job_id)

    def leases(self, job_id: str) -> list[Lease]:
        with self.services.store.transaction() as tx:
            return tx.leases_of(job_id)

    def instances(self, job_id: str = "") -> list[Instance]:
        """What the market shows of this job, or of all."""
        prefix = f"{self.services.settings.deployment}/{job_id}"
        listed = self.services.provider.instances()
        return [item for item in listed if item.label.startswith(prefix)]

    def given_back(self, job_id: str) -> None:
        """Wait until the market and we agree that the job has no machine."""

        def gone() -> bool:
            leases = self.leases(job_id)
            return not any(lease.open for lease in leases) and not self.instances(job_id)

        until(gone, f"{job_id} has no instance left", 120.0)

    def pids(self) -> dict[str, int]:
        assert self.stage.servers is not None
        return self.stage.servers.pids

    def kill(self, name: str) -> int | None:
        """SIGKILL for web, worker, beat …, which the supervisor starts again; the process id."""
        pid = self.pids().get(name)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def orphans(self) -> set[int]:
        """Processes of this Stoker that nobody here would end."""
        top = self.pids()["supervisor"]
        return set(running_from(self.stage.root)) - descendants(top) - {top}

    def machines_ever(self) -> set[str]:
        """Ids of all instances that ever ran: the sandbox keeps a log of each."""
        return {path.stem for path in (self.stage.root / "sandbox" / "logs").glob("*.log")}

    def machine(self, job_id: str) -> frozenset[int]:
        """The processes of the machine that the job runs on."""
        label = f"{self.services.settings.deployment}/{job_id}/"
        (instance,) = (item for item in self.instances() if item.label.startswith(label))
        folder = self.machine_folder(instance)
        tops = [
            pid
            for pid in descendants(self.pids()["sandbox"])
            if str(folder).encode() in argv_of(pid)
        ]
        return frozenset(tops).union(*(descendants(pid) for pid in tops))

    def machine_folder(self, instance: Instance) -> Path:
        return self.stage.root / "sandbox" / "machines" / instance.id


def argv_of(pid: int) -> list[bytes]:
    """The arguments of a process; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def running_from(folder: Path) -> list[int]:
    """Processes that were given something below `folder`, whoever their parent is by now."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            given = (place / "environ").read_bytes() + (place / "cmdline").read_bytes()
            if str(folder).encode() in given and int(place.name) != os.getpid():
                found.append(int(place.name))
    return sorted(found)


class Customer(Receiver):
    """A webhook receiver that knows its own secret."""

    def __init__(self) -> None:
        self.secret = wire.new_secret()
        super().__init__(self.secret)
