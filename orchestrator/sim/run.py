"""Many cohorts, spread over processes, and what they add up to."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from orchestrator.sim.world import Cohort, Outcome, World

#: Jobs per world: enough that they meet each other, few enough that a world is quickly run again.
PER_WORLD = 500


def cohorts(
    jobs: int, seed: int, *, faults: str, bad_hosts: float = 0.0, hedge: bool = True
) -> list[Cohort]:
    """`jobs` in worlds of their own, each with a seed derived from `seed`."""
    sizes = [min(PER_WORLD, jobs - start) for start in range(0, jobs, PER_WORLD)]
    return [
        Cohort(
            seed=_derived(seed, number), jobs=size, profile=faults, bad_hosts=bad_hosts, hedge=hedge
        )
        for number, size in enumerate(sizes)
    ]


def _derived(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")


def live(cohort: Cohort) -> Outcome:
    """One world, from its first job to its last webhook."""
    return World(cohort).run()


@dataclass
class Summary:
    """What all worlds came to."""

    jobs: int
    seed: int
    faults: str
    wall_s: float = 0.0
    events: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    attempts_completed: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    to_training: list[float] = field(default_factory=list)
    cost_receipt: int = 0
    cost_ledger: int = 0
    worst_difference: int = 0
    worst_over_cap: int = 0
    orphan_s: float = 0.0
    violations: list[dict[str, Any]] = field(default_factory=list)
    #: the first cohort with a violation, and its trace
    failing: Cohort | None = None
    trace: list[str] = field(default_factory=list)
    trace_hash: str = ""

    def add(self, cohort: Cohort, out: Outcome) -> None:
        self.events += out.events
        self.statuses += out.statuses
        self.attempts += out.attempts
        self.attempts_completed += out.attempts_completed
        self.counts += out.counts
        self.to_training += out.to_training
        self.cost_receipt += out.cost_receipt
        self.cost_ledger += out.cost_ledger
        self.worst_difference = max(self.worst_difference, out.worst_difference)
        self.worst_over_cap = max(self.worst_over_cap, out.worst_over_cap)
        self.orphan_s = max(self.orphan_s, out.orphan_s)
        self.trace_hash = hashlib.sha256((self.trace_hash + out.trace_hash).encode()).hexdigest()
        if out.violation is not None:
            self.violations.append({**out.violation, "seed": cohort.seed, "jobs": cohort.jobs})
            if self.failing is None:
                self.failing, self.trace = cohort, out.trace

    def figures(self) -> dict[str, Any]:
        """What `--json` prints; its keys are stable."""
        waits = sorted(self.to_training)
        counts = self.counts
        return {
            "jobs": self.jobs,
            "seed": self.seed,
            "faults": self.faults,
            "statuses": dict(sorted(self.statuses.items())),
            "attempts": {
                "mean": _mean(self.attempts),
                "mean_completed": _mean(self.attempts_completed),
                "distribution": {str(key): self.attempts[key] for key in sorted(self.attempts)},
            },
            "machines": {
                "rented": counts["instances"],
                "rented_twice_for_a_job": counts["machines rented twice for a job"],
                "failed_one_rented_again": counts["bad machines rented twice for a job"],
            },
            "time_to_training_s": {
                "p50": _quantile(waits, 0.50),
                "p95": _quantile(waits, 0.95),
                "p99": _quantile(waits, 0.99),
            },
            "cost": {
                "receipt_usd": round(self.cost_receipt / 1e6, 2),
                "ledger_usd": round(self.cost_ledger / 1e6, 2),
                "worst_difference_usd": round(self.worst_difference / 1e6, 4),
                "mean_difference": round(
                    (self.cost_receipt - self.cost_ledger) / max(1, self.cost_ledger), 4
                ),
                "worst_over_cap_usd": round(self.worst_over_cap / 1e6, 4),
            },
            "orphan_s_max": round(self.orphan_s, 1),
            "webhooks": {
                "owed": counts["webhooks owed"],
                "sent": counts["webhooks sent"],
                "received_twice": counts["webhooks received twice"],
                "exhausted": counts["webhooks exhausted"],
                "disabled": counts["webhooks disabled"],
            },
            "reports": {
                "taken": counts["reports taken"],
                "again": counts["reports again"],
                "refused": counts["reports refused"],
            },
            "faults_injected": {
                key.removeprefix("fault "): counts[key]
                for key in sorted(counts)
                if key.startswith("fault ")
            },
            "crashes": counts["crashes"],
            "wall_s": round(self.wall_s, 1),
            "events": self.events,
            "events_per_s": round(self.events / self.wall_s) if self.wall_s else 0,
            "trace_hash": self.trace_hash,
            "violations": self.violations,
        }


def run(
    todo: Sequence[Cohort],
    *,
    seed: int,
    faults: str,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Run all worlds; the outcome does not depend on how many processes do it."""
    summary = Summary(jobs=sum(cohort.jobs for cohort in todo), seed=seed, faults=faults)
    began = time.perf_counter()
    done = 0
    for cohort, out in zip(todo, _lived(todo, workers), strict=True):
        summary.add(cohort, out)
        done += cohort.jobs
        say(f"{done} jobs, {len(summary.violations)} violations")
    summary.wall_s = time.perf_counter() - began
    return summary


def _lived(todo: Sequence[Cohort], workers: int) -> Iterator[Outcome]:
    # here, and not in the workers alone: who shrinks a failure runs worlds in this process
    quiet()
    if workers < 2 or len(todo) < 2:
        yield from map(live, todo)
        return
    context = multiprocessing.get_context("fork")
    # What is imported is no garbage: looking at it again and again took a quarter of the time.
    with context.Pool(workers, initializer=gc.freeze) as pool:
        yield from pool.imap(live, todo)


def quiet() -> None:
    """No log lines: a simulation breaks so much that they would be most of its work."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


def _mean(counted: Counter[int]) -> float:
    total = sum(counted.values())
    return round(sum(key * count for key, count in counted.items()) / total, 3) if total else 0.0


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)
