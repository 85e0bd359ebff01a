"""`/v1/webhook-endpoints`: where webhooks of all jobs of an owner go, and which of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, cast

from flask import Response, request
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gpu_agent import wire
from orchestrator.api import auth, deliveries, idempotency, present, schemas
from orchestrator.api.auth import Caller
from orchestrator.api.bases import fault_of_url
from orchestrator.api.ids import new_id, plausible
from orchestrator.api.problems import Refusal
from orchestrator.api.schemas import In, Out, Text
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import endpoints as places
from state import record
from state.endpoints import Endpoint
from state.errors import NotFound
from state.events import Delivery, Outgoing, OutgoingStatus, Secret
from state.store import Transaction

#: A listener of the same owner that is unheard for so long goes when another one comes.
FORGOTTEN = timedelta(days=1)
BY_HAND = "by hand"


def _known(kind: str) -> str:
    if kind not in places.TYPES:
        raise ValueError(f"must be one of {', '.join(places.TYPES)}")
    return kind


EventType = Annotated[
    str, AfterValidator(_known), Field(json_schema_extra={"enum": list(places.TYPES)})
]
Description = Annotated[Text, Field(max_length=200)]
Address = Annotated[
    str | None,
    Field(min_length=1, max_length=2048, description="null: a listener, which fetches its own"),
]
Filter = Annotated[
    list[EventType], Field(max_length=len(places.TYPES), description="which to tell of; []: all")
]


class EndpointIn(In):
    """A place to tell. A secret is made when none is given."""

    url: Address
    events: Filter = Field(default=[])
    description: Description = ""
    secret: schemas.WebhookSecret | None = Field(default=None, repr=False)


class EndpointChange(In):
    """What is to be another; the rest stays."""

    url: Annotated[str, Field(max_length=2048)] = ""
    events: Filter = Field(default=[])
    description: Description = ""
    enabled: bool = True

    def said(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class _Optional(In):
    """A body that may be left out."""

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, value: object) -> object:
        return {} if value is None and not request.get_data() else value


class SampleIn(_Optional):
    """What to send: `webhook.test`, or a sample of another event."""

    type: EventType = places.TEST


class RotateIn(_Optional):
    overlap_s: Annotated[int, Field(ge=0, le=int(places.LONGEST_OVERLAP.total_seconds()))] = Field(
        default=int(places.OVERLAP.total_seconds()),
        description="for so many seconds the old secret is good as well; 0 ends it now",
    )


class Webhook(Out):
    """A place to tell."""

    id: str
    owner: str
    url: str | None = Field(description="null: a listener")
    events: list[str]
    description: str
    enabled: bool
    disabled_at: datetime | None
    disabled_why: str
    created_at: datetime
    heard_at: datetime | None = Field(description="when a listener last fetched")
    old_secret_until: datetime | None = Field(
        description="until then deliveries are signed with the old secret too"
    )


class NewWebhook(Webhook):
    secret: str = Field(description="shown in this answer only")


class Webhooks(Out):
    data: list[Webhook]


class WebhookPath(BaseModel):
    endpoint_id: str


class WebhooksQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mine: bool = Field(default=False, description="for operators: not everybody's")


class WaitingQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=100)] = 100


class Waiting(Out):
    """What a listener is to be told, oldest first."""

    data: list[deliveries.DeliveryDetail]


class AnswerIn(In):
    """What became of one."""

    delivery: Annotated[str, Field(max_length=140)]
    answer: Annotated[int, Field(ge=0, le=599, description="HTTP status, 0 when there was none")]
    took_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0
    error: Annotated[Text, Field(max_length=500)] = ""


class AnswersIn(In):
    data: Annotated[list[AnswerIn], Field(min_length=1, max_length=100)]


class Answered(Out):
    taken: int = Field(description="how many of them had waited")


def shown(endpoint: Endpoint, now: datetime) -> Webhook:
    until = endpoint.old_secret_until
    return Webhook(
        id=endpoint.id,
        owner=endpoint.owner,
        url=endpoint.url or None,
        events=list(endpoint.events),
        description=endpoint.description,
        enabled=endpoint.disabled_at is None,
        disabled_at=endpoint.disabled_at,
        disabled_why=endpoint.disabled_why,
        created_at=endpoint.created_at,
        heard_at=endpoint.heard_at,
        old_secret_until=until if until is not None and now < until else None,
    )


def _new(endpoint: Endpoint, secret: Secret, now: datetime) -> NewWebhook:
    return NewWebhook(**shown(endpoint, now).model_dump(), secret=secret.reveal())


def visible(tx: Transaction, endpoint_id: str, caller: Caller, *, lock: bool = False) -> Endpoint:
    """Raises: NotFound, also for what belongs to somebody else."""
    if plausible(endpoint_id):
        endpoint = tx.endpoint(endpoint_id, lock=lock)
        if caller.sees(endpoint.owner):
            return endpoint
    raise NotFound(f"no webhook endpoint {endpoint_id[:64]!r}")


def _check_url(deps: Deps, url: str | None) -> None:
    """Raises: Refusal 422."""
    if url is None:
        return
    if fault := fault_of_url(url, plain_http=deps.settings.private_webhooks):
        raise Refusal(
            422, "invalid", "the endpoint cannot be called; see errors", errors=[("/url", fault)]
        )


def _secret(given: str | None) -> Secret:
    """Raises: Refusal 422."""
    if given is None:
        return Secret(wire.new_secret())
    try:
        wire.secret_key(given)
    except wire.WireError as error:
        faults = [("/secret", str(error))]
        raise Refusal(422, "invalid", "the secret is no use", errors=faults) from None
    return Secret(given)


# --- what the routes do; pages call these too -------------------------------------------------


def all_of(tx: Transaction, owner: str | None, now: datetime) -> list[Webhook]:
    """The owner's endpoints, or everybody's; oldest first."""
    return [shown(endpoint, now) for endpoint in tx.endpoints(owner)]


def one(deps: Deps, caller: Caller, endpoint_id: str) -> Webhook:
    """Raises: NotFound."""
    with deps.store.transaction() as tx:
        return shown(visible(tx, endpoint_id, caller), deps.clock())


def create(
    deps: Deps, caller: Caller, body: EndpointIn, key: str | None = None
) -> tuple[NewWebhook, bool]:
    """The new endpoint with its secret, and whether an earlier request with `key` made it.

    Raises:
        Refusal: 422 for what cannot be called; 409 when the owner has too many.
    """
    _check_url(deps, body.url)
    secret, now = _secret(body.secret), deps.clock()
    with deps.store.transaction() as tx:
        stored = _begin(tx, caller, key, {"create": body.model_dump()}, now)
        if stored is not None:
            return _again(tx, caller, stored, now), True
        # one after the other, or two at once would both be the last that may be
        tx.lock(f"webhook-endpoints/{caller.owner}")
        present = _without_forgotten(tx, caller.owner, now)
        if len(present) >= places.MOST:
            raise Refusal(
                409, "too_many", f"{places.MOST} webhook endpoints are the most; delete one first"
            )
        endpoint = Endpoint(
            id=new_id("we", now),
            owner=caller.owner,
            created_at=now,
            url=body.url or "",
            events=tuple(dict.fromkeys(body.events)),
            description=body.description,
        )
        tx.add_endpoint(endpoint, secrets=[secret])
        _finish(tx, caller, key, endpoint)
    return _new(endpoint, secret, now), False


def _without_forgotten(tx: Transaction, owner: str, now: datetime) -> list[Endpoint]:
    """The owner's endpoints; listeners that nobody started again are gone."""
    stay = []
    for endpoint in tx.endpoints(owner):
        if endpoint.listener and now - (endpoint.heard_at or endpoint.created_at) > FORGOTTEN:
            tx.disable_outgoing(endpoint.id, now)
            tx.delete_endpoint(endpoint.id)
        else:
            stay.append(endpoint)
    return stay


