"""The sandbox's market: hosts and their offers, contracts with a life cycle, and the bill.

All of it lives in memory behind one lock. Time is the market's: `time_scale` seconds of it pass
in one real second (boot times, bills, rate limits); dates that go out are real ones.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.sandbox.hosts import Host, seeded
from infra.sandbox.machines import Machines

HOURS_PER_MONTH = 730
#: What the pull of an image brings over the line, in GB.
IMAGE_GB = 4.0
PAGE = 25
SEARCH_CAP = 64
MAX_ONSTART, MAX_ENV, MAX_LABEL_AT_CREATE, MAX_LABEL, MIN_DISK_GB = 4048, 32768, 256, 1024, 8
#: The stored columns that a list may be filtered and ordered by.
LIST_COLUMNS = frozenset(
    {"id", "label", "machine_id", "actual_status", "intended_status", "gpu_name", "verification"}
)
CDI_FAULT = (
    "Error response from daemon: failed to create task for container: failed to create shim task: "
    "OCI runtime create failed: could not apply required modification to OCI specification: error "
    "modifying OCI spec: failed to inject CDI devices: unresolvable CDI devices"
)
LAYERS = ("0d30c18b26f8", "9e3ea8720c6d", "4f4fb700ef54", "b26f1e0c7d32")


class MarketError(Exception):
    """A refusal as the REST answers it: an HTTP status and the JSON's fields."""

    def __init__(self, status: int, error: str, msg: str, **more: Any) -> None:
        super().__init__(msg)
        self.status = status
        self.body: dict[str, Any] = {"success": False, "error": error, "msg": msg, **more}


@dataclass
class Contract:
    """One rented instance."""

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
    created_at: float
    actual: str | None = None
    intended: str = "running"
    current: str = "running"
    following: str = "running"
    message: str | None = None
    #: Market time until which the bill is made.
    billed_until: float = 0.0
    #: When each next step of the boot is due, with the status and message that it brings.
    steps: list[tuple[float, str, str]] = field(default_factory=list)
    charges: dict[str, float] = field(
        default_factory=lambda: {"gpu": 0.0, "disk": 0.0, "bwd": 0.0, "bwu": 0.0}
    )
    queued_start: bool = False

    @property
    def cost(self) -> float:
        return sum(self.charges.values())

    @property
    def storage_price(self) -> float:
        """$/h of the disk."""
        return self.host.storage_cost * self.disk / HOURS_PER_MONTH


