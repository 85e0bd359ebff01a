"""The storm, its length given by `--chaos-rounds`; what came of it is printed at the end."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpu_agent.wire import Fact
from orchestrator.cli.demo import skimage_photos
from stand import audit
from stand.protocol_trainer import FLOATS
from stand.running import running_from, until
from stand.storm import Storm
from state.events import Artefact, Event, Outgoing
from state.job import Job, Status
from state.lease import Lease

HERE = Path(__file__).parent
#: From here on a run is long: real trainers take part, and what needs more than a minute to heal.
LONG = 40
REAL_EVERY = 10
#: For the jobs that are under way at the end (seconds): three attempts, each noticed when silent.
SETTLE_S = 600.0
_REPORT = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@dataclass(frozen=True)
class Aftermath:
    """All that was written down of a storm, by each side."""

    rounds: int
    storm: Storm
    jobs: dict[str, Job]
    events: dict[str, list[Event]]
    owed: dict[str, list[Outgoing]]
    leases: list[Lease]
    artefacts: dict[str, list[Artefact]]
    rentals: list[audit.Rental]
    seconds: float

    @property
    def lost(self) -> list[str]:
        kept = [event for events in self.events.values() for event in events]
        return audit.lost_reports(
            (item.report for item in self.storm.front.acknowledged.values()), kept
        )

    @property
    def illegal(self) -> list[str]:
        return [
            fault
            for job in self.jobs.values()
            for fault in audit.illegal_steps(job, self.events[job.id])
        ]

    @property
    def unheard(self) -> list[str]:
        return [
            fault
            for job in self.jobs.values()
            for fault in audit.unheard_webhooks(job, self.owed[job.id], self.storm.heard(job.id))
        ]

    @property
    def really_trained(self) -> set[str]:
        """Jobs that the real trainer had in hand."""
        return {
            event.job
            for events in self.events.values()
            for event in events
            if event.type == Fact.TRAINING_STARTED and event.data.get("parameters") != FLOATS
        }

    @property
    def outlived(self) -> dict[str, float]:
        return audit.outlived(self.rentals, self.jobs)

    def report(self) -> dict[str, Any]:
        storm = self.storm
        front = storm.front.acknowledged.values()
        ended_badly = [job for job in self.jobs.values() if job.status is not Status.COMPLETED]
        return {
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "kills": dict(storm.killed.most_common()),
            "troubles": dict(storm.troubled.most_common()),
            "jobs": Counter(str(job.status) for job in self.jobs.values()),
            "failed_why": Counter(job.reason.code if job.reason else "" for job in ended_badly),
            "attempts": Counter(str(job.attempt) for job in self.jobs.values()),
            "really_trained": len(self.really_trained),
            "instances": len(self.rentals),
            "acknowledged": len(front),
            "acknowledged_again": sum(item.times > 1 for item in front),
            "lost": len(self.lost),
            "illegal": len(self.illegal),
            "webhooks": len(storm.witness.got),
            "webhooks_again": sum(count > 1 for count in storm.witness.times.values()),
            "unheard": len(self.unheard),
            "orphan_max_s": round(max(self.outlived.values(), default=0.0), 1),
            "slowest_recovery_s": {
                name: round(took, 1) for name, took in sorted(storm.slowest.items())
            },
        }


@pytest.fixture(scope="module")
def aftermath(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Aftermath]:
    option = request.config.getoption
    rounds, seed = option("--chaos-rounds"), option("--chaos-seed")
    root = tmp_path_factory.mktemp("storm")
    storm = Storm(
        root,
        skimage_photos(tmp_path_factory.mktemp("photos")),
        in_flight=option("--chaos-jobs"),
        real_every=REAL_EVERY if rounds >= LONG else 0,
        dice=random.Random(seed),
    )
    print(f"--chaos-rounds {rounds} --chaos-seed {seed}")  # noqa: T201 -- shown with a failure
    with pytest.MonkeyPatch.context() as ambient:
        for name in list(os.environ):
            if name.startswith(("STOKER_", "HF_", "AWS_")) or name.lower().endswith("_proxy"):
                ambient.delenv(name)
        with storm.running():
            began = time.monotonic()
            with storm.ordering():
                until(lambda: storm.pids("agent"), "an agent at work")
                for number in range(1, rounds + 1):
                    storm.round(number, short=rounds < LONG)
            storm.until_all_ended(SETTLE_S)
            found = _look(storm, rounds, time.monotonic() - began)
            request.config.stash[_REPORT] = found.report()
            yield found
    until(lambda: not running_from(root), "no orphan of a killed process is left", 30.0)


def _look(storm: Storm, rounds: int, seconds: float) -> Aftermath:
    jobs = storm.jobs()
    with storm.services.store.transaction() as tx:
        return Aftermath(
            rounds=rounds,
            storm=storm,
            jobs=jobs,
            events={name: list(tx.events(name, limit=100_000)) for name in jobs},
            owed={name: tx.list_outgoing(name) for name in jobs},
            leases=[lease for name in jobs for lease in tx.leases_of(name)],
            artefacts={name: tx.artefacts(name) for name in jobs},
            rentals=storm.ledger.rentals,
            seconds=seconds,
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash.get(_REPORT, None)
    if report is None:
        return
    terminalreporter.section("chaos")
    for name, value in report.items():
        words = value
        if isinstance(value, dict):
            words = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        terminalreporter.write_line(f"{name.replace('_', ' '):20} {words}")
    if path := config.getoption("--chaos-report"):
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