def change(deps: Deps, caller: Caller, endpoint_id: str, body: EndpointChange) -> Webhook:
    """Give it another URL, filter or description, disable or enable it.

    What waits for an endpoint when it is disabled is disabled too, and can be replayed.

    Raises:
        NotFound; Refusal: 422 the URL cannot be called; 409 a listener has none.
    """
    said, now = body.said(), deps.clock()
    if "url" in said:
        _check_url(deps, body.url)
    with deps.store.transaction() as tx:
        endpoint = visible(tx, endpoint_id, caller, lock=True)
        if "url" in said and endpoint.listener:
            raise Refusal(409, "listener", "a listener has no URL; make another endpoint")
        enabled = said.pop("enabled", None)
        if "events" in said:
            said["events"] = tuple(dict.fromkeys(body.events))
        endpoint = endpoint.evolve(**said)
        if enabled is True:
            endpoint = endpoint.evolve(disabled_at=None, disabled_why="")
        elif enabled is False:
            endpoint = endpoint.disabled(now, BY_HAND)
            tx.disable_outgoing(endpoint.id, now)
        tx.save_endpoint(endpoint)
    return shown(endpoint, now)


def remove(deps: Deps, caller: Caller, endpoint_id: str) -> None:
    """Nothing is sent to it any more; what was sent stays in the log. Raises: NotFound."""
    with deps.store.transaction() as tx:
        endpoint = visible(tx, endpoint_id, caller, lock=True)
        tx.disable_outgoing(endpoint.id, deps.clock())
        tx.delete_endpoint(endpoint.id)


