"""What goes wrong, as values: with calls (`Fault`) and with hosts (`HostFault`).

Scripted (the n-th call, the n-th rental) or drawn with a chance; a draw depends on the seed, the
fault's place and the count of what it is drawn for, never on the clock or on other calls. So the
same seed gives the same faults, however calls of different kinds interleave.
"""

from __future__ import annotations

import collections
import json
import random
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

#: Which call is which: method, path, our name. A number in the path is the ask's or instance's.
OPERATIONS: tuple[tuple[str, str, str], ...] = (
    ("POST", r"/api/v0/bundles/?", "search"),
    ("PUT", r"/api/v0/search/asks/?", "search"),
    ("PUT", r"/api/v0/asks/(\d+)/?", "create"),
    ("GET", r"/api/v1/instances/?", "list"),
    ("GET", r"/api/v0/instances/(\d+)/?", "show"),
    ("PUT", r"/api/v0/instances/(?:(\d+)/?)?", "manage"),
    ("DELETE", r"/api/v0/instances/(?:(\d+)/?)?", "destroy"),
    ("PUT", r"/api/v0/instances/bid_price/(\d+)/?", "bid"),
    ("PUT", r"/api/v0/instances/request_logs/(\d+)/?", "logs"),
    ("PUT", r"/api/v0/instances/command/(\d+)/?", "execute"),
    ("PUT", r"/api/v0/instances/(?:reboot|recycle)/(\d+)/?", "reboot"),
    ("GET", r"/api/v0/users/current/?", "user"),
    ("GET", r"/api/v0/charges/?", "charges"),
)
NAMES = frozenset(name for _, _, name in OPERATIONS)
ANY = frozenset({"*"}) | NAMES
LIST = frozenset({"list"})
ROWS = frozenset({"list", "show"})

#: Kind of a call's fault → the operations that it can befall, and the keys that it takes.
CALL_KINDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "drop": (ANY, frozenset({"after"})),
    "delay": (ANY, frozenset({"seconds"})),
    "status": (ANY, frozenset({"after", "status"})),
    "html": (ANY, frozenset({"after"})),
    "empty": (ANY, frozenset({"after"})),
    "truncate": (ANY, frozenset()),
    "answer": (ANY, frozenset({"after", "status", "body"})),
    "throttle": (ANY, frozenset({"shape"})),
    "auth": (ANY, frozenset({"status"})),
    "refuse": (ANY, frozenset({"after", "status"})),
    "no_id": (frozenset({"create"}), frozenset()),
    "no_such_ask": (frozenset({"create"}), frozenset({"status"})),
    "insufficient_credit": (frozenset({"create"}), frozenset()),
    "spend_rate_limit": (frozenset({"create"}), frozenset()),
    "deprecated": (LIST, frozenset()),
    "read_lag": (ROWS, frozenset({"seconds"})),
    "missing_row": (LIST, frozenset()),
    "doubled_row": (LIST, frozenset()),
    "half_page": (LIST, frozenset()),
    "stale_page": (LIST, frozenset()),
    "statusless": (ROWS, frozenset()),
    "null_fields": (ROWS, frozenset()),
    "null_start_date": (ROWS, frozenset()),
    "null_row": (ROWS, frozenset()),
    "lingers": (frozenset({"destroy"}), frozenset({"seconds"})),
    "ignored": (frozenset({"destroy", "manage"}), frozenset()),
    "never_ready": (frozenset({"logs"}), frozenset()),
    "price_change": (frozenset({"search"}), frozenset({"factor"})),
}
#: The HTTP statuses that a kind can answer with; the first is what it answers unless told.
STATUSES = {
    "auth": (401, 404),
    "no_such_ask": (410, 400, 404, 200),
    "refuse": (200, *range(400, 500)),
    "status": (502, *range(300, 600)),
    "answer": (200, *range(200, 600)),
}
SHAPES = ("text", "detail", "json")

