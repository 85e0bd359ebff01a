"""Vast.ai behind the `Provider` door: the only file that knows its JSON and its traps.

The `vastai` SDK builds the requests and their bodies. What is not left to it, and why:

- sending: it repeats a create whose answer was lost (and so may rent three times), lets
  `~/.netrc` and proxies replace our key, and has no limit on the whole time of a call;
- reading: it computes on every row, so that one odd row kills the list, and takes a
  `success: false` in a 200 for a value;
- string queries: its parser silently drops filters; ours are dicts, checked again on our side.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from vastai.api.client import VastClient, VastSession
from vastai.api.instances import build_create_instance_payload

from infra import telemetry
from infra.provider import Account, Instance, LaunchSpec
from state import ranking
from state.errors import (
    AccountFault,
    OfferGone,
    Refused,
    Throttled,
    Unknown,
    Unreadable,
)
from state.events import Secret
from state.job import GpuNeeds
from state.offer import Offer

log = logging.getLogger(__name__)

#: Seconds between calls that Vast documents, per endpoint; elsewhere the smallest of them.
SPACING = {"search": 6.0, "create": 4.5, "show": 2.0, "list": 1.0, "destroy": 3.0}
SMALLEST_SPACING = 1.0
#: How long a thread waits for its turn, where that is not the timeout: a search can come later.
PATIENCE_S = {"search": 1.0}
#: For so many turns a search's answer serves those who ask the same. More than one: who wants two
#: answers (on demand, and by bid) gets the second a turn after the first. An offer that is gone
#: meanwhile is refused, and the next is tried.
SHARED_TURNS = 3
#: Queries whose turns are remembered besides those with an answer.
MAX_TURNS = 100
#: What a refused create adds to its spacing (seconds).
CREATE_PENALTY_S = 12.0
#: The market returns no more than this per search, whatever is asked.
SEARCH_CAP = 64
PAGE = 25
CHARGES_PAGE = 500
#: The day that no charge is later than (epoch seconds).
NO_END = 32_503_680_000
#: A list of more pages than this is no list.
MAX_PAGES = 400
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MAX_ONSTART = 4048
MAX_ENV = 32768
HOURS_PER_MONTH = 730
#: What we bid, times the least that would win now: who bids exactly that is outbid first.
BID_MARGIN = 1.15
#: A spent daily search quota comes back at midnight UTC; we look again each hour (seconds).
QUOTA_PAUSE_S = 3600.0
THROTTLED = frozenset({"rate_limit_exceeded", "search_quota_exceeded"})
ACCOUNT_FAULTS = frozenset(
    {"auth_error", "insufficient_credit", "spend_rate_limit", "missing_billing"}
)
#: Row keys that may hold what a machine must keep to itself.
SECRET_KEYS = re.compile(r"env|onstart|args|login|token|key|secret|password", re.IGNORECASE)


class _NotSentError(Exception):
    """The request never left: no connection was made."""


class _NoAnswerError(Exception):
    """The request may have arrived; no usable answer came."""


@dataclass(frozen=True)
class _Answer:
    """An HTTP answer. `body` is None when it is not JSON."""

    status: int
    body: Any
    content: bytes
    retry_after: float | None = None

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.body if isinstance(self.body, dict) else {}

    @property
    def code(self) -> str:
        return _text(self.fields.get("error"))

    @property
    def words(self) -> str:
        """What it says of itself."""
        said = (self.fields.get(key) for key in ("msg", "message", "detail"))
        words = next((text for text in map(_text, said) if text), "") or self.code
        return words or self.content[:8192].decode(errors="replace")

    @property
    def ok(self) -> bool:
        return self.status == 200 and bool(self.fields) and self.fields.get("success") is not False


class _Session(VastSession):  # type: ignore[misc] # the SDK is untyped
    """Follows only what keeps method, body and key within the service."""

    def __init__(self, server_url: str) -> None:
        super().__init__(server_url)
        self.trust_env = False  # no ~/.netrc in place of our key, no proxy that sees it

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target: str | None = super().get_redirect_target(resp)
        if target is None or resp.status_code not in (307, 308):
            return None
        return target if self.same_service(urlsplit(urljoin(resp.url, target))) else None


class _Client(VastClient):  # type: ignore[misc] # the SDK is untyped
    """The SDK's client with one send per request and an end to every wait."""

    def __init__(self, api_key: str, server_url: str, timeout: float) -> None:
        super().__init__(api_key, server_url, retry=1, timeout=timeout)

    def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        json_data: Any = None,
        timeout: float | None = None,
    ) -> _Answer:
        """One request, sent once."""
        within: float = self.timeout if timeout is None else timeout
        return _exchange(_Session(self.server_url), method, url, headers, json_data, within)


