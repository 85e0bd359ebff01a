"""The lease: our record of one rented (or perhaps rented) instance, and its few moves.

A lease is written *before* the create call and closed only when the provider no longer shows
the instance; so whatever line a process dies on, some row owns the money.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from state import rehearsal
from state.errors import IllegalMove
from state.value import Value


class LeaseStatus(enum.StrEnum):
    #: The create call is about to be made, or was made by a process that died.
    INTENDED = "intended"
    #: The create call had no trustworthy answer; the provider's list will tell.
    UNKNOWN = "unknown"
    #: The provider gave us an instance; `instance_id` is known.
    RENTED = "rented"
    #: It must go; destroy is repeated until the provider no longer shows it.
    RELEASING = "releasing"
    #: Seen gone (or never made). The end.
    RELEASED = "released"


_S = LeaseStatus
#: Every legal move, by source.
MOVES: dict[LeaseStatus, frozenset[LeaseStatus]] = {
    _S.INTENDED: frozenset({_S.RENTED, _S.UNKNOWN, _S.RELEASING, _S.RELEASED}),
    _S.UNKNOWN: frozenset({_S.RENTED, _S.RELEASING, _S.RELEASED}),
    _S.RENTED: frozenset({_S.RELEASING, _S.RELEASED}),
    _S.RELEASING: frozenset({_S.RELEASED}),
    _S.RELEASED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class Lease(Value):
    """One try at renting.

    Attributes:
        label: `<deployment>/<job>/<attempt>` plus a nonce; the only thing that survives a lost
            answer, so it is unique.
        token_hash: SHA-256 (hex) of the one-use bootstrap token that the machine was given.
        hedge: rented beside another machine of the same attempt that is slow to boot.
        bid: micro-USD per hour that was bid for the GPU; 0 is on demand, and cannot be outbid.
        price: micro-USD per hour (GPU and disk) as offered.
        storage_price: micro-USD per hour of the disk alone, billed while not running.
        download_price, upload_price: micro-USD per GB.
        vram_gb, download_mbps: as offered; a machine that has less lies.
        disk_gb: as rented.
        boot_s: how long its boot is expected to take (seconds).
        reserved: micro-USD set aside for it when it was decided to rent.
        expires_at: after this anybody may destroy the instance.
        due_at: when somebody must look at this lease again.
        absent: how many readable lists in a row did not show it while it is released.
        note, noted_at: what the market last said of its boot, and since when it says so.
        seen_at: when a list first showed its instance.
        booting_at: when it was last seen not running yet.
        running_at: when it was first seen running, or its agent was first heard.
        ended_at: when it was first seen ended, gone, or its destruction was confirmed; the GPU
            bills no more.
        received, sent: bytes over the line: what is expected of the job, and once it is released
            what its agent said.
        why: for people: why it was kept, released or destroyed.
        cost: micro-USD by our own count; `billed` is what the market charged, once it said so.
    """

    id: str
    job: str
    attempt: int
    label: str
    created_at: datetime
    expires_at: datetime
    status: LeaseStatus = LeaseStatus.INTENDED
    token_hash: str | None = None
    token_expires_at: datetime | None = None
    hedge: bool = False
    offer_id: str = ""
    machine_id: str = ""
    gpu_name: str = ""
    geo: str = ""
    price: int = 0
    storage_price: int = 0
    download_price: int = 0
    upload_price: int = 0
    bid: int = 0
    vram_gb: float = 0.0
    disk_gb: float = 0.0
    download_mbps: float = 0.0
    boot_s: float = 0.0
    reserved: int = 0
    received: int = 0
    sent: int = 0
    instance_id: str | None = None
    rented_at: datetime | None = None
    seen_at: datetime | None = None
    booting_at: datetime | None = None
    running_at: datetime | None = None
    ended_at: datetime | None = None
    ready_at: datetime | None = None
    releasing_at: datetime | None = None
    released_at: datetime | None = None
    due_at: datetime | None = None
    tries: int = 0
    absent: int = 0
    note: str = ""
    noted_at: datetime | None = None
    why: str = ""
    cost: int = 0
    billed: int | None = None

    def to(self, status: LeaseStatus, **changes: Any) -> Self:
        """This lease in `status`.

        Raises:
            IllegalMove: a released lease never comes back, and the like.
        """
        if status is not self.status and status not in MOVES[self.status]:
            raise IllegalMove(f"lease {self.id}", status, self.status)
        return self.evolve(status=status, **changes)

    @property
    def open(self) -> bool:
        """Whether it may still cost money."""
        return self.status is not LeaseStatus.RELEASED

    @property
    def rehearsed(self) -> bool:
        """Whether its machine only pretends: it costs nothing, and says nothing of any host."""
        return rehearsal.is_marked(self.label)

    @property
    def pace(self) -> float:
        """How many seconds of its machine pass in a real one; 1 on every real machine."""
        return rehearsal.pace_of(self.label)
