"""What a training finds on the market: the same for renting, and for saying beforehand what it
would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol

from state import money, policy, ranking
from state.job import GpuNeeds, JobRequest
from state.lease import Lease
from state.offer import Offer
from state.policy import Policy
from state.ranking import Workload


class Market(Protocol):
    """What of `infra.provider.Provider` a search needs."""

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = 64
    ) -> list[Offer]:
        """Raises: Refused, Unreadable."""


def workload(request: JobRequest, dataset_bytes: int, image_bytes: int) -> Workload:
    """What `request` will do on a machine that pulls an image of so many bytes first.

    Raises: RecipeError, when the recipe cannot be trained.
    """
    work = ranking.workload(request, dataset_bytes)
    return dataclasses.replace(work, image_bytes=image_bytes)


def offers(
    market: Market,
    request: JobRequest,
    *,
    interruptions: int = 0,
    rules: Policy = policy.DEFAULT,
) -> list[Offer]:
    """What is for rent; for an interruptible job also by bid, until it was outbid too often.

    Raises: Refused, Unreadable.
    """
    found = market.offers(request.gpu)
    if request.interruptible and interruptions < rules.interruptions:
        found = [*found, *market.offers(request.gpu, interruptible=True)]
    return found


def lease(
    offer: Offer,
    request: JobRequest,
    work: Workload,
    *,
    now: datetime,
    span: timedelta,
    **known: Any,
) -> Lease:
    """The lease that renting `offer` for `span` is, with what it may cost in all set aside.
    `known` is the rest of its fields: id, job, attempt, label …"""
    received, sent = ranking.traffic(work)
    fields: Mapping[str, Any] = {
        "created_at": now,
        "expires_at": now + span,
        "offer_id": offer.id,
        "machine_id": offer.machine_id,
        "gpu_name": offer.gpu_name,
        "geo": offer.geo,
        "price": offer.price,
        "storage_price": offer.storage_price,
        "download_price": offer.download_price,
        "upload_price": offer.upload_price,
        "bid": offer.bid,
        "vram_gb": offer.vram_gb,
        "disk_gb": request.gpu.disk_gb,
        "download_mbps": offer.download_mbps,
        "received": received,
        "sent": sent,
    }
    made = Lease(**{**fields, **known})
    return made.evolve(reserved=money.worst(made))
