"""Every way a job can move, and nothing else.

Rule 1: whatever decides a status is in this file. Tasks and the receiver bring *events*; the
table says where they lead; nobody assigns `Job.status` elsewhere.

Two kinds of event exist. An agent reports *facts*; those in `MILESTONES` are kept in the set
`Job.known`, and the job advances through every state whose needs are met, in any order of
arrival, however often each comes. The server adds *moves*: the dataset is ready, the weights
were verified, no progress (`stall`), `retry`, `fail`, `cancel`.

Rule 2: refused means nothing happened. A move that the table lacks raises `IllegalMove`; a fact
of another attempt, or of an attempt that is over, leaves the job as it was (`Stale`).

The table is plain data run by the `transitions` package; `docs/states.md` is drawn from it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from transitions import Machine, MachineError

from gpu_agent.wire import Fact
from state.errors import IllegalMove
from state.job import ACTIVE, TERMINAL, Job, Reason, Status, Transition


class Move(enum.StrEnum):
    """What the server itself can do to a job."""

    #: The zip is built and checked. Holds for all attempts.
    DATASET_READY = "dataset.ready"
    #: The uploaded weights were read back and are what the agent said.
    WEIGHTS_VERIFIED = "weights.verified"
    STALL = "stall"
    RETRY = "retry"
    FAIL = "fail"
    CANCEL = "cancel"


#: Facts that move a job; all others only inform.
MILESTONES = frozenset(
    {
        Fact.GPU_READY,
        Fact.IMAGES_READY,
        Fact.MODEL_READY,
        Fact.FILES_POSITIONED,
        Fact.WEIGHTS_UPLOADED,
    }
)

ADVANCE = "advance"


@dataclass(frozen=True)
class Row:
    """`trigger` leads from `source` to `target` once every one of `needs` is known."""

    trigger: str
    source: Status
    target: Status
    needs: tuple[str, ...] = ()


_S = Status
_FORWARD = (
    Row(ADVANCE, _S.PENDING, _S.PENDING_GPU, (Move.DATASET_READY,)),
    Row(ADVANCE, _S.PENDING_GPU, _S.PENDING_IMAGES, (Fact.GPU_READY,)),
    Row(ADVANCE, _S.PENDING_IMAGES, _S.PENDING_MODEL, (Fact.IMAGES_READY,)),
    Row(ADVANCE, _S.PENDING_MODEL, _S.TRAINING, (Fact.MODEL_READY, Fact.FILES_POSITIONED)),
    Row(ADVANCE, _S.TRAINING, _S.COMPLETED, (Fact.WEIGHTS_UPLOADED, Move.WEIGHTS_VERIFIED)),
)
_WAITING = (_S.PENDING, _S.PENDING_GPU, _S.PENDING_IMAGES, _S.PENDING_MODEL, _S.TRAINING)

#: The whole machine. A terminal status is the source of no row.
TABLE: tuple[Row, ...] = (
    *_FORWARD,
    *(Row(Move.STALL, source, _S.STALLED) for source in _WAITING),
    Row(Move.RETRY, _S.STALLED, _S.PENDING_GPU, (Move.DATASET_READY,)),
    Row(Move.FAIL, _S.STALLED, _S.FAILED),
    *(Row(Move.CANCEL, source, _S.CANCELLED) for source in (*_WAITING, _S.STALLED)),
)


class Effect(enum.Enum):
    """What a fact did."""

    APPLIED = "applied"
    #: Nothing new in it.
    NOTHING = "nothing"
    #: Of an attempt that is not the current one, or is over: the agent must stop.
    STALE = "stale"


class _Walker:
    """The model that `transitions` moves; lives for one call."""

    state: str

    def __init__(self, known: Collection[str]) -> None:
        self.known = known


def _holds(needs: tuple[str, ...]) -> Any:
    return lambda event: event.model.known.issuperset(needs)


_machine = Machine(
    model=None,
    states=[str(status) for status in Status],
    transitions=[
        {
            "trigger": row.trigger,
            "source": row.source.value,
            "dest": row.target.value,
            "conditions": [_holds(row.needs)],
        }
        for row in TABLE
    ],
    initial=Status.PENDING.value,
    auto_transitions=False,
    send_event=True,
    model_attribute="state",
)


@cache
def _step(status: Status, trigger: str, known: frozenset[str]) -> Status | None:
    """Where `trigger` leads from `status`, or None when the table has no open row for it.

    Asked of `transitions` once for each of the few hundred questions that there are.
    """
    walker = _Walker(known)
    _machine.add_model(walker, initial=status.value)
    try:
        moved = _machine.events[trigger].trigger(walker)
    except MachineError:
        return None
    finally:
        _machine.remove_model(walker)
    return Status(walker.state) if moved else None


def _known(job: Job) -> frozenset[str]:
    return job.known | {Move.DATASET_READY} if job.dataset_ready else job.known


def _enter(job: Job, target: Status, at: datetime) -> Job:
    """`job` in `target`, with what belongs to the old status taken off."""
    job = job.evolve(status=target, entered_at=at, moved_at=at)
    if target is Status.TRAINING:
        job = job.evolve(started_at=job.started_at or at)
    if target in TERMINAL:
        job = job.evolve(finished_at=at, orders=(), retry_at=None)
    return job


def _advance(job: Job, cause: str, at: datetime) -> tuple[Job, list[Transition]]:
    passed: list[Transition] = []
    while True:
        target = _step(job.status, ADVANCE, _known(job))
        if target is None:
            return job, passed
        passed.append(
            Transition(
                job=job.id,
                attempt=job.attempt,
                source=job.status,
                target=target,
                cause=cause,
                at=at,
            )
        )
        job = _enter(job, target, at)


def learn(job: Job, fact: Fact, attempt: int, at: datetime) -> tuple[Job, list[Transition], Effect]:
    """What `fact` of `attempt` does to `job`: the new value and the transitions on the way.

    `error` is not decided here: whoever receives it applies `Move.STALL` with its reason.
    """
    if attempt != job.attempt or job.status not in ACTIVE:
        return job, [], Effect.STALE
    if fact not in MILESTONES or fact in job.known:
        return job, [], Effect.NOTHING
    job, passed = _advance(job.evolve(known=job.known | {str(fact)}), fact, at)
    return job, passed, Effect.APPLIED


def move(
    job: Job,
    what: Move,
    at: datetime,
    *,
    reason: Reason | None = None,
    retry_at: datetime | None = None,
) -> tuple[Job, list[Transition]]:
    """Make the server's move `what`.

    `STALL` and `FAIL` want a reason; `STALL` may say when the next try comes. `DATASET_READY`
    and `WEIGHTS_VERIFIED` may come twice: the second does nothing.

    Raises:
        IllegalMove: the table has no such row for the job's status; nothing happened.
    """
    if what in (Move.DATASET_READY, Move.WEIGHTS_VERIFIED):
        return _learn_move(job, what, at)
    target = _step(job.status, what, _known(job))
    if target is None:
        raise IllegalMove(f"job {job.id}", what, job.status)
    passed = Transition(
        job=job.id,
        attempt=job.attempt,
        source=job.status,
        target=target,
        cause=what,
        at=at,
        reason=reason,
    )
    source = job.status
    job = _enter(job, target, at)
    match what:
        case Move.STALL:
            job = job.evolve(stalled_from=source, reason=reason, retry_at=retry_at, orders=())
        case Move.FAIL:
            job = job.evolve(reason=reason or job.reason)
        case Move.RETRY:
            job = job.evolve(
                attempt=job.attempt + 1,
                known=frozenset(),
                stalled_from=None,
                reason=None,
                retry_at=None,
                lease="",
                last_heard_at=None,
                moved=0,
                orders=(),
                progress={},
            )
        case _:
            pass
    return job, [passed]


def _learn_move(job: Job, what: Move, at: datetime) -> tuple[Job, list[Transition]]:
    if job.terminal:
        raise IllegalMove(f"job {job.id}", what, job.status)
    if what is Move.DATASET_READY:
        return _advance(job.evolve(dataset_ready=True), what, at)
    if job.status is not Status.TRAINING or Fact.WEIGHTS_UPLOADED not in job.known:
        raise IllegalMove(f"job {job.id}", what, job.status)
    return _advance(job.evolve(known=job.known | {str(what)}), what, at)
