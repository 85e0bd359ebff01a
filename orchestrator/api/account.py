"""`/v1/account`: the market's account, what burns it, and the limits that are set."""

from __future__ import annotations

from datetime import datetime

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from pydantic import Field

from infra.settings import Settings
from orchestrator.api import present
from orchestrator.api.schemas import MicroUsd, Out
from orchestrator.deps import Deps
from state import brakes, money
from state.store import Transaction


class LimitUsed(Out):
    """A limit that is set. Micro-USD, save `machines`: that one counts them."""

    name: str = Field(description="machines, rate, hour, day or total")
    words: str
    used: int = Field(description="spent or set aside")
    limit: int
    share: float = Field(description="1 is all of it")


class Renting(Out):
    stopped: bool
    code: str | None
    why: str | None


class Account(Out):
    credit: MicroUsd | None = Field(description="as last read; null before the first sweep")
    read_at: datetime | None
    age_s: float | None
    fresh: bool = Field(description="whether it was read so lately that decisions rely on it")
    error: str = Field(description="why it cannot be read now, if so")
    burn_per_hour: MicroUsd = Field(description="of all machines that are not being released")
    runway_hours: float | None = Field(description="null while nothing burns, or nobody knows")
    display: str
    limits: list[LimitUsed]
    renting: Renting


def standing(tx: Transaction, settings: Settings, now: datetime) -> Account:
    """The account as the last sweep read it."""
    limits = settings.limits
    book, opened = brakes.read(tx, limits, now), tx.open_leases()
    credit, read_at = _read(book.beats)
    burn = money.burn(opened)
    unread = brakes.unreadable_since(book.beats, brakes.NO_CREDIT_READ, brakes.CREDIT)
    said = book.beats[brakes.NO_CREDIT_READ][1] if unread else {}
    stop = brakes.stopped(book, limits, now, kill_switch=settings.kill_switch)
    return Account(
        credit=credit,
        read_at=read_at,
        age_s=None if read_at is None else max(0.0, (now - read_at).total_seconds()),
        fresh=brakes.credit(book.beats, now) is not None,
        error=str(said.get("error", "")),
        burn_per_hour=burn,
        runway_hours=None if credit is None or not burn else round(max(0, credit) / burn, 2),
        display="unknown" if credit is None else money.dollars(credit),
        limits=[
            LimitUsed(
                name=name,
                words=money.WORDS[name],
                used=used,
                limit=limit,
                share=round(used / limit, 4),
            )
            for name, used, limit in money.usage(
                limits, book.leases, book.spent_ever, now, book.orphans
            )
        ],
        renting=Renting(
            stopped=stop is not None,
            code=stop.code if stop else None,
            why=stop.message if stop else None,
        ),
    )


def _read(beats: brakes.Beats) -> tuple[int | None, datetime | None]:
    if brakes.CREDIT not in beats:
        return None, None
    at, said = beats[brakes.CREDIT]
    return int(said["credit"]), at


def register(api: APIBlueprint, deps: Deps) -> None:
    """Put the route into `api`."""

    @api.get("/account", operation_id="get_account", responses={"200": Account})
    def get_account() -> Response:
        """The market's account: credit, what burns it, how long it lasts; limits; whether
        anything may be rented"""
        with deps.store.transaction() as tx:
            return present.answer(standing(tx, deps.settings, deps.clock()))
