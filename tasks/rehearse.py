"""What a test key ordered: rented, looked after and swept apart from everything real.

The same `Renter` and `Keeper` do it, over a market that only pretends. Those of real machines
leave rehearsals alone, and these have no way to a real market: whichever of the two fails, the
other does not notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from infra.rehearsal import Market
from state import policy, rehearsal
from state.errors import NotFound, ProviderError
from state.lease import Lease
from state.money import Limits
from state.policy import Policy
from state.store import Store
from tasks.allocate import Renter, Terms
from tasks.deallocate import Keeper, stall_lost

#: Machines at the same time in an installation; more jobs wait. Each is a thread of a worker.
MACHINES = 20
_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Rehearsals:
    """Rents and releases machines that pretend. `terms` are those of real ones, save for the
    address under which this installation is reached."""

    store: Store
    market: Market
    terms: Terms
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT

    def allocate(self, job_id: str) -> Lease | None:
        """As `Renter.allocate`, for a rehearsal that needs a machine; None for any other job."""
        with self.store.transaction() as tx:
            try:
                job = tx.job(job_id)
            except NotFound:
                return None
            part = job.request.rehearsal
            if part is None:
                return None
            first = not any(lease.rented_at for lease in tx.leases_of(job_id))
        terms = dataclasses.replace(
            self.terms,
            deployment=rehearsal.deployment(self.terms.deployment, part),
            limits=Limits(machines=MACHINES),
            kill_switch=False,
        )
        return Renter(
            store=self.store,
            provider=self.market.for_(part, first=first),
            terms=terms,
            clock=self.clock,
            rules=policy.for_job(job, self.rules),
        ).allocate(job_id)

    def tend(self, lease_ids: Sequence[str]) -> None:
        """As `Keeper.tend`, for those of these leases that are a rehearsal's."""
        with self.store.transaction() as tx:
            mine = [name for name in lease_ids if tx.lease(name).rehearsed]
        if mine:
            self.keeper.tend(mine)

    def release_job(self, job_id: str) -> None:
        """As `Keeper.release_job`."""
        with self.store.transaction() as tx:
            opened = [lease.id for lease in tx.leases_of(job_id) if lease.open and lease.rehearsed]
        if opened:
            self.keeper.tend(opened)

    @property
    def keeper(self) -> Keeper:
        return Keeper(
            store=self.store,
            provider=self.market,
            clock=self.clock,
            rules=self.rules,
            image_bytes=self.terms.image_bytes,
            rehearsed=True,
        )

    def sweep(self) -> list[str]:
        """Give back what no open lease is for, and stall the jobs of machines whose process died;
        the ids of their leases. A list that cannot be read changes nothing."""
        now = self.clock()
        try:
            listed = self.market.instances()
            # Read after the list: whatever is on it had its lease before.
            with self.store.transaction() as tx:
                leases = tx.open_rehearsals()
            owned = {lease.label for lease in leases}
            for item in listed:
                if item.label not in owned:
                    self.market.destroy(item.id)
        except ProviderError as error:
            _log.warning("the list of rehearsals could not be read", error=str(error))
            return []
        return stall_lost(self.keeper, leases, listed, now, credit=None)
