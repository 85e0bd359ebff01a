"""What the market charged for a machine that is gone, asked until its invoices can be complete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import structlog

from infra.provider import Provider
from state import money
from state.errors import ProviderError
from state.lease import Lease
from state.store import Store, Transaction

#: How long after a lease's end the market is asked what it charged. Invoices lag; the last answer
#: is final.
ASKS = (timedelta(minutes=5), timedelta(hours=6), timedelta(hours=24))
#: Until then an answer that cannot be read is asked for again, so often.
PATIENCE, AGAIN = timedelta(hours=48), timedelta(minutes=10)
_log = structlog.get_logger()


def settle(store: Store, provider: Provider, leases: Sequence[Lease], now: datetime) -> None:
    """Record what was charged for those of `leases` that are over and due. An answer that cannot
    be read changes nothing. Charges come by label: what orphans with the same label cost is none of
    the lease's."""
    due = [lease for lease in leases if lease.released_at and lease.due_at and lease.rented_at]
    if not due:
        return
    since = min(lease.created_at for lease in due)
    try:
        charged = provider.charges([lease.label for lease in due], since)
    except ProviderError as error:
        _log.warning("the market's charges could not be read", error=str(error))
        with store.transaction() as tx:
            for lease in due:
                row = tx.lease(lease.id, lock=True)
                given_up = now - (row.released_at or now) > PATIENCE
                tx.save_lease(row.evolve(due_at=None if given_up else now + AGAIN))
        return
    with store.transaction() as tx:
        for lease in due:
            row = tx.lease(lease.id, lock=True)
            tries = row.tries + 1
            again = (row.released_at or now) + ASKS[tries] if tries < len(ASKS) else None
            billed = row.billed
            if row.label in charged:
                others = tx.orphans_labelled(row.label)
                apart = sum(money.orphaned(orphan, now) for orphan in others)
                billed = max(0, charged[row.label] - apart)
            _save(tx, row.evolve(billed=billed, tries=tries, due_at=again), now)


def ask_again(tx: Transaction, lease: Lease, now: datetime) -> None:
    """Forget what was charged for a lease that is over (and locked): an orphan with its label was
    in that. The market is asked once more, when its invoices can be complete."""
    if lease.billed is None or lease.released_at is None:
        return
    tries, due_at = lease.tries, lease.due_at
    if due_at is None:
        tries, due_at = len(ASKS) - 1, now + ASKS[-1]
    _save(tx, lease.evolve(billed=None, tries=tries, due_at=due_at), now)


def _save(tx: Transaction, lease: Lease, now: datetime) -> None:
    """With its money in the ledger of all that was spent."""
    tx.save_lease(lease)
    at, amount = lease.released_at or now, money.spent(lease, now)
    tx.add_spend(lease=lease.id, job=lease.job, at=at, amount=amount)
