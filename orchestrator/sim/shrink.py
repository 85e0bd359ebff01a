"""From a world that fails to the smallest one that fails in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from random import Random

from orchestrator.sim.profiles import swarm
from orchestrator.sim.run import live
from orchestrator.sim.world import Cohort, Outcome

#: Seeds tried for each smaller number of jobs.
SEEDS = 12
SIZES = (1, 2, 3, 5, 8, 12, 20, 40, 80, 160)


def shrink(
    cohort: Cohort,
    found: Outcome,
    *,
    seconds: float = 60.0,
    live: Callable[[Cohort], Outcome] = live,
) -> tuple[Cohort, Outcome]:
    """Fewer kinds of faults, then fewer jobs, as long as the same invariant breaks.

    Each candidate is run; the first that fails likewise is taken and made smaller in turn. What
    is left after `seconds` is returned: it fails, and so do its seed and kinds when run again.
    """
    deadline = time.monotonic() + seconds
    wanted = _broken(found)
    best = (dataclasses.replace(cohort, kinds=_kinds(cohort)), found)
    progress = True
    while progress and time.monotonic() < deadline:
        progress = False
        for candidate in _smaller(best[0]):
            if time.monotonic() >= deadline:
                break
            out = live(candidate)
            if _broken(out) == wanted and wanted:
                best, progress = (candidate, out), True
                break
    return best


def _broken(out: Outcome) -> str:
    return str(out.violation["invariant"]) if out.violation else ""


def _kinds(cohort: Cohort) -> tuple[str, ...]:
    """The kinds of faults that this cohort has: those of its swarm."""

    drawn = swarm(cohort.profile, Random(cohort.seed))
    return tuple(kind for kind in drawn if cohort.kinds is None or kind in cohort.kinds)


def _smaller(cohort: Cohort) -> Iterator[Cohort]:
    """Candidates, the smallest steps last."""
    for size in SIZES:
        if size >= cohort.jobs:
            break
        for more in range(SEEDS if size > 3 else 3 * SEEDS):
            yield dataclasses.replace(cohort, jobs=size, seed=cohort.seed + more)
    kinds = cohort.kinds or ()
    for share in (2, 4):
        step = max(1, len(kinds) // share)
        for start in range(0, len(kinds), step):
            kept = kinds[:start] + kinds[start + step :]
            if len(kept) < len(kinds):
                yield dataclasses.replace(cohort, kinds=kept)
    for kind in kinds:
        yield dataclasses.replace(cohort, kinds=tuple(item for item in kinds if item != kind))
