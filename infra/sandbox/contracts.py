"""One rented instance: its record, what may be asked of it, and how the REST shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infra.sandbox.hosts import HOURS_PER_MONTH, Host, Truth
from infra.sandbox.query import number

if TYPE_CHECKING:
    from infra.sandbox.faults import HostFault

MAX_ONSTART, MAX_ENV, MAX_LABEL_AT_CREATE, MIN_DISK_GB = 4048, 32768, 256, 8
#: What the record's `min_bid` is to the own bid: the least raise, not the market's price.
LEAST_RAISE = 1.2


class MarketError(Exception):
    """A refusal as the REST answers it: an HTTP status and the JSON's fields."""

    def __init__(self, status: int, error: str, msg: str, **more: Any) -> None:
        super().__init__(msg)
        self.status = status
        self.body: dict[str, Any] = {"success": False, "error": error, "msg": msg, **more}


@dataclass(eq=False)
class Contract:
    """One rented instance. Times are the market's seconds, dates real epoch seconds."""

    id: int
    host: Host
    label: str
    image: str
    disk: float
    env: dict[str, str]
    onstart: str
    args: list[str]
    runtype: str
    key: str
    #: $/h of the GPU: the host's, or the bid.
    gpu_price: float
    is_bid: bool
    start_date: float
    end_date: float
    created_at: float
    #: What its machine finds there, whatever the offer said.
    truth: Truth
    actual: str | None = None
    intended: str = "running"
    current: str = "running"
    following: str = "running"
    message: str | None = None
    #: Market time until which the bill is made.
    billed_until: float = 0.0
    #: When each next step of the boot is due, with the status and message that it brings.
    steps: list[tuple[float, str, str]] = field(default_factory=list)
    #: What else is due, and when: host faults, the return of a GPU, the contract's end.
    agenda: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    #: Host faults that wait for the moment at which their time begins.
    pending: list[HostFault] = field(default_factory=list)
    #: Which faults have struck or shape it, by kind.
    struck: set[str] = field(default_factory=set)
    charges: dict[str, float] = field(
        default_factory=lambda: {"gpu": 0.0, "disk": 0.0, "bwd": 0.0, "bwu": 0.0}
    )
    #: GB of the image that are still to come.
    image_gb: float = 0.0
    #: Whether its owner wants it to run; the market may not let it.
    wanted: bool = True
    #: Somebody with more right to the GPU has it.
    outbid: bool = False
    #: The GPU is free again, and its start is under way.
    resuming: bool = False
    #: Its owner lowered the bid below the least: nothing but a start brings it back.
    lowered: bool = False
    #: Its host is off line; `seen_as` is the status before.
    unseen: bool = False
    seen_as: str | None = None
    expired: bool = False
    #: Its destruction was confirmed, and is still to come.
    lingering: bool = False
    started_once: bool = False

    @property
    def cost(self) -> float:
        return sum(self.charges.values())

    @property
    def storage_price(self) -> float:
        """$/h of the disk."""
        return self.host.storage_cost * self.disk / HOURS_PER_MONTH

    @property
    def right(self) -> float:
        """Whoever has more of it gets the GPU: the bid, or without end on demand."""
        return self.gpu_price if self.is_bid else math.inf

    @property
    def runs(self) -> bool:
        """Whether the GPU is billed."""
        return self.actual == "running" and self.current == "running" and not self.unseen

    def halt(self) -> None:
        """The market's side of a stop, whoever wanted it."""
        self.intended = self.following = self.current = "stopped"
        self.steps = []

    def row(self) -> dict[str, Any]:
        """The instance as the REST shows it."""
        live, host = self.actual == "running", self.host
        total = self.gpu_price + self.storage_price
        least = max(host.min_bid, self.gpu_price * LEAST_RAISE) if self.is_bid else host.min_bid
        shown = host.offer(self.id, self.disk, bid=self.is_bid)
        for key in ("ask_contract_id", "rentable", "rented", "search", "is_bid", "duration"):
            del shown[key]
        return shown | {
            "id": self.id,
            "label": self.label or None,
            "actual_status": self.actual,
            "intended_status": self.intended,
            "cur_state": self.current,
            "next_state": self.following,
            "status_msg": self.message,
            "image_uuid": self.image,
            "image_runtype": self.runtype,
            "image_args": self.args,
            "onstart": self.onstart,
            "extra_env": [[key, value] for key, value in self.env.items()],
            "start_date": self.start_date,
            "end_date": self.end_date,
            "duration": host.duration_s,
            "uptime_mins": None,
            "is_bid": self.is_bid,
            "min_bid": least,
            "dph_base": self.gpu_price,
            "dph_total": total,
            "disk_space": self.disk,
            "disk_usage": -1,
            "gpu_util": None,
            "gpu_temp": None,
            "local_ipaddrs": "10.0.0.5 172.17.0.2 \n",
            "ssh_host": "ssh5.vast.ai",
            "ssh_port": 10000 + self.id % 50000,
            "ssh_idx": "5",
            "ports": {"22/tcp": [{"HostIp": "203.0.113.7", "HostPort": "33526"}]} if live else None,
            "instance": {
                "gpuCostPerHour": self.gpu_price if live else 0,
                "diskHour": self.storage_price,
                "totalHour": total if live else self.storage_price,
            },
            "volume_info": [],
            "credit_balance": None,
        }


def no_such_ask(ask: int, status: int) -> MarketError:
    """The offer is gone, in the words that go with each status (400, 404, 410 or 200)."""
    if status == 404:
        msg = f"error 404/3603: no_such_ask Instance type by id {ask} is not available."
        return MarketError(404, "invalid_args", msg, ask_id=ask)
    msg = f"error {status}/3907: no_such_ask Instance type {ask} is no longer available."
    return MarketError(status, "no_such_ask", msg)


def check_create(body: Mapping[str, Any], host: Host, ask: int) -> None:
    """Raises: MarketError, as Vast refuses what it cannot make."""
    env = body.get("env")
    disk = number(body.get("disk"), 10.0)
    problems = (
        (not body.get("image") and not body.get("template_hash_id"), "image is required"),
        (not MIN_DISK_GB <= disk <= host.disk_space, "disk is out of range"),
        (len(str(body.get("onstart") or "")) > MAX_ONSTART, "onstart is too long"),
        (len(json.dumps(env)) > MAX_ENV, "env is too long"),
        (len(str(body.get("label") or "")) > MAX_LABEL_AT_CREATE, "label is too long"),
    )
    for wrong, words in problems:
        if wrong:
            msg = f"error 400/3467: Invalid args: {words}"
            raise MarketError(400, "invalid_args", msg, ask_id=ask)
    price = body.get("price")
    if price is not None and not 0.001 <= number(price, 0.0) <= 128:
        raise MarketError(400, "invalid_price", "price is out of range", ask_id=ask)
