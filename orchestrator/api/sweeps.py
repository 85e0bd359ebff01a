"""`/v1/sweeps`: compare the market's account with our leases, now.

A dry run looks from here: it reads and changes nothing. A sweep that destroys is the worker's
alone, which is asked for it through the database: so sweeps come one after the other, an orphan's
second sight stays some seconds behind its first, and a web process that is shut down in the
middle leaves nothing half done.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from pydantic import Field

from orchestrator.api import present
from orchestrator.api.market import market
from orchestrator.api.problems import RETRY_AFTER, Refusal
from orchestrator.api.schemas import In, MicroUsd, Out
from orchestrator.deps import Deps
from tasks import rounds
from tasks.deallocate import Keeper
from tasks.deallocate import sweep as sweep_account


class SweepIn(In):
    dry_run: bool = Field(default=False, description="only say what a sweep would do")


class Sight(Out):
    """An instance of the account, and what a sweep makes of it."""

    instance: str
    label: str
    machine: str
    age_s: int
    price: MicroUsd = Field(description="per hour")
    verdict: Literal["foreign", "kept", "releasing", "suspect", "destroyed"] = Field(
        description="`destroyed`: a sweep would destroy it"
    )
    why: str


class Sweep(Out):
    dry_run: bool
    due_at: datetime | None = Field(
        description="when the worker makes it; `sweep.at` of `/v1/instances` tells that it did"
    )
    seen: int | None = Field(description="instances of the account; null unless a dry run")
    ours: int | None
    doubtful: bool = Field(description="the list shows none of our machines; not believed yet")
    sights: list[Sight]


def sweep(deps: Deps, *, dry_run: bool) -> Sweep:
    """What a sweep would do; or one that the worker is to make.

    Raises:
        Refusal: 503, when the account's list cannot be read.
    """
    if not dry_run:
        due_at = rounds.hasten(deps.store, "sweep", deps.clock())
        return Sweep(dry_run=False, due_at=due_at, seen=None, ours=None, doubtful=False, sights=[])
    settings = deps.settings
    keeper = Keeper(
        store=deps.store,
        provider=market(deps),
        clock=deps.clock,
        image_bytes=settings.image_bytes,
    )
    swept = sweep_account(keeper, settings.deployment, dry_run=True)
    if swept.unreadable:
        raise Refusal(
            503,
            "market_unavailable",
            f"the account's list could not be read: {swept.unreadable}",
            headers={"Retry-After": str(RETRY_AFTER)},
            retryable=True,
        )
    return Sweep(
        dry_run=True,
        due_at=None,
        seen=swept.seen,
        ours=swept.ours,
        doubtful=swept.doubtful,
        sights=[
            Sight(**{name: getattr(item, name) for name in Sight.model_fields})
            for item in swept.sights
        ],
    )


def register(api: APIBlueprint, deps: Deps) -> None:
    """Put the route into `api`."""

    @api.post("/sweeps", operation_id="make_sweep", responses={"200": Sweep, "202": Sweep})
    def make_sweep(body: SweepIn) -> Response:
        """Compare the market's account with our leases: a look (200), or a sweep soon (202)"""
        made = sweep(deps, dry_run=body.dry_run)
        return present.answer(made, 200 if made.dry_run else 202)
