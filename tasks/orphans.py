"""What orphans cost: written down by the sweep that sees them, until it sees them gone.

An orphan's money must be in no other sum. A lease counts its own instance until it is released, so
an orphan that was such an instance begins then. The market's bill for a lease is one for its
*label*, under which an orphan's charges are too: `tasks.billing` takes the orphan's money off it,
and a bill that came before the orphan was known is forgotten here, and asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta

import structlog

from infra.provider import Instance
from state import money
from state.lease import Lease
from state.orphan import Orphan
from state.store import Store, Transaction
from tasks import billing

#: What began longer ago, or costs more per hour or GB (micro-USD), is a garbled row.
OLDEST, DEAREST = timedelta(days=366), 10_000_000_000
_log = structlog.get_logger()


def note(
    store: Store,
    unowned: Iterable[Instance],
    listed: Sequence[Instance],
    is_gone: Callable[[str], bool],
    image_bytes: int,
    now: datetime,
) -> None:
    """Write down what a readable and believed list, asked for at `now`, shows of orphans:
    `unowned` are those that are there, each of which pulled `image_bytes`; what is not in `listed`
    at all is gone. May be repeated, and may come late.

    Lists have shown what was gone: of an instance that is new here, or was destroyed, `is_gone`
    gives a second opinion."""
    with store.transaction() as tx:
        known = tx.open_orphans()
    there = {orphan.id for orphan in known if orphan.ended_at is None}
    for instance in unowned:
        if instance.id not in there and is_gone(instance.id):
            continue
        try:
            with store.transaction() as tx:
                _seen(tx, instance, image_bytes, now)
        except ValueError as error:  # a garbled row is no reason to keep the others
            _log.error("an orphan cannot be written down", instance=instance.id, error=str(error))
    shown = {instance.id for instance in listed}
    for missing in (orphan.id for orphan in known if orphan.id not in shown):
        with store.transaction() as tx:
            tx.lock("orphans")
            if before := tx.orphan(missing):
                _save(tx, before, before.missed(now), now)


def ended(store: Store, instance_id: str, now: datetime) -> None:
    """Write down that an orphan's destruction was confirmed."""
    with store.transaction() as tx:
        tx.lock("orphans")
        if before := tx.orphan(instance_id):
            _save(tx, before, before.evolve(ended_at=before.ended_at or now), now)


def _seen(tx: Transaction, instance: Instance, image_bytes: int, now: datetime) -> None:
    tx.lock("orphans")
    lease = tx.lease_by_label(instance.label, lock=True)
    # whose end is the orphan's beginning, and who has paid for the image
    own = lease if lease and lease.instance_id == instance.id else None
    started_at = (own and own.released_at) or _start(instance, lease, now)
    if started_at > now:
        return  # the list is older than that end
    pulled = 0 if own else round(image_bytes * _sane(instance.download_price) / 1e9)
    seen = Orphan(
        id=instance.id,
        label=instance.label,
        job=lease.job if lease else "",
        machine_id=instance.machine_id or (lease.machine_id if lease else ""),
        gpu_name=_name(instance.gpu_name) or (lease.gpu_name if lease else ""),
        price=_sane(instance.price) or (lease.price if lease else 0),
        pulled=pulled,
        started_at=started_at,
        seen_at=now,
    )
    before = tx.orphan(instance.id)
    if before is None and lease is not None:
        billing.ask_again(tx, lease, now)
    _save(tx, before, before.seen(seen) if before else seen, now)


def _start(instance: Instance, lease: Lease | None, now: datetime) -> datetime:
    """When it began, as the market says if that can be; `lease` is the one that its label names."""
    start = instance.started_at
    if start is None or not now - OLDEST <= start <= now:
        return now
    return max(start, lease.created_at) if lease else start


def _sane(price: int) -> int:
    return price if 0 < price <= DEAREST else 0


def _name(text: str) -> str:
    """A name as it can be stored, whatever the market wrote."""
    return "".join(filter(str.isprintable, text))[:100]


def _save(tx: Transaction, before: Orphan | None, orphan: Orphan, now: datetime) -> None:
    """With its money in the ledger of all that was spent, where it is no job's."""
    if orphan == before:
        return
    tx.save_orphan(orphan)
    amount = money.orphaned(orphan, now)
    tx.add_spend(lease=f"orphan/{orphan.id}", job="", at=orphan.end or now, amount=amount)