#: Kind of a host's fault → the keys that it takes besides those of all.
HOST_KINDS: dict[str, frozenset[str]] = {
    "abandoned": frozenset({"message"}),
    "stuck": frozenset({"message"}),
    "pull_denied": frozenset({"message"}),
    "lost_after_pull": frozenset(),
    "queued": frozenset({"seconds"}),
    "outbid": frozenset({"seconds", "price", "only_bids"}),
    "offline": frozenset({"seconds", "status"}),
    "exit": frozenset(),
    "vanish": frozenset(),
    "expire": frozenset(),
    "slow_boot": frozenset({"seconds"}),
    "lie": frozenset({"gpu_name", "vram_mib", "disk_gb", "download_mbps", "driver"}),
    "clock_skew": frozenset({"seconds"}),
    "no_key": frozenset(),
    "weak_key": frozenset(),
    "credit": frozenset({"credit"}),
}
#: These shape a machine from its first moment: no time can be given.
SHAPING = frozenset({"slow_boot", "lie", "clock_skew", "no_key", "weak_key"})
MOMENTS = ("created", "loading", "pulled", "running", "printed")
#: When a kind strikes unless told; others once the container runs.
BEGINS = {
    "abandoned": "created",
    "queued": "created",
    "expire": "created",
    "stuck": "loading",
    "pull_denied": "loading",
    "lost_after_pull": "pulled",
}
TIMED = frozenset({"at", "after_s", "text"})
Span = float | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Trouble for the calls `nth` to `nth + times - 1` of an operation, or for each with `chance`.

    Attributes:
        op: one of `NAMES`, or `*`.
        kind: one of `CALL_KINDS`.
        machine: only calls that concern this machine are counted and befallen; for lists, the
            row that is.
        times: 0 is for ever.
        chance: of each matching call from the `nth` on; `times` says nothing then.
        after: whether the call has its effect first (`delay`, `truncate` and `no_id` always do).
        seconds: of delay (real ones), of lag or lingering (the market's).
        factor: what the offers' prices change by, once they were shown.
    """

    op: str
    kind: str
    machine: int | None = None
    nth: int = 1
    times: int = 1
    chance: float | None = None
    after: bool = False
    status: int | None = None
    body: Any = None
    shape: str = "json"
    seconds: float = 60.0
    factor: float = 1.5

    def __post_init__(self) -> None:
        if self.kind not in CALL_KINDS:
            raise ValueError(f"no such kind: {self.kind!r}")
        ops = CALL_KINDS[self.kind][0]
        if self.op not in ops:
            raise ValueError(f"op of {self.kind!r} must be one of {', '.join(sorted(ops))}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}")
        statuses = STATUSES.get(self.kind, ())
        if self.status is not None and self.status not in statuses:
            raise ValueError(f"status of {self.kind!r} cannot be {self.status}")
        _check(self)

    @property
    def answered(self) -> int:
        """The HTTP status that it answers with."""
        return self.status or STATUSES.get(self.kind, (200,))[0]


@dataclass(frozen=True, kw_only=True)
class HostFault:
    """Trouble with a rented machine.

    Attributes:
        kind: one of `HOST_KINDS`.
        machine: None is any; `rental`, the how manieth rental of it, None each.
        at: the moment from which `after_s` counts: the contract `created`, its image first
            `loading`, all of it `pulled`, its container first `running`, or its container having
            `printed` `text`.
        after_s: market seconds, or two of them between which one is drawn.
        seconds: how long it lasts (None: for ever), or by how much boot or clock are off.
        price: of the rival's bid in $/h; None is a rental on demand.
        only_bids: leave what was rented on demand alone.
        status: `offline` or `unknown`.
    """

    kind: str
    machine: int | None = None
    rental: int | None = None
    chance: float | None = None
    at: str = ""
    after_s: Span = 0.0
    text: str = ""
    seconds: float | None = None
    message: str | None = None
    price: float | None = None
    only_bids: bool = False
    status: str = "offline"
    credit: float = 0.0
    gpu_name: str | None = None
    vram_mib: int | None = None
    disk_gb: float | None = None
    download_mbps: float | None = None
    driver: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in HOST_KINDS:
            raise ValueError(f"no such kind: {self.kind!r}")
        if self.at and self.at not in MOMENTS:
            raise ValueError(f"at must be one of {', '.join(MOMENTS)}")
        if (self.at == "printed") != bool(self.text):
            raise ValueError("text goes with at: printed, and only there")
        if self.kind in SHAPING and (self.at or self.after_s):
            raise ValueError(f"{self.kind!r} holds from the first moment: leave at and after_s out")
        if self.status not in ("offline", "unknown"):
            raise ValueError("status must be offline or unknown")
        if self.kind in ("slow_boot", "clock_skew") and self.seconds is None:
            raise ValueError(f"{self.kind!r} needs seconds")
        _check(self)

    @property
    def begins(self) -> str:
        """`at`, or the moment at which this kind strikes unless told."""
        return self.at or BEGINS.get(self.kind, "running")

    @property
    def delay(self) -> float:
        """`after_s`, once it is drawn."""
        return self.after_s[0] if isinstance(self.after_s, tuple) else self.after_s


def _check(fault: Fault | HostFault) -> None:
    """Raises: ValueError, for a value that has the wrong type or makes no sense."""
    for item in fields(fault):
        value, kind = getattr(fault, item.name), str(item.type)
        if kind == "Any" or (value is None and "None" in kind):
            continue
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "Span" and isinstance(value, tuple):
            good = len(value) == 2 and 0 <= value[0] <= value[1]
        elif kind.startswith("bool"):
            good = isinstance(value, bool)
        elif kind.startswith("str"):
            good = isinstance(value, str)
        elif kind.startswith("int"):
            good = numeric and value == int(value) and value >= 0
        else:
            signed = item.name in ("seconds", "credit")
            good = numeric and (signed or value >= 0)
        if not good:
            raise ValueError(f"{item.name} cannot be {value!r}")
    if fault.chance is not None and not 0 < fault.chance <= 1:
        raise ValueError("chance must be above 0 and at most 1")
    if isinstance(fault, Fault) and fault.nth < 1:
        raise ValueError("nth counts from 1")


def read_faults(text: str) -> list[Fault | HostFault]:
    """Faults from JSON: a list of objects, as docs/sandbox.md describes them.

    Raises:
        ValueError: it cannot be read; the text names the entry.
    """
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ValueError(f"faults are JSON: {error}") from None
    if not isinstance(read, list):
        raise ValueError("faults are a list of objects")
    return [_read(index, item) for index, item in enumerate(read, 1)]


def _read(index: int, item: Any) -> Fault | HostFault:
    where = f"entry {index}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is no object")
    try:
        return read_fault(item)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_fault(item: Mapping[str, Any]) -> Fault | HostFault:
    """One fault. Raises: ValueError."""
    kind = item.get("kind")
    if not isinstance(kind, str) or kind not in CALL_KINDS.keys() | HOST_KINDS.keys():
        known = ", ".join([*CALL_KINDS, *HOST_KINDS])
        raise ValueError(f"kind {kind!r} is none of {known}")
    if kind in CALL_KINDS:
        allowed = {"op", "kind", "machine", "nth", "times", "chance"} | CALL_KINDS[kind][1]
    else:
        timed = frozenset() if kind in SHAPING else TIMED
        allowed = {"kind", "machine", "rental", "chance"} | timed | HOST_KINDS[kind]
    if unknown := sorted(set(item) - allowed):
        raise ValueError(
            f"{kind!r} has no {', '.join(unknown)}; it takes {', '.join(sorted(allowed))}"
        )
    if kind in CALL_KINDS:
        if "op" not in item:
            raise ValueError(f"{kind!r} needs op")
        return Fault(**item)
    given = dict(item)
    if isinstance(given.get("after_s"), list):
        given["after_s"] = tuple(given["after_s"])
    return HostFault(**given)


def told(fault: Fault | HostFault) -> dict[str, Any]:
    """A fault as JSON, without what is left at its default."""
    defaults = {item.name: item.default for item in fields(fault)}
    return {key: value for key, value in asdict(fault).items() if value != defaults[key]}


def operation(method: str, path: str) -> tuple[str, int | None]:
    """Our name of a call, and the ask or instance that it names; no name when it is none of the
    market's."""
    for verb, pattern, name in OPERATIONS:
        if verb == method and (found := re.fullmatch(pattern, "/" + path.lstrip("/"))):
            number = found.group(1) if found.groups() else None
            return name, int(number) if number else None
    return "", None


class Faults:
    """The faults that are planned, the counts that decide when they strike, and those that did."""

    def __init__(self, plan: Iterable[Fault | HostFault] = (), *, seed: int = 0) -> None:
        self.plan: list[Fault | HostFault] = list(plan)
        self._fired: collections.deque[dict[str, Any]] = collections.deque(maxlen=1000)
        self._seed = seed
        self._counts: dict[tuple[int, str], int] = {}
        self._rentals: dict[int | None, int] = {}
        self._lock = threading.Lock()

    @property
    def fired(self) -> list[dict[str, Any]]:
        """The last ones that struck, newest last."""
        with self._lock:
            return list(self._fired)

    def add(self, fault: Fault | HostFault) -> None:
        """Plan one more; it counts from now on."""
        with self._lock:
            self.plan.append(fault)

    def due(self, op: str, machine: int | None) -> Fault | None:
        """What befalls this call. To be asked once for each."""
        with self._lock:
            due = None
            for index, fault in enumerate(self.plan):
                if not isinstance(fault, Fault) or not _concerns(fault, op, machine):
                    continue
                # A draw counts each operation by itself, else it hangs on how they interleave.
                key = (index, op if fault.chance is not None else "")
                count = self._counts[key] = self._counts.get(key, 0) + 1
                if due is None and self._strikes(index, fault, op, count):
                    due = fault
            return due

    def rented(self, machine: int) -> list[HostFault]:
        """What will befall this rental, with its times drawn. To be asked once for each."""
        with self._lock:
            for key in (None, machine):
                self._rentals[key] = self._rentals.get(key, 0) + 1
            struck = []
            for index, fault in enumerate(self.plan):
                if not isinstance(fault, HostFault) or fault.machine not in (None, machine):
                    continue
                count = self._rentals[fault.machine]
                if fault.rental not in (None, count):
                    continue
                draw = self.draw("host", index, count)
                if fault.chance is None or draw.random() < fault.chance:
                    after = fault.after_s
                    drawn = draw.uniform(*after) if isinstance(after, tuple) else after
                    struck.append(replace(fault, after_s=drawn))
            return struck

    def draw(self, *of: object) -> random.Random:
        """A source of chance that is always the same for the same thing."""
        return random.Random("/".join(map(str, (self._seed, *of))))

    def note(self, fault: Fault | HostFault, **what: Any) -> None:
        """Record that it struck."""
        with self._lock:
            self._fired.append({"kind": fault.kind, **what})

    def _strikes(self, index: int, fault: Fault, op: str, count: int) -> bool:
        if count < fault.nth:
            return False
        if fault.chance is not None:
            return self.draw("call", index, op, count).random() < fault.chance
        return not fault.times or count < fault.nth + fault.times


def _concerns(fault: Fault, op: str, machine: int | None) -> bool:
    if fault.op not in (op, "*"):
        return False
    return fault.machine in (None, machine) or op in ("list", "search")


def any_trouble(rate: float) -> list[Fault]:
    """The usual troubles of calls, which together strike with the chance `rate`. None of them
    makes a list lie: a list is whole, or unmistakably none."""
    if not rate:
        return []
    kinds: Sequence[dict[str, Any]] = (
        {"kind": "drop"},
        {"kind": "drop", "after": True},
        {"kind": "status", "status": 502},
        {"kind": "status", "status": 503, "after": True},
        {"kind": "status", "status": 504},
        {"kind": "html", "after": True},
        {"kind": "truncate"},
        *({"kind": "throttle", "shape": shape} for shape in SHAPES),
    )
    each = 1 - (1 - min(rate, 0.999999)) ** (1 / len(kinds))
    return [Fault(op="*", chance=each, **kind) for kind in kinds]


#: Host faults of the market as it was seen: a public test of five rentals lost four.
_MARKET: tuple[dict[str, Any], ...] = (
    {"kind": "abandoned", "chance": 0.04},
    {"kind": "stuck", "chance": 0.05},
    {"kind": "lost_after_pull", "chance": 0.04},
    {"kind": "queued", "chance": 0.03, "seconds": 600.0},
    {"kind": "slow_boot", "chance": 0.10, "seconds": 300.0},
    {"kind": "offline", "chance": 0.04, "after_s": (60.0, 5400.0), "seconds": 900.0},
    {"kind": "exit", "chance": 0.02, "after_s": (60.0, 3600.0)},
    {"kind": "vanish", "chance": 0.01, "after_s": (60.0, 3600.0)},
    {"kind": "lie", "chance": 0.04, "download_mbps": 20.0},
    {"kind": "lie", "chance": 0.01, "gpu_name": "GTX 1060", "vram_mib": 6144},
    {
        "kind": "outbid", "chance": 0.5, "after_s": (120.0, 7200.0), "seconds": 1800.0,
        "only_bids": True,
    },
)  # fmt: skip
_HELL: tuple[dict[str, Any], ...] = (
    {"kind": "abandoned", "chance": 0.08},
    {"kind": "stuck", "chance": 0.08},
    {"kind": "pull_denied", "chance": 0.02},
    {"kind": "lost_after_pull", "chance": 0.08},
    {"kind": "queued", "chance": 0.06, "seconds": 300.0},
    {"kind": "slow_boot", "chance": 0.15, "seconds": 600.0},
    {"kind": "offline", "chance": 0.12, "after_s": (0.0, 3600.0), "seconds": 600.0},
    {"kind": "offline", "chance": 0.04, "after_s": (0.0, 3600.0), "status": "unknown"},
    {"kind": "exit", "chance": 0.06, "after_s": (0.0, 3600.0)},
    {"kind": "vanish", "chance": 0.05, "after_s": (0.0, 3600.0)},
    {"kind": "expire", "chance": 0.03, "after_s": (600.0, 7200.0)},
    {"kind": "outbid", "chance": 0.10, "after_s": (0.0, 3600.0), "seconds": 600.0},
    {"kind": "lie", "chance": 0.06, "gpu_name": "GTX 1060", "vram_mib": 6144},
    {"kind": "lie", "chance": 0.06, "disk_gb": 5.0},
    {"kind": "lie", "chance": 0.08, "download_mbps": 10.0},
    {"kind": "clock_skew", "chance": 0.05, "seconds": 900.0},
    {"kind": "no_key", "chance": 0.05},
    {"kind": "weak_key", "chance": 0.10},
)
_HELL_CALLS: tuple[dict[str, Any], ...] = (
    {"op": "create", "kind": "drop", "after": True, "chance": 0.05},
    {"op": "create", "kind": "no_id", "chance": 0.02},
    {"op": "create", "kind": "refuse", "after": True, "chance": 0.03},
    {"op": "create", "kind": "refuse", "chance": 0.03},
    *(
        {"op": "create", "kind": "no_such_ask", "status": status, "chance": 0.03}
        for status in (400, 404, 410, 200)
    ),
    {"op": "search", "kind": "price_change", "factor": 1.3, "chance": 0.05},
    {"op": "list", "kind": "read_lag", "seconds": 5.0, "chance": 0.05},
    *(
        {"op": "list", "kind": kind, "chance": 0.02}
        for kind in (
            "missing_row", "doubled_row", "half_page", "stale_page", "deprecated", "empty",
            "statusless", "null_fields", "null_start_date", "null_row",
        )
    ),
    {"op": "destroy", "kind": "lingers", "seconds": 20.0, "chance": 0.10},
    {"op": "destroy", "kind": "ignored", "chance": 0.05},
    {"op": "logs", "kind": "never_ready", "chance": 0.2},
)  # fmt: skip
PROFILES = ("calm", "market", "hell")


def profile(name: str) -> list[Fault | HostFault]:
    """The faults of a market that is calm (none), as seen in the field, or hell.

    Raises: ValueError.
    """
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}")
    if name == "calm":
        return []
    hosts = [HostFault(**item) for item in (_MARKET if name == "market" else _HELL)]
    if name == "market":
        race = Fault(op="create", kind="no_such_ask", chance=0.08)
        return [race, *any_trouble(0.01), *hosts]
    return [*(Fault(**item) for item in _HELL_CALLS), *any_trouble(0.10), *hosts]