def send_test(
    deps: Deps, waker: Waker, caller: Caller, endpoint_id: str, kind: str = places.TEST
) -> deliveries.DeliveryDetail:
    """Owe it a test or a sample of an event, due now, whatever its filter says.

    Raises:
        NotFound; Refusal: 409 it is disabled.
    """
    now = deps.clock()
    with deps.store.transaction() as tx:
        endpoint = visible(tx, endpoint_id, caller, lock=True)
        deliveries.check_open(endpoint)
        endpoint = endpoint.evolve(owed=endpoint.owed + 1)
        tx.save_endpoint(endpoint)
        row = Outgoing(
            id=f"{endpoint.id}.{endpoint.owed}",
            job=endpoint.id,
            seq=endpoint.owed,
            type=kind,
            created_at=now,
            payload=places.sample(kind, endpoint, endpoint.owed, record.rfc3339(now)),
            due_at=endpoint.due(now),
            endpoint=endpoint.id,
            owner=endpoint.owner,
        )
        tx.add_outgoing([row])
    waker(row.queue, ("relay",))
    return deliveries.shown(row, [])


def rotate(
    deps: Deps,
    caller: Caller,
    endpoint_id: str,
    overlap: timedelta = places.OVERLAP,
    key: str | None = None,
) -> tuple[NewWebhook, bool]:
    """Another secret; for `overlap` the present one is good beside it, and both sign. The second
    value: whether an earlier request with `key` did it.

    Raises:
        NotFound; Refusal: 409 the last rotation is still under way, and this one would end a
        secret before its time (without an overlap, that is what is asked for).
    """
    now = deps.clock()
    with deps.store.transaction() as tx:
        asked = {"rotate": endpoint_id, "overlap": overlap.total_seconds()}
        stored = _begin(tx, caller, key, asked, now)
        if stored is not None:
            return _again(tx, caller, stored, now), True
        endpoint = visible(tx, endpoint_id, caller, lock=True)
        good = list(endpoint.in_force(tx.webhook_secrets(endpoint.id), now))
        if overlap and len(good) > 1:
            until = record.rfc3339(cast(datetime, endpoint.old_secret_until))
            raise Refusal(
                409,
                "rotating",
                f"two secrets are good until {until}; overlap_s 0 ends both of them now",
            )
        secret = Secret(wire.new_secret())
        tx.set_webhook_secrets(endpoint.id, [*good, secret] if overlap else [secret])
        endpoint = endpoint.evolve(old_secret_until=now + overlap if overlap else None)
        tx.save_endpoint(endpoint)
        _finish(tx, caller, key, endpoint)
    return _new(endpoint, secret, now), False


