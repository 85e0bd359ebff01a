"""The life of contracts: boots, stops, rivals for a GPU, lost hosts, bills, the end.

All of it lives in memory behind one lock. Time is the market's: `time_scale` seconds of it pass
in one real second (boot times, bills, rate limits); dates that go out are real ones. Whatever
was due between two ticks happens in its order and is billed to its own second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from infra.sandbox.contracts import Contract, MarketError
from infra.sandbox.faults import SHAPING, Faults, HostFault
from infra.sandbox.hosts import Host
from infra.sandbox.ledger import Ledger
from infra.sandbox.machines import Machines
from infra.sandbox.notify import Tell

#: What the pull of an image brings over the line, in GB.
IMAGE_GB = 4.0
LAYERS = ("0d30c18b26f8", "9e3ea8720c6d", "4f4fb700ef54", "b26f1e0c7d32")
#: Market seconds from a GPU's return to the start of the container that was put off it.
RESUME_S = 20.0
#: How long somebody stays who took a GPU from under a fresh contract.
RIVAL_STAYS_S = 1800.0
#: How long (market seconds) a contract is kept that has ended, or whose account has no credit.
EXPIRED_LIFE_S = 48 * 3600.0
UNPAID_LIFE_S = 48 * 3600.0
LOW_CREDIT = 5.0
CDI_FAULT = (
    "Error response from daemon: failed to create task for container: failed to create shim task: "
    "OCI runtime create failed: could not apply required modification to OCI specification: error "
    "modifying OCI spec: failed to inject CDI devices: unresolvable CDI devices"
)
PULL_DENIED = (
    "Error response from daemon: pull access denied for {image}, repository does not exist or may "
    "require 'docker login': denied: requested access to the resource is denied"
)
QUEUED = "Required resources are currently unavailable, state change queued."


def holder(wanting: Sequence[Contract], rival: float | None) -> Contract | None:
    """Who gets the GPU: the one with most right to it; among equals the one that has it. None
    when it is the rival outside."""
    if not wanting:
        return None
    best = max(wanting, key=lambda item: (item.right, not item.outbid, -item.id))
    if rival is not None and (rival > best.right or (rival == best.right and best.outbid)):
        return None
    return best


class Life:
    """The contracts of one account, and their time.

    Args:
        machines: runs what is rented.
        url: how machines reach this sandbox (their `VAST_URL`); set once the server listens.
        boot_s: market seconds from the contract to `running`; None takes each host's own.
        read_lag_s: market seconds for which a new contract is in no record and no list.
        charges_lag_s: market seconds by which the list of charges is late.
        credit: US dollars.
        faults: what befalls calls and hosts.
        tell: hears of events, as Vast's notifications tell them.
        clock: real epoch seconds.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        time_scale: float = 1.0,
        boot_s: float | None = None,
        credit: float = 100.0,
        read_lag_s: float = 0.0,
        charges_lag_s: float = 0.0,
        url: str = "",
        faults: Faults | None = None,
        tell: Tell = lambda event, **data: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.machines, self.url = machines, url
        self.time_scale, self.boot_s, self.read_lag_s = time_scale, boot_s, read_lag_s
        self.faults = faults or Faults()
        self.ledger = Ledger(credit, lag_s=charges_lag_s)
        self.lock = threading.RLock()
        self.contracts: dict[int, Contract] = {}
        #: Destroyed ones, for the charges.
        self.ended: list[Contract] = []
        #: Destroyed ones whose host is off line: their processes run until it is back.
        self.strays: dict[int, Contract] = {}
        #: Others who use or want a GPU: machine id → their bid, or infinity on demand.
        self.rivals: dict[int, float] = {}
        #: How many of them there were: machine id → count.
        self._turns: dict[int, int] = {}
        #: The account's variables, given to every container.
        self.secrets: dict[str, str] = {}
        self.tell = tell
        self._clock, self._began = clock, clock()
        self._stopping: list[threading.Thread] = []
        self._unpaid_since: float | None = None
        self._low = False
        #: What is due for the market as a whole, and the time of what is just happening.
        self._agenda: list[tuple[float, Callable[[], None]]] = []
        self._instant: float | None = None

    @property
    def credit(self) -> float:
        return self.ledger.credit

    @credit.setter
    def credit(self, dollars: float) -> None:
        with self.lock:
            self.ledger.credit = dollars

    def now(self) -> float:
        """Market seconds since it opened."""
        return (self._clock() - self._began) * self.time_scale

    def at(self) -> float:
        """The market time of what is just happening."""
        return self.now() if self._instant is None else self._instant

    def date(self, at: float) -> float:
        """The real epoch seconds of a market time."""
        return self._began + at / self.time_scale

    # the owner's verbs

    def need(self, number: int) -> Contract:
        """Raises: MarketError (404)."""
        contract = self.contracts.get(number)
        if contract is None:
            raise MarketError(404, "no_such_instance", f"Instance {number} not found.")
        return contract

    def _current(self, number: int) -> Contract:
        """The contract, with all that was due behind it. Raises: MarketError (404)."""
        contract = self.need(number)
        if self._instant is None:
            self._catch_up(contract, self.now())
            contract = self.need(number)
        return contract

    def begin(self, contract: Contract) -> None:
        """A contract was made: boot it, unless a fault has other plans."""
        now = contract.created_at
        self.contracts[contract.id] = contract
        contract.billed_until, contract.image_gb = now, IMAGE_GB
        struck = self.faults.rented(contract.host.machine_id)
        contract.pending = [fault for fault in struck if fault.kind not in SHAPING]
        boot = self._boot(contract.host)
        for fault in struck:
            if fault.kind in SHAPING:
                boot += fault.seconds or 0.0 if fault.kind == "slow_boot" else 0.0
                self._shape(contract, fault)
        contract.steps = _boot_steps(now, boot)
        end = (now + contract.host.duration_s, functools.partial(self._expire, contract))
        contract.agenda.append(end)
        self._tell("instance_created", contract)
        with self._happening(now):
            self._reach(contract, "created")
            for due in [item for item in contract.agenda if item[0] <= now]:
                contract.agenda.remove(due)
                due[1]()

    def destroy(self, number: int) -> None:
        """End a contract; its host is offered again under a new ask. The processes are killed
        just after, so that a machine which destroys itself can still read the answer."""
        with self.lock:
            contract = self._current(number)
            if not contract.lingering:
                self._remove(contract)

    def linger(self, number: int, seconds: float) -> None:
        """Confirm the end of a contract now, and bring it about later."""
        with self.lock:
            contract = self.need(number)
            contract.lingering = True
            end = (self.at() + seconds, functools.partial(self._remove, contract))
            contract.agenda.append(end)

    def stop(self, number: int) -> None:
        with self.lock:
            contract = self._current(number)
            contract.wanted = contract.outbid = contract.lowered = False
            self._halt(contract)
            self._contend(contract.host.machine_id)

    def start(self, number: int) -> None:
        """Raises: MarketError (200!), when the GPU is taken: the start is queued."""
        with self.lock:
            contract = self._current(number)
            if contract.expired:
                raise MarketError(400, "invalid_args", "The contract of this instance has ended.")
            if self.credit <= 0:
                raise MarketError(400, "insufficient_credit", "Your account lacks credit.")
            if "abandoned" in contract.struck:
                return  # the order is taken, and nothing comes of it
            contract.wanted, contract.lowered = True, False
            contract.intended = contract.following = "running"
            machine = contract.host.machine_id
            if holder(self._wanting(machine), self.rivals.get(machine)) is not contract:
                contract.outbid = True
                raise MarketError(200, "resources_unavailable", QUEUED)
            contract.outbid = False
            self._contend(machine)
            if contract.current != "running":
                self._start(contract)

    def reboot(self, number: int, *, recycle: bool = False) -> None:
        """Start the container again, with the GPU kept; `recycle` makes a new one of the image."""
        with self.lock:
            contract = self._current(number)
            if contract.current != "running":
                raise MarketError(400, "invalid_args", "The instance is not running.")
            if self._ending(contract):
                self.machines.stop(str(contract.id))
            now, boot = self.at(), self._boot(contract.host)
            if recycle:
                contract.image_gb = IMAGE_GB
                contract.steps = [(now, "recycling", ""), *_boot_steps(now, boot)[2:]]
            else:
                contract.steps = [(now, "rebooting", ""), (now + 0.2 * boot, "running", "")]

    def bid(self, number: int, price: float) -> None:
        with self.lock:
            if number not in self.contracts:
                raise MarketError(404, "no_such_instance", "Instance with that ID does not exist.")
            contract = self._current(number)
            if not contract.is_bid:
                raise MarketError(400, "invalid_args", "This instance was rented on demand.")
            if not 0.001 <= price <= 32 * contract.host.num_gpus:
                raise MarketError(400, "invalid_price", "price is out of range")
            contract.gpu_price = price
            if price < contract.host.min_bid and not contract.outbid:
                # One's own doing: no notification, and no way back but a start.
                contract.lowered = contract.outbid = True
                self._halt(contract)
            self._contend(contract.host.machine_id)

    # what hosts and rivals do

    def abandon(self, number: int, message: str = CDI_FAULT) -> None:
        """The host cannot start it: `created`, meant to be stopped, and so for ever."""
        with self.lock:
            contract = self._current(number)
            contract.struck.add("abandoned")
            self._give_up(contract, message)

    def stick(self, number: int, message: str = "Retrying in 5 seconds") -> None:
        """It never comes further than `loading`."""
        with self.lock:
            contract = self._current(number)
            self._kill_container(contract)
            contract.actual, contract.message, contract.steps = "loading", message, []

    def outbid(self, number: int, price: float = math.inf, *, seconds: float | None = None) -> None:
        """Somebody else gets the GPU, for `price` or on demand, for `seconds` or for good:
        processes end at once, a start is only queued, and it resumes when they leave."""
        with self.lock:
            contract = self._current(number)
            machine = contract.host.machine_id
            self._rival_comes(machine, price, seconds)
            if price == math.inf and not contract.outbid and contract.wanted:
                self._preempt(contract)
            self._contend(machine)

    def rival_leaves(self, machine: int) -> None:
        """The GPU is free for whoever of ours waits for it."""
        with self.lock:
            self._leave(machine)

    def lose(self, number: int, status: str = "offline") -> None:
        """The host goes off line; the container runs on, unseen and unbilled."""
        with self.lock:
            contract = self._current(number)
            if not contract.unseen:
                contract.unseen, contract.seen_as = True, contract.actual
                self._tell("instance_offline", contract)
            contract.actual = status

    def regain(self, number: int) -> None:
        """The host is back, with its container as it was; it hears now of its destruction."""
        with self.lock:
            if (stray := self.strays.pop(number, None)) is not None:
                self._tear_down(stray)
                return
            contract = self._current(number)
            if contract.unseen:
                contract.unseen, contract.actual = False, contract.seen_as
                if contract.current == "stopped" and self._ending(contract):
                    self.machines.stop(str(contract.id))

    def crash(self, number: int) -> None:
        """The container's processes end at once, as by SIGKILL."""
        with self.lock:
            self._kill_container(self._current(number))

    def vanish(self, number: int) -> None:
        """It is gone, and nobody asked for that."""
        with self.lock:
            contract = self._current(number)
            self._remove(contract)

    def charge(self, number: int, kind: str, gb: float) -> None:
        """Bill bytes that a machine moved: `bwd` or `bwu`. Raises: MarketError."""
        with self.lock:
            if kind not in ("bwd", "bwu") or not 0 <= gb < math.inf:
                raise MarketError(400, "invalid_args", "bytes are bwd or bwu, and gb a number")
            self._charge_bytes(self._current(number), kind, gb)

    # time

    def tick(self) -> None:
        """Bill, boot, and notice containers that ended. To be called every moment."""
        with self.lock:
            now = self.now()
            while due := [item for item in self._agenda if item[0] <= now]:
                first = min(due, key=lambda item: item[0])
                self._agenda.remove(first)
                self._all_catch_up(first[0])
                with self._happening(first[0]):
                    first[1]()
            self._all_catch_up(now)
            self._mind_credit(now)

    def close(self) -> None:
        """Destroy everything and wait until it is gone."""
        with self.lock:
            for contract in list(self.contracts.values()):
                contract.unseen = False
                self._remove(contract)
            for stray in list(self.strays.values()):
                self._tear_down(stray)
            self.strays.clear()
        self.settle()

    def settle(self) -> None:
        """Wait until everything destroyed so far is gone."""
        for killer in list(self._stopping):
            killer.join()

    def released(self, machine: int) -> None:
        """A contract on this machine has ended, and its processes are gone."""

    @contextlib.contextmanager
    def _happening(self, at: float) -> Iterator[None]:
        before, self._instant = self._instant, at
        try:
            yield
        finally:
            self._instant = before

    def _all_catch_up(self, now: float) -> None:
        for contract in [*self.contracts.values(), *self.strays.values()]:
            if self._is_here(contract):
                self._catch_up(contract, now)

    def _is_here(self, contract: Contract) -> bool:
        return contract.id in self.contracts or contract.id in self.strays

    def _catch_up(self, contract: Contract, now: float) -> None:
        """Let happen, in its order, what was due until `now`."""
        while self._is_here(contract):
            step_at = contract.steps[0][0] if contract.steps and not contract.unseen else math.inf
            due = min(contract.agenda, key=lambda item: item[0], default=None)
            at = min(step_at, due[0] if due else math.inf)
            if at > now:
                break
            with self._happening(at):
                self._bill(contract, at)
                if due and due[0] <= step_at:
                    contract.agenda.remove(due)
                    due[1]()
                elif contract.steps[0][1] == "running" and self._ending(contract):
                    break  # the container before it has still to end
                else:
                    self._step(contract)
        self._bill(contract, now)
        with self._happening(now):
            self._look(contract)

    def _step(self, contract: Contract) -> None:
        """The next step of a boot."""
        _, contract.actual, message = contract.steps.pop(0)
        contract.message = message
        if message.endswith("Pull complete") and contract.image_gb > 0:
            share = IMAGE_GB / len(LAYERS)
            contract.image_gb -= share
            self._charge_bytes(contract, "bwd", share)
        if contract.actual == "loading":
            self._reach(contract, "loading")
        if message == f"{LAYERS[-1]}: Pull complete":
            self._reach(contract, "pulled")
        if contract.actual == "running":
            self._launch(contract)
            event = "instance_resumed" if contract.started_once else "instance_started"
            contract.started_once = True
            self._tell(event, contract)
            self._reach(contract, "running")

    def _look(self, contract: Contract) -> None:
        """Notice what the container did."""
        for fault in [item for item in contract.pending if item.begins == "printed"]:
            if fault.text in self.machines.log(str(contract.id)):
                contract.pending.remove(fault)
                self._plan(contract, fault)
        if contract.actual != "running" or contract.steps or contract.unseen:
            return
        if not self._ending(contract) and contract.id in self.contracts:
            contract.actual = "exited"
            self._tell("instance_stopped", contract)

    def _reach(self, contract: Contract, moment: str) -> None:
        for fault in [item for item in contract.pending if item.begins == moment]:
            contract.pending.remove(fault)
            self._plan(contract, fault)

    def _plan(self, contract: Contract, fault: HostFault) -> None:
        strike = functools.partial(self._strike, contract, fault)
        contract.agenda.append((self.at() + fault.delay, strike))

    def _shape(self, contract: Contract, fault: HostFault) -> None:
        """What its host is like from the beginning."""
        contract.struck.add(fault.kind)
        truth = {
            "gpu_name": fault.gpu_name,
            "gpu_ram": fault.vram_mib,
            "driver_version": fault.driver,
            "disk_gb": fault.disk_gb,
            "lies_of_disk": None if fault.disk_gb is None else True,
            "download_mbps": fault.download_mbps,
            "clock_skew_s": fault.seconds if fault.kind == "clock_skew" else None,
        }
        told: dict[str, Any] = {key: value for key, value in truth.items() if value is not None}
        contract.truth = dataclasses.replace(contract.truth, **told)
        self._note(fault, contract)

    def _strike(self, contract: Contract, fault: HostFault) -> None:
        if (fault.only_bids and not contract.is_bid) or contract.id not in self.contracts:
            return
        contract.struck.add(fault.kind)
        self._note(fault, contract)
        number, machine = contract.id, contract.host.machine_id
        match fault.kind:
            case "abandoned":
                self.abandon(number, fault.message or CDI_FAULT)
            case "stuck":
                self.stick(number, fault.message or "Retrying in 5 seconds")
            case "pull_denied":
                self.stick(number, fault.message or PULL_DENIED.format(image=contract.image))
            case "lost_after_pull":
                self._give_up(contract, f"Successfully loaded {contract.image}")
                contract.outbid = True
                self._rival_comes(machine, math.inf, RIVAL_STAYS_S)
            case "queued":
                self.outbid(number, seconds=fault.seconds)
            case "outbid":
                self.outbid(number, fault.price or math.inf, seconds=fault.seconds)
            case "offline":
                self.lose(number, fault.status)
                if fault.seconds is not None:
                    back = functools.partial(self.regain, number)
                    contract.agenda.append((self.at() + fault.seconds, back))
            case "exit":
                self.crash(number)
            case "vanish":
                self.vanish(number)
            case "expire":
                self._expire(contract)
            case "credit":
                self.credit = fault.credit
            case _:
                raise AssertionError(f"nobody knows how {fault.kind} strikes")

    def _note(self, fault: HostFault, contract: Contract) -> None:
        machine = contract.host.machine_id
        self.faults.note(fault, at=round(self.at(), 3), machine=machine, contract=contract.id)

    def _boot(self, host: Host) -> float:
        return host.boot_s if self.boot_s is None else self.boot_s

    def _bill(self, contract: Contract, until: float) -> None:
        since = contract.billed_until
        if until <= since or contract.id not in self.contracts:
            return
        contract.billed_until = until
        if contract.unseen:
            return
        per_hour = {"disk": contract.storage_price}
        if contract.runs:
            per_hour["gpu"] = contract.gpu_price
        self.ledger.accrue(contract, since, until, per_hour)

    def _charge_bytes(self, contract: Contract, kind: str, gb: float) -> None:
        host = contract.host
        price = host.inet_down_cost if kind == "bwd" else host.inet_up_cost
        self.ledger.charge(contract, self.at(), {kind: gb * price})

    def _mind_credit(self, now: float) -> None:
        low = self.credit < LOW_CREDIT
        if low and not self._low:
            self.tell("low_credit", balance=round(self.credit, 4), threshold=LOW_CREDIT)
        self._low = low
        if self.credit > 0:
            self._unpaid_since = None
            return
        if self._unpaid_since is None:
            self._unpaid_since = now
        for contract in list(self.contracts.values()):
            if contract.wanted:
                self.stop(contract.id)
            if now - self._unpaid_since >= UNPAID_LIFE_S:
                self._remove(contract)

    # the GPU

    def _wanting(self, machine: int) -> list[Contract]:
        return [
            item
            for item in self.contracts.values()
            if item.host.machine_id == machine and item.wanted and not item.lowered
        ]

    def _contend(self, machine: int) -> None:
        """Give the GPU to whoever has the most right to it."""
        wanting = self._wanting(machine)
        winner = holder(wanting, self.rivals.get(machine))
        for contract in wanting:
            if contract is winner and contract.outbid and not contract.resuming:
                contract.resuming = True
                resume = functools.partial(self._resume, contract)
                contract.agenda.append((self.at() + RESUME_S, resume))
            elif contract is not winner and not contract.outbid:
                self._preempt(contract)

    def _preempt(self, contract: Contract) -> None:
        least = self.price_to_beat(contract.host)
        self._tell("outbid", contract, bid=contract.gpu_price, min_bid=least)
        contract.outbid = True
        self._halt(contract)

    def price_to_beat(self, host: Host) -> float:
        """The least bid that gets the GPU now."""
        rival = self.rivals.get(host.machine_id)
        bids = [item.gpu_price for item in self._wanting(host.machine_id) if item.is_bid]
        if rival is not None and rival < math.inf:
            bids.append(rival)
        return max([host.min_bid, *(round(price * 1.05, 4) for price in bids)])

    def _resume(self, contract: Contract) -> None:
        contract.resuming = False
        machine = contract.host.machine_id
        if contract.outbid and holder(self._wanting(machine), self.rivals.get(machine)) is contract:
            contract.outbid = False
            self._start(contract)

    def _rival_comes(self, machine: int, price: float, seconds: float | None) -> None:
        """For `seconds`, unless another follows in the meantime."""
        self.rivals[machine] = price
        turn = self._turns[machine] = self._turns.get(machine, 0) + 1
        if seconds is not None:
            leave = functools.partial(self._leave, machine, turn)
            self._agenda.append((self.at() + seconds, leave))

    def _leave(self, machine: int, turn: int | None = None) -> None:
        if turn not in (None, self._turns.get(machine)):
            return
        self.rivals.pop(machine, None)
        self._contend(machine)
        if not any(item.host.machine_id == machine for item in self.contracts.values()):
            self.released(machine)

    def _start(self, contract: Contract) -> None:
        at = self.at()
        contract.intended = contract.following = contract.current = "running"
        if contract.started_once:
            boot = 0.2 * self._boot(contract.host)
            contract.steps = [(at, "loading", "starting"), (at + boot, "running", "")]
        else:
            contract.steps = _boot_steps(at, self._boot(contract.host))

    def _halt(self, contract: Contract) -> None:
        """Stopped, whoever wants that: the disk stays, the processes end."""
        self._bill(contract, self.at())
        contract.halt()
        if contract.unseen:
            return
        if self._ending(contract):
            # The next ticks see its processes end.
            contract.actual = "running"
            self.machines.stop(str(contract.id))
        else:
            contract.actual = "stopped"

    def _expire(self, contract: Contract) -> None:
        at = self.at()
        contract.expired, contract.end_date = True, self.date(at)
        contract.wanted = contract.outbid = False
        self._halt(contract)
        end = (at + EXPIRED_LIFE_S, functools.partial(self._remove, contract))
        contract.agenda.append(end)

    # the container

    def _ending(self, contract: Contract) -> bool:
        """Whether a container of this contract has still to end."""
        return self.machines.exit_code(str(contract.id)) is None

    def _kill_container(self, contract: Contract) -> None:
        if self._ending(contract):
            self.machines.kill(str(contract.id))

    def _give_up(self, contract: Contract, message: str) -> None:
        """`created`, and meant to be stopped: it never comes to run."""
        self._kill_container(contract)
        contract.wanted = False
        contract.halt()
        contract.actual, contract.message = "created", message

    def _launch(self, contract: Contract) -> None:
        kind = "ssh" if "ssh" in contract.runtype or "jupyter" in contract.runtype else "args"
        contract.message = f"success, running {contract.image}/{kind}"
        self.machines.start(
            str(contract.id),
            env=self._env(contract),
            onstart=contract.onstart,
            args=contract.args if kind == "args" else [],
            stays=kind == "ssh",
            truth=contract.truth,
        )

    def _env(self, contract: Contract) -> dict[str, str]:
        """What a container of Vast's finds in its environment."""
        given = {**self.secrets, **contract.env}
        env = {
            **{key: value for key, value in given.items() if not key.startswith("-")},
            "CONTAINER_ID": str(contract.id),
            "CONTAINER_API_KEY": contract.key,
            "VAST_CONTAINERLABEL": f"C.{contract.id}",
            "VAST_URL": self.url,
            "PUBLIC_IPADDR": "203.0.113.7",
            "GPU_COUNT": str(contract.truth.num_gpus),
            "STOKER_SANDBOX": "1",
            "STOKER_SANDBOX_DISK_GB": f"{contract.truth.disk_gb:g}",
            "STOKER_SANDBOX_DOWNLOAD_MBPS": f"{contract.truth.download_mbps:g}",
        }
        if "no_key" in contract.struck:
            del env["CONTAINER_API_KEY"]
        return env

    def _tell(self, event: str, contract: Contract, **data: Any) -> None:
        self.tell(event, instance_id=contract.id, machine_id=contract.host.machine_id, **data)

    def _remove(self, contract: Contract) -> None:
        """No contract any more; its processes end, unless nobody reaches them."""
        if self.contracts.pop(contract.id, None) is None:
            return
        contract.current = "unloaded"
        self.ended.append(contract)
        self._tell("instance_deleted", contract)
        if contract.unseen:
            contract.steps = []
            self.strays[contract.id] = contract
        else:
            self._tear_down(contract)
        self._contend(contract.host.machine_id)

    def _tear_down(self, contract: Contract) -> None:
        killer = threading.Thread(target=self._kill, args=(contract,), daemon=True)
        killer.start()
        self._stopping = [*filter(threading.Thread.is_alive, self._stopping), killer]

    def _kill(self, contract: Contract) -> None:
        time.sleep(0.05)
        self.machines.destroy(str(contract.id))
        with self.lock:
            self.released(contract.host.machine_id)


def _boot_steps(at: float, boot: float) -> list[tuple[float, str, str]]:
    """Created, the layers of the image one after the other, running."""
    steps = [(at + 0.1 * boot, "created", ""), (at + 0.2 * boot, "loading", "")]
    for index, layer in enumerate(LAYERS):
        begun = at + (0.2 + 0.15 * index) * boot
        steps.append((begun, "loading", f"{layer}: Downloading"))
        steps.append((begun + 0.15 * boot, "loading", f"{layer}: Pull complete"))
    return [*steps, (at + boot, "running", "")]
