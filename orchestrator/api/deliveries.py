"""`/v1/deliveries`: every webhook that is owed, each try at sending it, and once more."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api import auth, present, schemas
from orchestrator.api.auth import Caller
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state.endpoints import Endpoint
from state.errors import NotFound
from state.events import Delivery, Outgoing, OutgoingStatus
from state.store import Transaction
from tasks.relay import CLAIM

_PLAUSIBLE = re.compile(r"[A-Za-z0-9_.-]{1,140}")
_CURSOR = re.compile(r"([0-9]{1,17})~([A-Za-z0-9_.-]{1,140})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class DeliveryDetail(schemas.Delivery):
    """One webhook owed to one place, with what it says."""

    payload: dict[str, Any] = Field(description="the body, as it is signed and sent")


class DeliveriesPage(schemas.Out):
    data: list[schemas.Delivery]
    has_more: bool
    next_cursor: str | None


class DeliveriesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    job: Annotated[str, Field(max_length=64)] | None = None
    endpoint: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="of this endpoint; `job` for jobs' own webhooks"
    )
    status: OutgoingStatus | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: str | None = Field(
        default=None,
        pattern=f"^{_CURSOR.pattern}$",
        description="`next_cursor` of the page before",
    )


class DeliveryPath(BaseModel):
    delivery_id: str


#: What `endpoint` is asked for as, for the webhooks that jobs name themselves.
OWN = "job"


def shown(row: Outgoing, tries: Iterable[Delivery]) -> DeliveryDetail:
    brief = present.delivery(row, tries)
    return DeliveryDetail(**vars(brief), payload=dict(row.payload))


def visible(tx: Transaction, delivery_id: str, caller: Caller, *, lock: bool = False) -> Outgoing:
    """Raises: NotFound, also for what belongs to somebody else."""
    if _PLAUSIBLE.fullmatch(delivery_id):
        row = tx.outgoing(delivery_id, lock=lock)
        if caller.sees(row.owner):
            return row
    raise NotFound(f"no delivery {delivery_id[:140]!r}")


def check_open(endpoint: Endpoint) -> None:
    """Raises: Refusal 409."""
    if endpoint.disabled_at is not None:
        raise Refusal(
            409,
            "endpoint_disabled",
            f"endpoint {endpoint.id} is disabled ({endpoint.disabled_why}); enable it first",
        )


def page(tx: Transaction, owner: str | None, query: DeliveriesQuery) -> DeliveriesPage:
    """One page of the owner's deliveries, or of everybody's, newest first.

    Raises: Refusal 422 for a cursor that is not ours.
    """
    found = tx.page_outgoing(
        owner=owner,
        job=query.job,
        endpoint="" if query.endpoint == OWN else query.endpoint,
        status=query.status,
        before=None if query.cursor is None else _place(query.cursor),
        limit=query.limit + 1,
    )
    rows, more = found[: query.limit], len(found) > query.limit
    tries = tx.tries_of([row.id for row in rows])
    return DeliveriesPage(
        data=[present.delivery(row, tries) for row in rows],
        has_more=more,
        next_cursor=_cursor(rows[-1]) if more and rows else None,
    )


def _cursor(row: Outgoing) -> str:
    return f"{(row.created_at - _EPOCH) // timedelta(microseconds=1)}~{row.id}"


def _place(cursor: str) -> tuple[datetime, str]:
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        fault = ("/cursor", "is not a cursor of ours")
        raise Refusal(422, "invalid", "the cursor is not understood", errors=[fault])
    return _EPOCH + timedelta(microseconds=int(found[1])), found[2]


def one(deps: Deps, caller: Caller, delivery_id: str) -> DeliveryDetail:
    """Raises: NotFound."""
    with deps.store.transaction() as tx:
        row = visible(tx, delivery_id, caller)
        return shown(row, tx.tries_of([row.id]))


def replay(deps: Deps, waker: Waker, caller: Caller, delivery_id: str) -> DeliveryDetail:
    """Send it once more, under the same webhook-id, with the whole schedule before it; what waits
    for its next try goes now. Harmless while it is on its way.

    Raises:
        NotFound; Refusal: 409 its endpoint is disabled, 410 it was deleted.
    """
    now = deps.clock()
    with deps.store.transaction() as tx:
        row = visible(tx, delivery_id, caller, lock=True)
        due_at = now
        if row.endpoint:
            due_at = _endpoint(tx, row).due(now)
        if row.status is not OutgoingStatus.WAITING:
            row = row.evolve(status=OutgoingStatus.WAITING, tries=0, due_at=due_at, ended_at=None)
            tx.save_outgoing(row)
        elif row.due_at is not None and row.due_at > max(due_at, now + CLAIM):
            # later than any relay that has it in hand may hold it: it waits for its next try
            row = row.evolve(due_at=due_at)
            tx.save_outgoing(row)
        tries = tx.tries_of([row.id])
    waker(row.queue, ("relay",))
    return shown(row, tries)


def _endpoint(tx: Transaction, row: Outgoing) -> Endpoint:
    try:
        endpoint = tx.endpoint(row.endpoint)
    except NotFound:
        raise Refusal(410, "endpoint_deleted", f"endpoint {row.endpoint} was deleted") from None
    check_open(endpoint)
    return endpoint


def deliveries(deps: Deps, waker: Waker) -> APIBlueprint:
    api = APIBlueprint(
        "deliveries",
        __name__,
        url_prefix="/v1/deliveries",
        abp_tags=[Tag(name="webhooks")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))

    @api.get("", operation_id="list_all_deliveries", responses={"200": DeliveriesPage})
    def index(query: DeliveriesQuery) -> Response:
        """Webhooks that are or were owed, newest first, with each try"""
        caller = auth.caller()
        with deps.store.transaction() as tx:
            return present.answer(page(tx, None if caller.operator else caller.owner, query))

    @api.get("/<delivery_id>", operation_id="get_delivery", responses={"200": DeliveryDetail})
    def show(path: DeliveryPath) -> Response:
        """One of them, with its payload"""
        return present.answer(one(deps, auth.caller(), path.delivery_id))

    @api.post(
        "/<delivery_id>/replay",
        operation_id="replay_delivery",
        responses={"202": DeliveryDetail},
    )
    def again(path: DeliveryPath) -> Response:
        """Send it once more, under the same webhook-id"""
        return present.answer(replay(deps, waker, auth.caller(), path.delivery_id), 202)

    return api
