"""What a test key orders: a job that is rehearsed on machines that only pretend.

Such a job lives by the same states, tasks, wire, storage and webhooks as any other. What differs
is here: which part its machines play, how fast their time passes, and the mark by which a lease
of a rehearsal can never be taken for one of a real machine, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUCCESS = "test_success"
OOM = "test_oom"
HOST_DIES = "test_host_dies"
NO_OFFERS = "test_no_offers"
SLOW_BOOT = "test_slow_boot"
BAD_WEIGHTS = "test_bad_weights"
FAILS = "test_fails"

#: By name: what is rehearsed, in words for the customer.
FIXTURES: Mapping[str, str] = {
    SUCCESS: "everything goes well",
    OOM: "the first machine runs out of GPU memory; the next one does it",
    HOST_DIES: "the first machine falls silent in training; the next goes on from its checkpoint",
    NO_OFFERS: "nothing is for rent; the job waits until it is cancelled, or its time is over",
    SLOW_BOOT: "the first machine does not come up; a second is rented beside it, and is ready",
    BAD_WEIGHTS: "what the first machine uploads is not finite, and is refused; the next does it",
    FAILS: "the training fails for a reason that no other machine would mend",
}
#: Seconds of a rehearsal that pass in one real second, unless the customer says otherwise.
TIME_SCALE = 60.0
#: The label of every lease of a rehearsal begins so. No deployment's name has a colon.
MARK = "test:"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Which fixture is played, and how many of its seconds pass in one real second."""

    fixture: str = SUCCESS
    time_scale: float = TIME_SCALE


def deployment(name: str, rehearsal: Rehearsal) -> str:
    """What the labels of a rehearsal's leases begin with: `test:60:stoker`."""
    return f"{MARK}{rehearsal.time_scale:g}:{name}"


def is_marked(label: str) -> bool:
    """Whether this is the label of a rehearsal's lease."""
    return label.startswith(MARK)


def pace_of(label: str) -> float:
    """How many seconds are billed for one real second under this label: 1 for what is real."""
    return float(label.split(":", 2)[1]) if is_marked(label) else 1.0