def _exchange(
    session: requests.Session,
    method: str,
    url: str,
    headers: Mapping[str, str],
    json_data: Any,
    within: float,
) -> _Answer:
    """Ask once, and be back after `within` seconds. A thread carries the request, because a name
    server, or a server that sends a byte now and then, passes every timeout that a socket knows.

    Raises: _NotSentError, _NoAnswerError.
    """
    outcome: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()

    def carry() -> None:
        # Exceptions of `requests` hold the request, and with it the key: they stay in here.
        try:
            with (
                session,
                session.request(
                    method, url, headers=headers, json=json_data, timeout=within, stream=True
                ) as response,
            ):
                outcome.put(_received(response))
        except _NoAnswerError as error:
            outcome.put(error)
        except requests.RequestException as error:
            kind = type(error).__name__
            lost = _NotSentError if _never_connected(error) else _NoAnswerError
            outcome.put(lost(kind))
        except Exception as error:  # noqa: BLE001 -- the caller's thread must hear of anything
            outcome.put(_NoAnswerError(type(error).__name__))

    threading.Thread(target=carry, name="vast", daemon=True).start()
    try:
        got = outcome.get(timeout=within)
    except queue.Empty:
        got = _NoAnswerError(f"no answer within {within:g} s")
    if isinstance(got, Exception):
        raise got
    return got


def _never_connected(error: requests.RequestException) -> bool:
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return True
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    return isinstance(cause, NewConnectionError | ConnectTimeoutError)


def _received(response: requests.Response) -> _Answer:
    content = bytearray()
    for chunk in response.iter_content(65536):
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise _NoAnswerError("the answer does not end")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    try:
        retry_after = float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        retry_after = math.nan
    return _Answer(
        status=response.status_code,
        body=body,
        content=bytes(content),
        retry_after=retry_after if 0 <= retry_after <= 3600 else None,
    )


class _Spacing:
    """Keeps calls to one endpoint apart, among the threads of this process."""

    def __init__(
        self, scale: float, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._scale, self._clock, self._sleep = scale, clock, sleep
        self._free_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, endpoint: str, at_most: float) -> None:
        """Raises: Throttled, when the turn would come later than `at_most` seconds from now."""
        gap = SPACING.get(endpoint, SMALLEST_SPACING) * self._scale
        with self._lock:
            now = self._clock()
            pause = max(0.0, self._free_at.get(endpoint, now) - now)
            if pause > at_most:
                raise Throttled(
                    f"Vast: {endpoint} has no turn for {pause:.0f} s", retry_after=pause
                )
            self._free_at[endpoint] = now + pause + gap
        if pause:
            self._sleep(pause)

    def hold(self, endpoint: str, seconds: float) -> None:
        """No call to `endpoint` for `seconds`: the market said so."""
        with self._lock:
            until = self._clock() + seconds * self._scale
            self._free_at[endpoint] = max(until, self._free_at.get(endpoint, until))


