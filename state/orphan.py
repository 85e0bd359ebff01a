"""The orphan: an instance of ours that no open lease is for, and our record of what it cost.

Nobody decided on it, so nobody set money aside for it; the sweep, which finds it, writes it down.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from state.value import Value


@dataclass(frozen=True, kw_only=True)
class Orphan(Value):
    """One such instance, as the lists showed it.

    Attributes:
        id: the market's, of the instance.
        job: whose lease its label names; empty where no lease has that label.
        price: micro-USD per hour (GPU and disk) as listed; 0 where nobody knows.
        pulled: micro-USD for the bytes of its image.
        started_at: from when on its money is in no lease.
        seen_at: when the last list that showed it was asked for.
        ended_at: when its destruction was confirmed, unless a list showed it again.
        gone_at: when the first list that did not show it was asked for; None while it is there.
    """

    id: str
    label: str
    job: str = ""
    machine_id: str = ""
    gpu_name: str = ""
    price: int = 0
    pulled: int = 0
    started_at: datetime
    seen_at: datetime
    ended_at: datetime | None = None
    gone_at: datetime | None = None

    @property
    def end(self) -> datetime | None:
        """When it cost no more; None while it may: a confirmed end counts once a list agrees."""
        return self.gone_at and min(self.ended_at or self.gone_at, self.gone_at)

    def seen(self, now: Self) -> Self:
        """This orphan after a list that showed it as `now`; one that comes late changes nothing.
        One that was taken for gone has cost money all the time."""
        if now.seen_at < (self.gone_at or self.seen_at):
            return self
        return now.evolve(
            machine_id=now.machine_id or self.machine_id,
            gpu_name=now.gpu_name or self.gpu_name,
            price=now.price or self.price,
            pulled=now.pulled or self.pulled,
            started_at=min(self.started_at, now.started_at),
        )

    def missed(self, at: datetime) -> Self:
        """This orphan after a list of `at` that does not show it."""
        if self.gone_at is not None or at <= self.seen_at:
            return self
        return self.evolve(gone_at=at)