class Market:
    """Offers, contracts and the ledger of one account.

    Args:
        machines: runs what is rented.
        url: how machines reach this sandbox (their `VAST_URL`); set once the server listens.
        boot_s: market seconds from the contract to `running`; None takes each host's own.
        read_lag_s: market seconds for which a new contract is in no record and no list.
        credit: US dollars.
        clock: real epoch seconds.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        hosts: Sequence[Host] | None = None,
        seed: int = 0,
        time_scale: float = 1.0,
        boot_s: float | None = None,
        credit: float = 100.0,
        read_lag_s: float = 0.0,
        url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.machines, self.url, self.credit = machines, url, credit
        self.time_scale, self.boot_s, self.read_lag_s = time_scale, boot_s, read_lag_s
        self.lock = threading.RLock()
        self.contracts: dict[int, Contract] = {}
        #: Destroyed ones, for the charges.
        self.ended: list[Contract] = []
        self._clock, self._began = clock, clock()
        self._random = random.Random(seed)
        self._next_id = 20_000_000 + self._random.randrange(1_000_000)
        self._hosts = {host.machine_id: host for host in hosts or seeded(seed)}
        #: One ask per free host: ask id to machine id.
        self.asks: dict[int, int] = {self._number(): machine for machine in self._hosts}
        self._stopping: list[threading.Thread] = []

    def now(self) -> float:
        """Market seconds since it opened."""
        return (self._clock() - self._began) * self.time_scale

    # offers

    def search(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The offers that match a search body."""
        disk = _float(query.get("allocated_storage"), 10.0)
        bid = query.get("type") in ("bid", "interruptible")
        with self.lock:
            offers = [
                self._hosts[machine].offer(ask, disk, bid=bid) for ask, machine in self.asks.items()
            ]
        filters = {key: value for key, value in query.items() if isinstance(value, Mapping)}
        found = [offer for offer in offers if _matches(offer, filters)]
        _sort(found, _order(query.get("order")))
        limit = int(_float(query.get("limit"), SEARCH_CAP))
        return found[: min(max(limit, 0), SEARCH_CAP)]

    # contracts

    def create(self, ask: int, body: Mapping[str, Any]) -> Contract:
        """Rent `ask`. Raises: MarketError."""
        with self.lock:
            machine = self.asks.get(ask)
            if machine is None:
                raise _no_such_ask(ask, gone=bool(body.get("cancel_unavail")))
            host = self._hosts[machine]
            _check_create(body, host, ask)
            if self.credit <= 0:
                raise MarketError(400, "insufficient_credit", "Your account lacks credit.")
            contract = self._contract(host, body)
            del self.asks[ask]
            self.contracts[contract.id] = contract
            if contract.is_bid and contract.gpu_price < host.min_bid:
                # A real quirk: refused, and yet there is a (stopped) contract.
                contract.intended = contract.current = contract.following = "stopped"
                contract.actual, contract.steps = "created", []
                raise MarketError(
                    400, "invalid_price", "Bid is too low.", new_contract=contract.id, ask_id=ask
                )
            return contract

    def get(self, number: int) -> Contract | None:
        """The contract, once reads show it."""
        with self.lock:
            contract = self.contracts.get(number)
            return contract if contract and self._readable(contract) else None

    def need(self, number: int) -> Contract:
        """Raises: MarketError (404)."""
        contract = self.contracts.get(number)
        if contract is None:
            raise MarketError(404, "no_such_instance", f"Instance {number} not found.")
        return contract

    def destroy(self, number: int) -> None:
        """End a contract; its host is offered again under a new ask. The processes are killed
        just after, so that a machine which destroys itself can still read the answer."""
        with self.lock:
            contract = self.need(number)
            self._bill(contract)
            del self.contracts[number]
            contract.current = "unloaded"
            self.ended.append(contract)
            killer = threading.Thread(target=self._tear_down, args=(contract,), daemon=True)
            killer.start()
            self._stopping = [*filter(threading.Thread.is_alive, self._stopping), killer]

    def stop(self, number: int) -> None:
        with self.lock:
            contract = self.need(number)
            contract.intended = contract.following = contract.current = "stopped"
            contract.steps = []
            contract.queued_start = False
            if self._ending(contract):
                # The next ticks see its processes end.
                contract.actual = "running"
                self.machines.stop(str(number))
            else:
                contract.actual = "stopped"

    def start(self, number: int) -> None:
        """Raises: MarketError (200!), when the GPU is taken: the start is queued."""
        with self.lock:
            contract = self.need(number)
            contract.intended = contract.following = "running"
            if contract.queued_start:
                raise MarketError(
                    200,
                    "resources_unavailable",
                    "Required resources are currently unavailable, state change queued.",
                )
            if contract.current != "running":
                contract.current = "running"
                contract.steps = [
                    (self.now(), "loading", "starting"),
                    (self.now() + 0.2 * self._boot(contract.host), "running", ""),
                ]

    def label(self, number: int, label: str) -> None:
        with self.lock:
            contract = self.need(number)
            if len(label) > MAX_LABEL:
                raise MarketError(400, "label_too_long", f"at most {MAX_LABEL} characters")
            contract.label = label

    def bid(self, number: int, price: float) -> None:
        with self.lock:
            contract = self.contracts.get(number)
            if contract is None:
                raise MarketError(404, "no_such_instance", "Instance with that ID does not exist.")
            if not 0.001 <= price <= 32 * contract.host.num_gpus:
                raise MarketError(400, "invalid_price", "price is out of range")
            self._bill(contract)
            contract.gpu_price = price

    def page(
        self, filters: Mapping[str, Any], order: Any, limit: int, after: str | None
    ) -> dict[str, Any]:
        """One page of the list. Raises: MarketError (400)."""
        columns = [column for column, _ in _order(order)]
        for column in (*filters, *columns):
            if column not in LIST_COLUMNS:
                msg = f"Error in query parameters: {column} is not a valid search key"
                raise MarketError(400, "invalid_request", msg)
        with self.lock:
            shown = [item for item in self.contracts.values() if self._readable(item)]
            everything = [self.row(contract) for contract in shown]
        rows = [row for row in everything if _matches(row, filters)]
        _sort(rows, _order(order) or [("id", "asc")])
        first = _read_token(after, rows) if after else 0
        page = rows[first : first + min(max(limit, 1), PAGE)]
        more = first + len(page) < len(rows)
        labels = [row["label"] or "" for row in everything]
        return {
            "success": True,
            "instances_found": len(rows),
            "total_instances": len(everything),
            "label_counts": {label: labels.count(label) for label in sorted(set(labels))},
            "next_token": _token(first + len(page), page[-1]["id"]) if more else None,
            "instances": page,
        }

    def row(self, contract: Contract) -> dict[str, Any]:
        """An instance as the REST shows it."""
        with self.lock:
            host, live = contract.host, contract.actual == "running"
            total = contract.gpu_price + contract.storage_price
            shown = host.offer(contract.id, contract.disk, bid=contract.is_bid)
            for key in ("ask_contract_id", "rentable", "rented", "search", "is_bid", "duration"):
                del shown[key]
            return shown | {
                "id": contract.id,
                "label": contract.label or None,
                "actual_status": contract.actual,
                "intended_status": contract.intended,
                "cur_state": contract.current,
                "next_state": contract.following,
                "status_msg": contract.message,
                "image_uuid": contract.image,
                "image_runtype": contract.runtype,
                "image_args": contract.args,
                "onstart": contract.onstart,
                "extra_env": [[key, value] for key, value in contract.env.items()],
                "start_date": contract.start_date,
                "end_date": contract.start_date + host.duration_s,
                "duration": host.duration_s,
                "uptime_mins": None,
                "is_bid": contract.is_bid,
                "dph_base": contract.gpu_price,
                "dph_total": total,
                "disk_space": contract.disk,
                "disk_usage": -1,
                "gpu_util": None,
                "gpu_temp": None,
                "local_ipaddrs": "10.0.0.5 172.17.0.2 \n",
                "ssh_host": "ssh5.vast.ai",
                "ssh_port": 10000 + contract.id % 50000,
                "ssh_idx": "5",
                "ports": {"22/tcp": [{"HostIp": "203.0.113.7", "HostPort": "33526"}]}
                if live
                else None,
                "instance": {
                    "gpuCostPerHour": contract.gpu_price if live else 0,
                    "diskHour": contract.storage_price,
                    "totalHour": total if live else contract.storage_price,
                },
                "volume_info": [],
                "credit_balance": None,
            }

    def bill(self) -> dict[str, Any]:
        """All charges so far, one result per instance."""
        with self.lock:
            everything = [*self.ended, *self.contracts.values()]
            results = [
                {
                    "start": contract.start_date,
                    "end": contract.start_date + contract.billed_until - contract.created_at,
                    "type": "instance",
                    "source": f"instance-{contract.id}",
                    "amount": contract.cost,
                    "metadata": {"label": contract.label},
                    "items": [
                        {"type": kind, "amount": dollars}
                        for kind, dollars in contract.charges.items()
                    ],
                }
                for contract in everything
            ]
        count = len(results)
        return {
            "success": True,
            "count": count,
            "total": count,
            "next_token": None,
            "results": results,
        }

    # what a rehearsal does to an instance

    def abandon(self, number: int, message: str = CDI_FAULT) -> None:
        """The host cannot start it: `created`, meant to be stopped, and so for ever."""
        with self.lock:
            contract = self.need(number)
            contract.actual, contract.message, contract.steps = "created", message, []
            contract.intended = contract.current = contract.following = "stopped"

    def stick(self, number: int, message: str = "Retrying in 5 seconds") -> None:
        """It never comes further than `loading`."""
        with self.lock:
            contract = self.need(number)
            contract.actual, contract.message, contract.steps = "loading", message, []

    def outbid(self, number: int) -> None:
        """Somebody else gets the GPU: processes end at once, a start is only queued."""
        with self.lock:
            self.stop(number)
            self.need(number).queued_start = True

    def lose(self, number: int) -> None:
        """The host goes off line; the container runs on, unseen and unbilled."""
        with self.lock:
            contract = self.need(number)
            self._bill(contract)
            contract.actual = "offline"

    def regain(self, number: int) -> None:
        """The host is back, with its container as it was."""
        with self.lock:
            contract = self.need(number)
            self._bill(contract)
            contract.actual = "running"

    # time

    def tick(self) -> None:
        """Bill, boot, and notice containers that ended. To be called every moment."""
        with self.lock:
            for contract in list(self.contracts.values()):
                self._bill(contract)
                self._advance(contract)
            if self.credit <= 0:
                for contract in self.contracts.values():
                    if contract.intended == "running":
                        self.stop(contract.id)

    def close(self) -> None:
        """Destroy everything and wait until it is gone."""
        for number in list(self.contracts):
            self.destroy(number)
        self.settle()

    def settle(self) -> None:
        """Wait until everything destroyed so far is gone."""
        for killer in list(self._stopping):
            killer.join()

    def _readable(self, contract: Contract) -> bool:
        return self.now() >= contract.created_at + self.read_lag_s

    def _number(self) -> int:
        self._next_id += self._random.randrange(1, 40)
        return self._next_id

    def _boot(self, host: Host) -> float:
        return host.boot_s if self.boot_s is None else self.boot_s

    def _contract(self, host: Host, body: Mapping[str, Any]) -> Contract:
        now, boot = self.now(), self._boot(host)
        env = body.get("env")
        image, price = str(body.get("image")), body.get("price")
        steps = [(now + 0.1 * boot, "created", ""), (now + 0.2 * boot, "loading", "")]
        steps += [
            (now + (0.3 + 0.15 * index) * boot, "loading", f"{layer}: Pull complete")
            for index, layer in enumerate(LAYERS)
        ]
        steps.append((now + boot, "running", ""))
        return Contract(
            id=self._number(),
            host=host,
            label=str(body.get("label") or ""),
            image=image,
            disk=_float(body.get("disk"), 10.0),
            # A string of docker flags is not applied by the REST API.
            env={str(k): str(v) for k, v in env.items()} if isinstance(env, Mapping) else {},
            onstart=str(body.get("onstart") or ""),
            args=[str(item) for item in body.get("args") or []],
            runtype=str(body.get("runtype") or "ssh"),
            key=secrets.token_hex(32),
            gpu_price=host.dph_base if price is None else _float(price, host.dph_base),
            is_bid=price is not None,
            start_date=self._clock(),
            created_at=now,
            billed_until=now,
            steps=steps,
        )

    def _bill(self, contract: Contract) -> None:
        now = self.now()
        hours = max(0.0, now - contract.billed_until) / 3600
        contract.billed_until = now
        if contract.actual == "offline":
            return
        items = {"disk": hours * contract.storage_price}
        if contract.actual == "running":
            items["gpu"] = hours * contract.gpu_price
        self._charge(contract, items)

    def _charge(self, contract: Contract, items: Mapping[str, float]) -> None:
        for kind, dollars in items.items():
            contract.charges[kind] += dollars
            self.credit -= dollars

    def _advance(self, contract: Contract) -> None:
        if contract.actual == "running" and not contract.steps:
            code = self.machines.exit_code(str(contract.id))
            if code is not None:
                contract.actual = "exited"
            return
        while contract.steps and contract.steps[0][0] <= self.now():
            if contract.steps[0][1] == "running" and self._ending(contract):
                return
            _, contract.actual, contract.message = contract.steps.pop(0)
            if contract.actual == "running":
                if not contract.charges["bwd"]:
                    self._charge(contract, {"bwd": IMAGE_GB * contract.host.inet_down_cost})
                self._launch(contract)

    def _ending(self, contract: Contract) -> bool:
        """Whether a container of this contract has still to end."""
        return self.machines.exit_code(str(contract.id)) is None

    def _launch(self, contract: Contract) -> None:
        kind = "ssh" if "ssh" in contract.runtype or "jupyter" in contract.runtype else "args"
        contract.message = f"success, running {contract.image}/{kind}"
        env = {key: value for key, value in contract.env.items() if not key.startswith("-")}
        self.machines.start(
            str(contract.id),
            env={
                **env,
                "CONTAINER_ID": str(contract.id),
                "CONTAINER_API_KEY": contract.key,
                "VAST_CONTAINERLABEL": f"C.{contract.id}",
                "VAST_URL": self.url,
                "GPU_COUNT": str(contract.host.num_gpus),
                "STOKER_SANDBOX": "1",
            },
            onstart=contract.onstart,
            args=contract.args if kind == "args" else [],
            stays=kind == "ssh",
        )

    def _tear_down(self, contract: Contract) -> None:
        time.sleep(0.05)
        self.machines.destroy(str(contract.id))
        with self.lock:
            self.asks[self._number()] = contract.host.machine_id