class _Searches:
    """What searches answered lately: jobs that want the same share one search in a few of Vast's
    turns, else fifty jobs that nothing fits would keep a new one from asking for minutes."""

    def __init__(self, life: float, clock: Callable[[], float]) -> None:
        self._life, self._clock = life, clock
        self._known: dict[str, tuple[float, _Answer]] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def answer(self, query: Mapping[str, Any], ask: Callable[[], _Answer]) -> _Answer:
        """That of `ask`, or of the one before it to the same query."""
        if not self._life:
            return ask()
        key = json.dumps(query, sort_keys=True)
        with self._lock:
            now = self._clock()
            self._known = {k: got for k, got in self._known.items() if now - got[0] < self._life}
            if len(self._turns) > len(self._known) + MAX_TURNS:
                self._turns = {k: turn for k, turn in self._turns.items() if turn.locked()}
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            known = self._known.get(key)
            if known is not None and self._clock() - known[0] < self._life:
                return known[1]
            answer = ask()
            with self._lock:
                self._known[key] = (self._clock(), answer)
            return answer


class VastProvider:
    """Vast.ai, or whatever speaks its REST at `server_url`.

    Args:
        timeout: seconds, for each request as a whole, and for the wait for its turn.
        spacing: factor on the seconds that Vast wants between calls; 0 for a sandbox.
        clock, sleep: monotonic seconds; a pause.
    """

    def __init__(
        self,
        api_key: str,
        server_url: str = "https://console.vast.ai",
        *,
        timeout: float = 30.0,
        spacing: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _quiet_the_sdk()
        self._key = api_key.reveal() if isinstance(api_key, Secret) else api_key
        self._client = _Client(self._key, server_url.rstrip("/"), timeout)
        self._timeout, self._clock, self._sleep = timeout, clock, sleep
        self._spacing = _Spacing(spacing, clock, sleep)
        self._searches = _Searches(SHARED_TURNS * SPACING["search"] * spacing, clock)

    def __repr__(self) -> str:
        return f"VastProvider({self._client.server_url!r})"

    def offers(
        self, needs: GpuNeeds, *, interruptible: bool = False, limit: int = SEARCH_CAP
    ) -> list[Offer]:
        """See `Provider.offers`. Machines with one GPU, the cheapest first."""
        query = _search(needs, limit, bid=interruptible)
        answer = self._searches.answer(
            query,
            lambda: self._read("search", lambda: self._client.post("/bundles/", json_data=query)),
        )
        rows = answer.fields.get("offers")
        if not isinstance(rows, list):
            raise Unreadable(f"Vast's offers could not be read: {self._said(answer)}")
        read = [offer for row in rows if (offer := _offer(row, needs.disk_gb, bid=interruptible))]
        if rows and not any(isinstance(row, dict) and "id" in row for row in rows):
            raise Unreadable(f"none of Vast's {len(rows)} offers could be read")
        unique = {offer.id: offer for offer in read if ranking.unmet(offer, needs) is None}
        return list(unique.values())[:limit]

    def create(self, offer: Offer, spec: LaunchSpec) -> str:
        """See `Provider.create`. Our script is the `onstart` of an ssh run type, whose first
        process is Vast's own: the instance goes on after the script has ended."""
        path, body = f"/asks/{_id(offer.id)}/", _create_body(spec)
        hidden = [value for value in spec.env.values() if len(value) >= 6]
        try:
            answer = self._ask("create", lambda: self._client.put(path, json_data=body))
        except _NotSentError as error:
            raise Refused(f"Vast was not reached ({error})", code="unreachable") from None
        except _NoAnswerError as error:
            raise Unknown(f"no clear answer to the create call: {error}") from None
        contract = _contract(answer)
        if answer.ok and answer.fields.get("success") is True and contract:
            return contract
        unclear = Unknown(f"no clear answer to the create call: {self._said(answer, hidden)}")
        no = self._no("create", answer, hidden) or unclear
        no.instance_id = contract
        raise no

    def instance(self, instance_id: str) -> Instance | None:
        """See `Provider.instance`. A record without any state is Vast's way to show the dead."""
        number = _id(instance_id)
        path = f"/instances/{number}/"
        answer = self._read(
            "show", lambda: self._client.get(path, {"owner": "me"}), absence_is_an_answer=True
        )
        if _is_gone(answer):
            return None
        fields = answer.fields
        row = fields.get("instances")
        if answer.ok and row is None and "instances" in fields:
            return None
        if not answer.ok or not isinstance(row, dict) or _text(row.get("id")) != number:
            raise Unreadable(f"Vast's record of instance {number}: {self._said(answer)}")
        stateless = not any(key in row for key in ("actual_status", "cur_state", "next_state"))
        return None if stateless else self._instance(row)

    def instances(self) -> list[Instance]:
        """See `Provider.instances`. Rows without an id (Vast shows null ones) are left out."""
        found: dict[str, Instance] = {}
        for row in self._rows():
            if not isinstance(row, dict) or not _text(row.get("id")):
                log.warning("Vast lists an instance without an id; it is left out")
                continue
            instance = self._instance(row)
            found[instance.id] = instance
        return list(found.values())

    def destroy(self, instance_id: str) -> None:
        """See `Provider.destroy`."""
        path = f"/instances/{_id(instance_id)}/"
        try:
            answer = self._ask("destroy", lambda: self._client.delete(path, json_data={}))
        except _NotSentError as error:
            raise Refused(f"Vast was not reached ({error})", code="unreachable") from None
        except _NoAnswerError as error:
            raise Unknown(f"no clear answer to the destroy call: {error}") from None
        if (answer.ok and answer.fields.get("success") is True) or _is_gone(answer):
            return
        unclear = Unknown(f"no clear answer to the destroy call: {self._said(answer)}")
        raise self._no("destroy", answer) or unclear

    def logs(self, instance_id: str, *, tail: int = 100) -> str:
        """See `Provider.logs`. Vast uploads them elsewhere first; that can take seconds."""
        until = self._clock() + self._timeout
        path = f"/instances/request_logs/{_id(instance_id)}/"
        body = {"tail": str(tail)}
        answer = self._read("logs", lambda: self._client.put(path, json_data=body))
        url = _text(answer.fields.get("result_url"))
        if urlsplit(url).scheme not in ("http", "https"):
            raise Unreadable(f"Vast named no place for the log: {self._said(answer)}")
        pause = 0.3
        while self._clock() + pause < until:
            self._sleep(pause)
            text = self._fetch(url, max(0.1, until - self._clock()))
            if text is not None:
                return text
            pause = min(2.0, pause * 1.5)
        raise Unreadable(f"the log of instance {instance_id} is not ready yet")

    def account(self) -> Account:
        """See `Provider.account`."""
        answer = self._read("user", lambda: self._client.get("/users/current"))
        identity = _text(answer.fields.get("id"))
        credit = _number(answer.fields, "credit", least=-math.inf)
        if not identity or credit is None:
            raise Unreadable(f"Vast's account record has no id or credit: {self._said(answer)}")
        return Account(id=identity, credit=round(credit * 1_000_000))

    def charges(self, labels: Collection[str], since: datetime) -> dict[str, int]:
        """See `Provider.charges`. One charge that cannot be read makes the whole unreadable: a
        part would be taken for the price."""
        day = since.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        query: dict[str, Any] = {
            "select_filters": {
                "day": {"gte": day.timestamp(), "lte": NO_END},
                "type": {"in": ["instance"]},
            },
            "limit": CHARGES_PAGE,
        }
        found: dict[str, int] = {}
        for row in self._pages("charges", "/charges/", query, "results"):
            fields = row if isinstance(row, dict) else {}
            amount, metadata = _micro(fields, "amount"), fields.get("metadata")
            if amount is None or not isinstance(metadata, dict):
                raise Unreadable("a charge of Vast's could not be read")
            label = _text(metadata.get("label"))
            if label in labels:
                found[label] = found.get(label, 0) + amount
        return found

    def _rows(self) -> Iterator[Any]:
        query: dict[str, Any] = {
            "select_filters": {},
            "order_by": [{"col": "id", "dir": "asc"}],
            "limit": PAGE,
        }
        return self._pages("list", "/api/v1/instances/", query, "instances", identity="id")

    def _pages(
        self, endpoint: str, path: str, query: dict[str, Any], key: str, *, identity: str = ""
    ) -> Iterator[Any]:
        """All rows of all pages. Raises Unreadable rather than end early."""
        ids, odd, tokens = set(), 0, set()
        for _ in range(MAX_PAGES):
            answer = self._read(endpoint, lambda: self._client.get(path, query))
            rows = answer.fields.get(key)
            if not isinstance(rows, list):
                raise Unreadable(f"Vast's list of {key}: {self._said(answer)}")
            yield from rows
            # Counted once each: a row shown twice must not stand in for one that is missing.
            named = [row.get(identity) for row in rows if isinstance(row, dict)]
            known = [name for name in map(_text, named) if name]
            ids.update(known)
            odd += len(rows) - len(known)
            seen = len(ids) + odd
            token = answer.fields.get("next_token")
            if token in (None, "") and _ended(answer.fields, seen):
                return
            if not isinstance(token, str) or not token or token in tokens or not rows:
                raise Unreadable(f"Vast's list of {key} has no end that can be trusted")
            tokens.add(token)
            query["after_token"] = token
        raise Unreadable(f"Vast's list of {key} has more than {MAX_PAGES} pages")

    def _fetch(self, url: str, within: float) -> str | None:
        """The uploaded log, once it is there. Neither our key nor a netrc goes along."""
        session = requests.Session()
        session.trust_env = False
        try:
            answer = _exchange(session, "GET", url, {}, None, within)
        except (_NotSentError, _NoAnswerError):
            return None
        return answer.text if answer.status == 200 else None

    def _ask(self, endpoint: str, send: Callable[[], _Answer]) -> _Answer:
        self._spacing.wait(endpoint, PATIENCE_S.get(endpoint, self._timeout))
        with telemetry.market_call(endpoint) as call:
            answer = send()
            call.outcome = str(answer.status)
        return answer

    def _read(
        self, endpoint: str, send: Callable[[], _Answer], *, absence_is_an_answer: bool = False
    ) -> _Answer:
        """A good answer to a call that changes nothing. Raises: Refused, Unreadable."""
        try:
            answer = self._ask(endpoint, send)
        except (_NotSentError, _NoAnswerError) as error:
            raise Unreadable(f"Vast: {endpoint} got no answer ({error})") from None
        if answer.ok or (absence_is_an_answer and _is_gone(answer)):
            return answer
        raise self._no(endpoint, answer) or Unreadable(f"Vast: {endpoint}: {self._said(answer)}")

    def _no(self, endpoint: str, answer: _Answer, hidden: Sequence[str] = ()) -> Refused | None:
        """The clear no in `answer`, if there is one."""
        said, code = f"Vast: {self._said(answer, hidden)}", answer.code
        all_words = f"{code} {answer.words}"
        if answer.status == 429 or code in THROTTLED or "too frequent" in all_words:
            pause = _pause(endpoint, answer)
            self._spacing.hold(endpoint, pause)
            return Throttled(said, retry_after=pause)
        if answer.status == 401 or code in ACCOUNT_FAULTS:
            return AccountFault(said, code=code or "auth_error")
        if not answer.fields or not (answer.status == 200 or 400 <= answer.status < 500):
            return None
        if answer.status == 408 or (answer.status == 200 and answer.ok):
            return None
        if "no_such_ask" in all_words:
            return OfferGone(said, code="no_such_ask")
        return Refused(said, code=code or str(answer.status))

    def _said(self, answer: _Answer, hidden: Sequence[str] = ()) -> str:
        """What the answer says, short enough for a log line, without our key and without what
        the machine was given."""
        text = answer.words
        for value in (self._key, *hidden):
            text = text.replace(value, "***") if value else text
        return f"{answer.status} {text[:300]}".strip()

    def _instance(self, row: Mapping[str, Any]) -> Instance:
        """An instance as Vast lists it; whatever of it cannot be read is left at its default."""
        return Instance(
            id=_text(row.get("id")),
            label=_text(row.get("label")),
            machine_id=_text(row.get("machine_id")),
            phase=phase(row),
            gpu_name=_text(row.get("gpu_name")),
            preempted=_preempted(row),
            message=_text(row.get("status_msg")).replace(self._key, "***").strip()[:500],
            started_at=_moment(row.get("start_date")),
            price=_micro(row, "dph_total") or 0,
            download_price=_micro(row, "inet_down_cost") or 0,
            raw={key: value for key, value in row.items() if not SECRET_KEYS.search(str(key))},
        )


def phase(row: Mapping[str, Any]) -> str:
    """Our word for what a record's whole tuple of states says (see `Instance`).

    `actual_status` is the container's, `intended_status` and `next_state` what the market is
    going to do, `cur_state` the contract's. A contract that is meant to be stopped before it ever
    ran was abandoned, or lost its GPU after the image was there: it will not run.
    """
    actual, intended, current, following = (
        "" if (word := row.get(key)) is None else str(word).lower()
        for key in ("actual_status", "intended_status", "cur_state", "next_state")
    )
    given_up = {intended, current, following} == {"stopped"}
    if actual in ("", "created", "loading"):
        if not (actual or intended or current):
            return "lost"
        return "ended" if intended == "stopped" or current == "unloaded" else "starting"
    if actual in ("rebooting", "recycling", "restarting"):
        return "starting"
    if actual == "running":
        return "ended" if given_up else "running"
    if actual in ("stopped", "exited", "frozen"):
        return "ended"
    return "lost"


def _preempted(row: Mapping[str, Any]) -> bool:
    """Whether the market itself stopped it, or never started it, without a word of a fault."""
    stopped = str(row.get("intended_status")).lower() == "stopped"
    return stopped and "error" not in _text(row.get("status_msg")).lower()


def _search(needs: GpuNeeds, limit: int, *, bid: bool) -> dict[str, Any]:
    query: dict[str, Any] = {
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
        "num_gpus": {"eq": 1},
        "gpu_ram": {"gte": needs.min_vram_gb * 1000},
        "disk_space": {"gte": needs.disk_gb},
        "reliability": {"gte": needs.min_reliability},
        "inet_down": {"gte": needs.min_download_mbps},
        "cuda_max_good": {"gte": needs.min_cuda},
        "dph_total": {"lte": needs.max_price / 1e6},
        "order": [["dph_total", "asc"]],
        "type": "bid" if bid else "on-demand",
        "limit": max(1, min(limit, SEARCH_CAP)),
        "allocated_storage": needs.disk_gb,
    }
    if needs.verified_only:
        query["verified"] = {"eq": True}
    if needs.gpu_names:
        query["gpu_name"] = {"in": list(needs.gpu_names)}
    return query


def _offer(row: Any, disk_gb: float, *, bid: bool) -> Offer | None:
    """The offer in a row of a search; None when it cannot be rented or read."""
    if not isinstance(row, dict) or row.get("rentable") is False or row.get("rented") is True:
        return None
    price, vram_mb = _micro(row, "dph_total"), _number(row, "gpu_ram")
    identity, machine = _text(row.get("id")), _text(row.get("machine_id"))
    gpus = _number(row, "num_gpus")
    if not (identity.isdigit() and machine and price and vram_mb and gpus == 1):
        return None
    reliability = _number(row, "reliability2")
    storage_price = (_micro(row, "storage_cost") or 0) * disk_gb / HOURS_PER_MONTH
    offered = 0
    if bid:
        least = _micro(row, "min_bid")
        if not least:
            return None
        offered = round(least * BID_MARGIN)
        price = round(offered + storage_price)
    return Offer(
        id=identity,
        machine_id=machine,
        gpu_name=_text(row.get("gpu_name")),
        num_gpus=1,
        vram_gb=vram_mb / 1000,
        price=price,
        storage_price=round(storage_price),
        download_price=_micro(row, "inet_down_cost") or 0,
        upload_price=_micro(row, "inet_up_cost") or 0,
        download_mbps=_number(row, "inet_down") or 0.0,
        upload_mbps=_number(row, "inet_up") or 0.0,
        reliability=(_number(row, "reliability") if reliability is None else reliability) or 0.0,
        verified=row.get("verification") == "verified",
        cuda=_number(row, "cuda_max_good") or 0.0,
        disk_gb=_number(row, "disk_space") or 0.0,
        geo=_text(row.get("geolocation")).strip(),
        duration_s=_number(row, "duration") or 0.0,
        dlperf=_number(row, "dlperf") or 0.0,
        bid=offered,
    )


def _create_body(spec: LaunchSpec) -> dict[str, Any]:
    """Raises: Refused, when Vast would not take it."""
    if len(spec.onstart) > MAX_ONSTART:
        raise Refused(f"onstart is longer than {MAX_ONSTART} characters", code="invalid_args")
    if len(json.dumps(dict(spec.env))) > MAX_ENV:
        raise Refused(f"env is longer than {MAX_ENV} characters", code="invalid_args")
    body: dict[str, Any] = build_create_instance_payload(
        image=spec.image,
        disk=spec.disk_gb,
        env=dict(spec.env),
        label=spec.label,
        price=spec.bid / 1_000_000 if spec.bid else None,
        onstart_cmd=spec.onstart,
        ssh=True,
        direct=False,
        cancel_unavail=True,  # otherwise a taken GPU leaves a stopped contract that bills its disk
    )
    return body


def _contract(answer: _Answer) -> str | None:
    """The id that a create answer names, also when the answer is a no or was cut short."""
    named = answer.fields.get("new_contract")
    if answer.body is None:
        cut = re.search(rb'"new_contract"\s*:\s*(\d{1,18})\s*[,}]', answer.content)
        named = cut.group(1).decode() if cut else None
    text = _text(named)
    return text if text.isdigit() and int(text) > 0 else None


def _is_gone(answer: _Answer) -> bool:
    """Whether this is the market's own word for "there is no such instance"."""
    if answer.status not in (200, 404, 410) or answer.ok:
        return False
    if answer.code:
        return answer.code in ("not_found", "no_such_instance")
    return re.search(r"\binstance\b.*\bnot found\b", answer.words, re.IGNORECASE) is not None


def _ended(fields: Mapping[str, Any], seen: int) -> bool:
    """Whether a page without a token is the last: it says so, or the account's count is reached;
    and no fewer rows came than it found."""
    found, total = _number(fields, "instances_found"), _number(fields, "total_instances")
    found = _number(fields, "total") if found is None else found
    if found is not None and seen < found:
        return False
    return "next_token" in fields or (total is not None and seen >= total)


def _pause(endpoint: str, answer: _Answer) -> float:
    """Seconds to keep away from an endpoint that said "too frequent"."""
    if answer.code == "search_quota_exceeded":
        return QUOTA_PAUSE_S
    if answer.retry_after is not None:
        return answer.retry_after
    named = re.search(r"threshold=(\d{1,4}(?:\.\d+)?)", answer.words)
    pause = float(named.group(1)) if named else SPACING.get(endpoint, SMALLEST_SPACING)
    return pause + (CREATE_PENALTY_S if endpoint == "create" else 0.0)


def _id(text: str) -> str:
    """An id as it may stand in a path. Raises: Refused."""
    if not (text.isascii() and text.isdigit()):
        raise Refused(f"{text!r} is no id of Vast", code="invalid_id")
    return text


def _text(value: Any) -> str:
    """A JSON string, or number of an id, as text; anything else is empty."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _number(fields: Mapping[str, Any], key: str, *, least: float = 0.0) -> float | None:
    """A finite number of at least `least`; None when there is none."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= least else None


def _micro(fields: Mapping[str, Any], key: str) -> int | None:
    dollars = _number(fields, key)
    return None if dollars is None else round(dollars * 1_000_000)


def _moment(epoch: Any) -> datetime | None:
    if isinstance(epoch, bool) or not isinstance(epoch, int | float) or not epoch > 0:
        return None
    try:
        return datetime.fromtimestamp(epoch, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _quiet_the_sdk() -> None:
    """The SDK writes to stderr through a handler of its own; ours decide what is written."""
    logger = logging.getLogger("vastai")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.WARNING)