def _begin(
    tx: Transaction, caller: Caller, key: str | None, asked: object, now: datetime
) -> Mapping[str, Any] | None:
    return None if key is None else idempotency.begin(tx, caller.owner, key, asked, now)


def _finish(tx: Transaction, caller: Caller, key: str | None, endpoint: Endpoint) -> None:
    if key is not None:
        tx.finish_idempotent(caller.owner, key, {"endpoint": endpoint.id})


def _again(tx: Transaction, caller: Caller, stored: Mapping[str, Any], now: datetime) -> NewWebhook:
    # The secret is no part of what is stored: it lies encrypted beside its endpoint.
    endpoint = visible(tx, str(stored.get("endpoint", "")), caller)
    return _new(endpoint, tx.webhook_secrets(endpoint.id)[-1], now)


# --- listeners --------------------------------------------------------------------------------


def _listener(endpoint: Endpoint) -> Endpoint:
    """Raises: Refusal 409."""
    if not endpoint.listener:
        raise Refusal(409, "no_listener", "what this endpoint is owed is sent to its URL")
    return endpoint


def waiting(
    deps: Deps, caller: Caller, endpoint_id: str, limit: int = 100
) -> list[deliveries.DeliveryDetail]:
    """What a listener is to be told, oldest first; it counts as heard.

    Raises:
        NotFound; Refusal: 409 it is no listener.
    """
    now = deps.clock()
    with deps.store.transaction() as tx:
        endpoint = _listener(visible(tx, endpoint_id, caller))
        if endpoint.heard_at is None or now - endpoint.heard_at >= places.HEARD:
            endpoint = tx.endpoint(endpoint.id, lock=True)
            tx.save_endpoint(endpoint.evolve(heard_at=now))
        found = tx.waiting_outgoing(endpoint.id, limit)
    return [deliveries.shown(row, []) for row in found]


def answered(deps: Deps, caller: Caller, endpoint_id: str, answers: list[AnswerIn]) -> int:
    """A listener says what became of what it fetched; how many of those had waited.

    They are delivered then, whatever the answer: whoever listens sees it, and may replay.

    Raises:
        NotFound; Refusal: 409 it is no listener.
    """
    now, taken = deps.clock(), 0
    with deps.store.transaction() as tx:
        endpoint = _listener(visible(tx, endpoint_id, caller))
        for answer in sorted(answers, key=lambda item: item.delivery):
            row = deliveries.visible(tx, answer.delivery, caller, lock=True)
            if row.endpoint != endpoint.id:
                raise NotFound(f"no delivery {answer.delivery!r} of this endpoint")
            if row.status is not OutgoingStatus.WAITING:
                continue
            done = row.evolve(
                status=OutgoingStatus.DELIVERED, due_at=None, ended_at=now, tries=row.tries + 1
            )
            tx.save_outgoing(done)
            tx.log_delivery(
                Delivery(
                    outgoing=row.id,
                    job=row.job,
                    tried_at=now - timedelta(milliseconds=answer.took_ms),
                    answer=answer.answer,
                    took_ms=answer.took_ms,
                    error=answer.error,
                )
            )
            taken += 1
    return taken


# --- routes -----------------------------------------------------------------------------------


