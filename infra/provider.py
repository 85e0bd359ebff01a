"""The door to GPU markets: a few verbs, the same for every market and for the in-memory one.

What every implementation promises (held by `tests/integration/provider/test_provider_contract.py`):

- `create` makes **one** request. An id in the answer is always handed over: as the result, or in
  `ProviderError.instance_id`. `Refused` means nothing was rented; `Unknown` means it may have been.
- `instances` answers the whole list or raises `Unreadable`; never a part, never "empty" for
  "could not ask".
- `destroy` of what is already gone is a success.
- Every call ends within its timeout. Money is micro-USD, sizes are GB (10^9), rates Mbit/s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from state.job import GpuNeeds
from state.offer import Offer


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What to start on a rented machine."""

    label: str
    image: str
    disk_gb: float
    onstart: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: micro-USD per hour for the GPU of an interruptible machine; 0 is on demand
    bid: int = 0


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What the market says of an instance. `phase` is ours, read from the whole tuple of states:

    `starting` (created, loading), `running`, `ended` (exited, stopped, abandoned: it will not
    run again by itself) or `lost` (unknown, offline: it may come back). `preempted` says that the
    market itself stopped it: outbid, or its GPU was wanted on demand. `price` is micro-USD per
    hour, GPU and disk; `download_price` micro-USD per GB.
    """

    id: str
    label: str
    machine_id: str
    phase: str
    gpu_name: str = ""
    preempted: bool = False
    message: str = ""
    started_at: datetime | None = None
    price: int = 0
    download_price: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Account:
    """`credit` in micro-USD."""

    id: str
    credit: int


class Provider(Protocol):
    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        """Rentable now, each checked on our side against `needs`; in no promised order. With
        `interruptible`, what can be bid for: the price says what we would bid.

        Raises: Refused, Unreadable.
        """

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        """Rent `offer`; the id of the new instance. Raises: Refused (OfferGone, Throttled,
        AccountFault) or Unknown; `instance_id` of the error is set when one was named."""

    def instance(self, instance_id: str) -> Instance | None:
        """None only when the market says that it is gone (or it is younger than the market's read
        lag, a few seconds). Raises: Refused, Unreadable."""

    def instances(self) -> list[Instance]:
        """All of the account, also those that are not ours; a new one may be missing for the
        market's read lag. Raises: Refused, Unreadable."""

    def destroy(self, instance_id: str) -> None:
        """Ask for the end. Raises: Refused, Unknown."""

    def logs(self, instance_id: str, *, tail: int = 100) -> str:
        """The container's last lines. Raises: Refused, Unreadable."""

    def account(self) -> Account:
        """Raises: Refused, Unreadable."""

    def charges(self, labels: Collection[str], since: datetime) -> dict[str, int]:
        """Micro-USD charged so far for instances with these labels, the GPU, disk and bandwidth
        together, since the day of `since`; a label without a charge is missing. Invoices lag.
        Raises: Refused, Unreadable."""
