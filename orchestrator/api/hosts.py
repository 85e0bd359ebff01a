"""`/v1/hosts`: what we remember of rented machines. Only for keys with the scope `operator`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api import auth, present
from orchestrator.api.ids import plausible
from orchestrator.api.schemas import In, Out, Text
from orchestrator.deps import Deps
from state import hosts as memory
from state.errors import NotFound
from state.events import HostRecord
from state.store import Transaction


class RememberedHost(Out):
    """A machine as the market numbers it, whatever offer it comes under."""

    machine_id: str
    gpu: str
    geo: str
    good: float = Field(description="jobs it finished; half of the count is gone after a week")
    bad: float = Field(description="jobs it lost, by its own fault; fades likewise")
    lies: int = Field(description="how often it was not what its offer said")
    boot_s: float | None = Field(description="from the create call to its agent's hello")
    download_mbps: float | None = Field(description="as its agents measured it")
    steps_per_s: float | None = Field(description="training, in images of 512 px per second")
    last_seen_at: datetime | None = Field(description="when it last finished a job")
    last_failed_at: datetime | None
    last_reason: str
    blocked: bool
    blocked_why: str
    shunned: str | None = Field(description="why no job takes it now; null when one may")


class Hosts(Out):
    data: list[RememberedHost]
    total: int


class HostsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=1000)] = 1000


class HostPath(BaseModel):
    machine_id: str


class BlockIn(In):
    reason: Annotated[Text, Field(min_length=1, max_length=200)]


def shown(host: HostRecord, now: datetime) -> RememberedHost:
    name = memory.standing(host, now)
    return RememberedHost(
        machine_id=host.machine_id,
        gpu=host.gpu_name,
        geo=host.geo,
        good=round(name.good, 2),
        bad=round(name.bad, 2),
        lies=host.lies,
        boot_s=host.boot_s,
        download_mbps=host.download_mbps,
        steps_per_s=host.steps_per_s,
        last_seen_at=host.last_seen_at,
        last_failed_at=host.last_failed_at,
        last_reason=host.last_reason,
        blocked=host.blocked,
        blocked_why=host.blocked_why,
        shunned=memory.shunned(host, now),
    )


def _known(tx: Transaction, machine_id: str) -> HostRecord:
    """Raises: NotFound."""
    host = tx.host(machine_id) if plausible(machine_id) else None
    if host is None:
        raise NotFound(f"no machine {machine_id[:64]!r} is remembered")
    return host


def remembered(tx: Transaction, now: datetime) -> list[HostRecord]:
    """All machines that are remembered; those to look at first."""
    return memory.by_urgency(tx.hosts(), now)


def block(deps: Deps, machine_id: str, body: BlockIn) -> RememberedHost:
    """No job is to rent it any more; one that was never rented may be blocked too.

    Raises: NotFound, for what cannot be a machine's number.
    """
    if not plausible(machine_id):
        raise NotFound(f"{machine_id[:64]!r} is no machine's number")
    with deps.store.transaction() as tx:
        host = tx.host(machine_id) or HostRecord(machine_id=machine_id)
        host = memory.blocked(host, body.reason)
        tx.save_host(host)
    return shown(host, deps.clock())


def unblock(deps: Deps, machine_id: str) -> RememberedHost:
    """Jobs may rent it again, at once. Raises: NotFound."""
    with deps.store.transaction() as tx:
        host = memory.unblocked(_known(tx, machine_id))
        tx.save_host(host)
    return shown(host, deps.clock())


def hosts(deps: Deps) -> APIBlueprint:
    api = APIBlueprint(
        "hosts",
        __name__,
        url_prefix="/v1/hosts",
        abp_tags=[Tag(name="operators")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit_operator(deps.store))

    @api.get("", operation_id="list_hosts", responses={"200": Hosts})
    def index(query: HostsQuery) -> Response:
        """All machines that are remembered; those to look at first"""
        now = deps.clock()
        with deps.store.transaction() as tx:
            known = remembered(tx, now)
        data = [shown(host, now) for host in known[: query.limit]]
        return present.answer(Hosts(data=data, total=len(known)))

    @api.get("/<machine_id>", operation_id="get_host", responses={"200": RememberedHost})
    def show(path: HostPath) -> Response:
        """One machine"""
        with deps.store.transaction() as tx:
            host = _known(tx, path.machine_id)
        return present.answer(shown(host, deps.clock()))

    @api.post("/<machine_id>/block", operation_id="block_host", responses={"200": RememberedHost})
    def block_host(path: HostPath, body: BlockIn) -> Response:
        """No job is to rent it any more; one that runs on it is left to end"""
        return present.answer(block(deps, path.machine_id, body))

    @api.post(
        "/<machine_id>/unblock", operation_id="unblock_host", responses={"200": RememberedHost}
    )
    def unblock_host(path: HostPath) -> Response:
        """Jobs may rent it again, at once: what it did wrong before is forgotten"""
        return present.answer(unblock(deps, path.machine_id))

    return api