def webhook_endpoints(deps: Deps, waker: Waker) -> APIBlueprint:
    api = APIBlueprint(
        "webhook_endpoints",
        __name__,
        url_prefix="/v1/webhook-endpoints",
        abp_tags=[Tag(name="webhooks")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))

    def with_secret(made: NewWebhook, replayed: bool, status: int) -> Response:
        headers = {"Location": f"/v1/webhook-endpoints/{made.id}", "Cache-Control": "no-store"}
        if replayed:
            headers["Idempotent-Replayed"] = "true"
        return present.answer(made, status, headers)

    @api.post("", operation_id="create_webhook_endpoint", responses={"201": NewWebhook})
    def create_one(header: schemas.JobHeader, body: EndpointIn) -> Response:
        """Tell of all jobs at one more place; the secret is shown in this answer only"""
        made, replayed = create(deps, auth.caller(), body, header.idempotency_key)
        return with_secret(made, replayed, 201)

    @api.get("", operation_id="list_webhook_endpoints", responses={"200": Webhooks})
    def index(query: WebhooksQuery) -> Response:
        """All of them, oldest first"""
        caller = auth.caller()
        everybody = caller.operator and not query.mine
        with deps.store.transaction() as tx:
            found = all_of(tx, None if everybody else caller.owner, deps.clock())
        return present.answer(Webhooks(data=found))

    @api.get("/<endpoint_id>", operation_id="get_webhook_endpoint", responses={"200": Webhook})
    def show(path: WebhookPath) -> Response:
        """One of them"""
        return present.answer(one(deps, auth.caller(), path.endpoint_id))

    @api.patch("/<endpoint_id>", operation_id="update_webhook_endpoint", responses={"200": Webhook})
    def update(path: WebhookPath, body: EndpointChange) -> Response:
        """Another URL, filter or description; enable or disable it"""
        return present.answer(change(deps, auth.caller(), path.endpoint_id, body))

    @api.delete("/<endpoint_id>", operation_id="delete_webhook_endpoint", responses={"204": None})
    def delete(path: WebhookPath) -> Response:
        """Tell there no more; what was sent stays in the log"""
        remove(deps, auth.caller(), path.endpoint_id)
        return Response(status=204)

    @api.post(
        "/<endpoint_id>/test",
        operation_id="test_webhook_endpoint",
        responses={"202": deliveries.DeliveryDetail},
    )
    def test_one(path: WebhookPath, body: SampleIn) -> Response:
        """Send a test, or a sample of an event, now"""
        return present.answer(
            send_test(deps, waker, auth.caller(), path.endpoint_id, body.type), 202
        )

    @api.post(
        "/<endpoint_id>/rotate-secret",
        operation_id="rotate_webhook_secret",
        responses={"200": NewWebhook},
    )
    def rotate_one(path: WebhookPath, header: schemas.JobHeader, body: RotateIn) -> Response:
        """Another secret, shown in this answer only; for a while the old one is good too"""
        overlap = timedelta(seconds=body.overlap_s)
        caller, key = auth.caller(), header.idempotency_key
        made, replayed = rotate(deps, caller, path.endpoint_id, overlap, key)
        return with_secret(made, replayed, 200)

    @api.get(
        "/<endpoint_id>/waiting",
        operation_id="list_waiting_webhooks",
        responses={"200": Waiting},
    )
    def fetch(path: WebhookPath, query: WaitingQuery) -> Response:
        """For a listener: what it is to be told, oldest first"""
        found = waiting(deps, auth.caller(), path.endpoint_id, query.limit)
        return present.answer(Waiting(data=found))

    @api.post(
        "/<endpoint_id>/answers",
        operation_id="answer_waiting_webhooks",
        responses={"200": Answered},
    )
    def say(path: WebhookPath, body: AnswersIn) -> Response:
        """For a listener: what became of what it fetched"""
        taken = answered(deps, auth.caller(), path.endpoint_id, body.data)
        return present.answer(Answered(taken=taken))

    return api