def _no_such_ask(ask: int, *, gone: bool) -> MarketError:
    if gone:
        msg = f"error 410/3907: no_such_ask Instance type {ask} is no longer available."
        return MarketError(410, "no_such_ask", msg)
    msg = f"error 404/3603: no_such_ask Instance type by id {ask} is not available."
    return MarketError(404, "invalid_args", msg, ask_id=ask)


def _check_create(body: Mapping[str, Any], host: Host, ask: int) -> None:
    """Raises: MarketError."""
    env = body.get("env")
    disk = _float(body.get("disk"), 10.0)
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
    if price is not None and not 0.001 <= _float(price, 0.0) <= 128:
        raise MarketError(400, "invalid_price", "price is out of range", ask_id=ask)


def _matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    return all(
        _compare(_column(row, column), operator, wanted)
        for column, conditions in filters.items()
        for operator, wanted in conditions.items()
    )


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column == "verified":
        return row.get("verification") == "verified"
    # Filtering offers on `id` matches nothing; `ask_contract_id` is the way.
    if column == "id" and "ask_contract_id" in row:
        return None
    return row.get(column)


def _compare(value: Any, operator: str, wanted: Any) -> bool:
    if operator in ("in", "notin"):
        options = wanted if isinstance(wanted, list) else [wanted]
        within = any(_compare(value, "eq", option) for option in options)
        return within is (operator == "in")
    if isinstance(value, str) and isinstance(wanted, str):
        left, right = value, wanted
        # A place is filtered by its country: the offer says "Ohio, US", the filter "US".
        if operator == "eq" and len(right) == 2 and left.endswith(f", {right}"):
            return True
    else:
        left, right = _sortable(value), _sortable(wanted)
        if value is None:
            return operator == "neq"
    return bool(
        {
            "eq": lambda: left == right,
            "neq": lambda: left != right,
            "gt": lambda: left > right,
            "gte": lambda: left >= right,
            "lt": lambda: left < right,
            "lte": lambda: left <= right,
        }.get(operator, lambda: False)()
    )


def _sortable(value: Any) -> Any:
    """Numbers may come as strings; what has no order comes first."""
    if isinstance(value, str):
        try:
            return (1, float(value), "")
        except ValueError:
            return (2, 0.0, value)
    return (1, float(value), "") if isinstance(value, int | float) else (0, 0.0, "")


def _sort(rows: list[dict[str, Any]], order: Sequence[tuple[str, str]]) -> None:
    for column, direction in reversed(order):
        rows.sort(key=lambda row: _sortable(row.get(column)), reverse=direction == "desc")


def _order(order: Any) -> list[tuple[str, str]]:
    """`[["dph_total", "asc"]]` of a search, or `[{"col": "id", "dir": "asc"}]` of a list."""
    pairs = []
    for item in order if isinstance(order, list) else []:
        if isinstance(item, Mapping):
            pairs.append((str(item.get("col")), str(item.get("dir"))))
        elif isinstance(item, list) and len(item) == 2:
            pairs.append((str(item[0]), str(item[1])))
    return pairs


def _float(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _token(position: int, last: int) -> str:
    return base64.b64encode(json.dumps({"values": {"id": last}, "at": position}).encode()).decode()


def _read_token(token: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Where the page after `token` begins. Raises: MarketError (400)."""
    try:
        read = json.loads(base64.b64decode(token, validate=True))
        position, last = int(read["at"]), read["values"]["id"]
    except (binascii.Error, ValueError, KeyError, TypeError):
        raise MarketError(400, "invalid_token", "after_token cannot be read") from None
    ids = [row["id"] for row in rows]
    return ids.index(last) + 1 if last in ids else min(position, len(rows))
