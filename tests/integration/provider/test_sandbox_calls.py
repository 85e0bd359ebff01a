"""Every fault of a call by its name, on the wire, and what `VastProvider` makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from infra.provider import LaunchSpec
from infra.sandbox.faults import Fault, HostFault, any_trouble, profile
from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state.errors import (
    AccountFault,
    OfferGone,
    ProviderError,
    Refused,
    Throttled,
    Unknown,
    Unreadable,
)
from state.job import GpuNeeds

KEY = "sandbox-account-key"


@dataclass(frozen=True, kw_only=True)
class Client:
    """Asks the sandbox, without any SDK in between."""

    sandbox: Sandbox

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"}
        url = self.sandbox.url + path
        return requests.request(method, url, headers=headers, json=body, timeout=10)

    def offers(self) -> list[dict[str, Any]]:
        found = self.ask("POST", "/api/v0/bundles/", {"order": [["dph_total", "asc"]]}).json()
        return list(found["offers"])

    def create(self, ask: int | None = None, **body: Any) -> requests.Response:
        ask = self.offers()[0]["id"] if ask is None else ask
        body = {"image": "x", "disk": 16, "label": "t/j/1", **body}
        return self.ask("PUT", f"/api/v0/asks/{ask}/", body)

    def rent(self, count: int = 1) -> list[int]:
        return [int(self.create().json()["new_contract"]) for _ in range(count)]

    def list(self, query: str = "") -> requests.Response:
        return self.ask("GET", f"/api/v1/instances/{query}")

    def listed(self) -> list[int]:
        return [row["id"] for row in self.list().json()["instances"]]

    def call(self, op: str, number: int) -> requests.Response:
        calls: dict[str, tuple[str, str, Any]] = {
            "list": ("GET", "/api/v1/instances/", None),
            "show": ("GET", f"/api/v0/instances/{number}/", None),
            "manage": ("PUT", f"/api/v0/instances/{number}/", {"state": "stopped"}),
            "destroy": ("DELETE", f"/api/v0/instances/{number}/", {}),
            "logs": ("PUT", f"/api/v0/instances/request_logs/{number}/", {}),
            "user": ("GET", "/api/v0/users/current", None),
            "search": ("POST", "/api/v0/bundles/", {}),
            "charges": ("GET", "/api/v0/charges/", None),
        }
        return self.ask(*calls[op])


@pytest.fixture
def opened() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def open_market(*faults: Fault | HostFault, **options: Any) -> Client:
            options = {"boot_s": 1e9, **options}
            sandbox = running_sandbox(account_key=KEY, faults=faults, **options)
            return Client(sandbox=stack.enter_context(sandbox))

        yield open_market


def provider(client: Client) -> VastProvider:
    return VastProvider(KEY, client.sandbox.url, spacing=0, timeout=5)


# --- any call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["list", "show", "manage", "destroy", "logs", "user", "search"])
def test_any_call_is_lost_late_throttled_garbled_or_refused(
    opened: Callable[..., Client], op: str
) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "status", "status": 503},
        {"kind": "html"},
        {"kind": "empty"},
        {"kind": "throttle", "shape": "text"},
        {"kind": "throttle", "shape": "detail"},
        {"kind": "throttle", "shape": "json"},
        {"kind": "auth"},
        {"kind": "auth", "status": 404},
        {"kind": "refuse"},
        {"kind": "answer", "status": 418, "body": [1]},
        {"kind": "drop"},
        {"kind": "truncate"},
    ]
    client = opened(*(Fault(op=op, nth=nth, **kind) for nth, kind in enumerate(kinds, 1)))
    (number,) = (client.create(client.sandbox.market.search({})[0]["id"]).json()["new_contract"],)
    answers = [client.call(op, number) for _ in kinds[:10]]
    assert [answer.status_code for answer in answers] == [
        503, 200, 200, 429, 429, 429, 401, 404, 200, 418,
    ]  # fmt: skip
    assert answers[1].text.startswith("<html>")
    assert answers[2].text == ""
    assert answers[3].text == "API requests too frequent: endpoint threshold=2.0"
    assert answers[4].json() == {"detail": "API requests too frequent endpoint threshold=2.0"}
    assert answers[5].json()["error"] == "rate_limit_exceeded"
    assert answers[6].json()["error"] == answers[7].json()["error"] == "auth_error"
    assert answers[8].json()["success"] is False
    assert "new_contract" not in answers[8].json()
    assert number in client.sandbox.market.contracts, "none of these had an effect"
    with pytest.raises(requests.ConnectionError):
        client.call(op, number)
    with pytest.raises(requests.JSONDecodeError):
        client.call(op, number).json()
    assert client.call(op, number).status_code in (200, 404)


@pytest.mark.parametrize("kind", ["drop", "status", "html", "empty", "delay"])
def test_a_destroy_has_its_effect_and_its_answer_does_not_come(
    opened: Callable[..., Client], kind: str
) -> None:
    late = {"seconds": 0.1} if kind == "delay" else {"after": True}
    client = opened(Fault(op="destroy", kind=kind, **late))
    (number,) = client.rent()
    with contextlib.suppress(requests.ConnectionError):
        client.call("destroy", number)
    assert client.listed() == []


# --- create ---------------------------------------------------------------------------------------


def test_success_without_an_id(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="create", kind="no_id"))
    assert client.create().json() == {"success": True}
    assert len(client.listed()) == 1


def test_no_success_with_an_id_and_without(opened: Callable[..., Client]) -> None:
    client = opened(
        Fault(op="create", kind="refuse"), Fault(op="create", kind="refuse", nth=2, after=True)
    )
    bare, named = client.create().json(), client.create().json()
    assert (bare["success"], named["success"]) == (False, False)
    assert "new_contract" not in bare
    assert client.listed() == [named["new_contract"]]
    (row,) = client.list().json()["instances"]
    assert (row["actual_status"], row["intended_status"]) == ("created", "stopped")


@pytest.mark.parametrize("status", [400, 404, 410, 200])
def test_the_ask_is_gone_in_four_ways(opened: Callable[..., Client], status: int) -> None:
    client = opened(Fault(op="create", kind="no_such_ask", status=status))
    (first, *_) = client.offers()
    answer = client.create(first["id"])
    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert "no_such_ask" in answer.json()["error"] + answer.json()["msg"]
    again = {offer["machine_id"]: offer["id"] for offer in client.offers()}
    assert again[first["machine_id"]] != first["id"]
    assert client.listed() == []


@pytest.mark.parametrize("kind", ["insufficient_credit", "spend_rate_limit"])
def test_the_account_may_not_rent(opened: Callable[..., Client], kind: str) -> None:
    client = opened(Fault(op="create", kind=kind))
    answer = client.create()
    assert (answer.status_code, answer.json()["error"]) == (400, kind)
    assert client.listed() == []


def test_a_price_changes_between_search_and_create(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="search", kind="price_change", factor=2))
    (first, *_) = client.offers()
    client.create(first["id"])
    (row,) = client.list().json()["instances"]
    assert row["dph_base"] == pytest.approx(2 * first["dph_base"])


def test_a_price_changes_on_one_machine_alone(opened: Callable[..., Client]) -> None:
    client = opened()
    first, second, *_ = client.offers()
    machine = first["machine_id"]
    change = Fault(op="search", kind="price_change", factor=0.5, machine=machine, times=2)
    client.sandbox.faults.add(change)
    assert client.offers()[0]["dph_base"] == first["dph_base"], "shown are the old prices"
    again = {offer["machine_id"]: offer["dph_base"] for offer in client.offers()}
    assert again[machine] == pytest.approx(first["dph_base"] / 2)
    assert again[second["machine_id"]] == second["dph_base"]


def test_who_creates_too_fast_waits_longer(opened: Callable[..., Client]) -> None:
    now = [1_800_000_000.0]
    client = opened(rate_limits=True, clock=lambda: now[0])
    asks, statuses = [offer["id"] for offer in client.offers()], []
    for ask, pause in zip(asks, (0, 4.6, 4.0, 5.0, 12.0), strict=False):
        now[0] += pause
        statuses.append(client.create(ask).status_code)
    assert statuses == [200, 200, 429, 429, 429]
    now[0] += 16.5
    assert client.create(asks[5]).status_code == 200


# --- lists ----------------------------------------------------------------------------------------


def test_the_list_is_behind(opened: Callable[..., Client]) -> None:
    client = opened(
        Fault(op="list", kind="read_lag", seconds=1e9, times=2),
        Fault(op="show", kind="read_lag", seconds=1e9),
    )
    (number,) = client.rent()
    assert client.listed() == client.listed() == []
    assert client.call("show", number).json() == {"instances": None}
    assert client.listed() == [number]


def test_a_row_is_missing_and_nothing_says_so(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="list", kind="missing_row"))
    first, second = client.rent(2)
    answer = client.list().json()
    assert [row["id"] for row in answer["instances"]] == [first]
    assert answer["instances_found"] == answer["total_instances"] == 1
    assert client.listed() == [first, second]


def test_the_row_of_one_machine_is_missing(opened: Callable[..., Client]) -> None:
    client = opened()
    first, second = client.rent(2)
    machine = client.sandbox.market.contracts[first].host.machine_id
    client.sandbox.faults.add(Fault(op="list", kind="missing_row", machine=machine))
    assert client.listed() == [second]


def test_a_page_is_stale(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="list", kind="stale_page", nth=2))
    (first,) = client.rent()
    assert client.listed() == [first]
    (second,) = client.rent()
    client.call("destroy", first)
    assert client.listed() == [first], "the page of before"
    assert client.listed() == [second]


def test_a_row_comes_twice_across_pages(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="list", kind="doubled_row", nth=2))
    numbers = client.rent(4)
    page = client.list("?limit=2").json()
    after = client.list(f"?limit=2&after_token={page['next_token']}").json()
    rows = [row["id"] for row in (*page["instances"], *after["instances"])]
    assert rows == [*numbers[:2], numbers[1], *numbers[2:]]


def test_half_a_page(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="list", kind="half_page"))
    numbers = client.rent(4)
    answer = client.list().json()
    assert [row["id"] for row in answer["instances"]] == numbers[:2]
    assert (answer["instances_found"], answer["next_token"]) == (4, None)


def test_the_list_is_deprecated(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="list", kind="deprecated"))
    answer = client.list()
    assert (answer.status_code, answer.json()["error"]) == (410, "deprecated_endpoint")


def test_records_are_stunted(opened: Callable[..., Client]) -> None:
    kinds = ("statusless", "null_fields", "null_start_date", "null_row")
    client = opened(
        *(
            Fault(op=op, kind=kind, nth=nth)
            for op in ("list", "show")
            for nth, kind in enumerate(kinds, 1)
        )
    )
    (number,) = client.rent()
    listed = [client.list().json()["instances"][0] for _ in kinds]
    shown = [client.call("show", number).json()["instances"] for _ in kinds]
    for statusless, nulls, undated, nothing in (listed, shown):
        assert statusless["id"] == number
        assert not {"actual_status", "intended_status", "cur_state"} & statusless.keys()
        assert (nulls["id"], nulls["machine_id"], nulls["label"]) == (number, None, None)
        assert undated["start_date"] is None
        assert nothing is None


# --- destroy, logs --------------------------------------------------------------------------------


def test_a_destroy_is_confirmed_long_before_it_happens(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="destroy", kind="lingers", seconds=1.0))
    (number,) = client.rent()
    assert client.call("destroy", number).json()["success"] is True
    assert client.listed() == [number]
    assert client.call("destroy", number).json()["success"] is True
    deadline = time.monotonic() + 20
    while client.listed():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_destroy_is_confirmed_and_forgotten(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="destroy", kind="ignored"))
    (number,) = client.rent()
    assert client.call("destroy", number).json()["success"] is True
    assert client.listed() == [number]
    client.call("destroy", number)
    assert client.listed() == []


def test_a_log_is_never_ready(opened: Callable[..., Client]) -> None:
    client = opened(Fault(op="logs", kind="never_ready"))
    (number,) = client.rent()
    never, later = (client.call("logs", number).json()["result_url"] for _ in range(2))
    assert {requests.get(never, timeout=5).status_code for _ in range(10)} == {403}
    statuses = [requests.get(later, timeout=5).status_code for _ in range(5)]
    assert statuses[-1] == 200


def test_a_machines_key_may_stop_it_and_not_destroy_it(opened: Callable[..., Client]) -> None:
    client = opened(HostFault(kind="weak_key"))
    made = client.create().json()
    number, key = made["new_contract"], made["instance_api_key"]
    path = f"/api/v0/instances/{number}/"
    assert client.ask("DELETE", path, {}, key).status_code == 403
    assert client.ask("PUT", path, {"state": "stopped"}, key).json()["success"] is True
    assert client.listed() == [number]


def test_a_fault_is_for_the_nth_call_of_one_machine(opened: Callable[..., Client]) -> None:
    client = opened()
    first, second = client.rent(2)
    machine = client.sandbox.market.contracts[second].host.machine_id
    client.sandbox.faults.add(Fault(op="show", kind="status", machine=machine, nth=2))
    calls = [(first, 200), (second, 200), (first, 200), (second, 502), (second, 200)]
    for number, status in calls:
        assert client.call("show", number).status_code == status
    (fired,) = client.sandbox.faults.fired
    assert (fired["op"], fired["machine"], fired["contract"]) == ("show", machine, second)


# --- what our adapter makes of it -----------------------------------------------------------------

CREATES: list[tuple[Fault, type[ProviderError], bool]] = [
    (Fault(op="create", kind="no_id"), Unknown, True),
    (Fault(op="create", kind="refuse"), Refused, False),
    (Fault(op="create", kind="refuse", status=400), Refused, False),
    (Fault(op="create", kind="refuse", after=True), Refused, True),
    (Fault(op="create", kind="no_such_ask", status=400), OfferGone, False),
    (Fault(op="create", kind="no_such_ask", status=404), OfferGone, False),
    (Fault(op="create", kind="no_such_ask", status=410), OfferGone, False),
    (Fault(op="create", kind="no_such_ask", status=200), OfferGone, False),
    (Fault(op="create", kind="insufficient_credit"), AccountFault, False),
    (Fault(op="create", kind="spend_rate_limit"), AccountFault, False),
    (Fault(op="create", kind="auth"), AccountFault, False),
    (Fault(op="create", kind="auth", status=404), AccountFault, False),
    (Fault(op="create", kind="throttle", shape="text"), Throttled, False),
    (Fault(op="create", kind="throttle", shape="detail"), Throttled, False),
    (Fault(op="create", kind="throttle", shape="json"), Throttled, False),
    (Fault(op="create", kind="empty", after=True), Unknown, True),
    (Fault(op="create", kind="status", status=500), Unknown, False),
]


@pytest.mark.parametrize(("fault", "error", "made"), CREATES, ids=lambda item: str(item)[:60])
def test_a_create_ends_in_the_right_error(
    opened: Callable[..., Client],
    spec: LaunchSpec,
    fault: Fault,
    error: type[ProviderError],
    made: bool,
) -> None:
    client = opened(fault)
    vast = provider(client)
    (offer, *_) = vast.offers(GpuNeeds())
    with pytest.raises(ProviderError) as caught:
        vast.create(offer, spec)
    assert type(caught.value) is error
    assert bool(client.sandbox.market.contracts) is made
    if fault.kind == "refuse" and made:
        assert caught.value.instance_id == str(client.listed()[0]), "the id comes with the error"


@pytest.mark.parametrize(
    "kind", ["deprecated", "empty", "half_page", "html", "truncate", "refuse", "status", "auth"]
)
def test_a_list_that_is_none_is_never_taken_for_empty(
    opened: Callable[..., Client], kind: str
) -> None:
    client = opened(Fault(op="list", kind=kind, times=0))
    client.rent(2)
    with pytest.raises((Unreadable, Refused)):
        provider(client).instances()


def test_odd_rows_do_not_hide_the_others(opened: Callable[..., Client]) -> None:
    kinds = ("statusless", "null_fields", "null_start_date", "doubled_row")
    client = opened(*(Fault(op="list", kind=kind, nth=nth) for nth, kind in enumerate(kinds, 1)))
    numbers = {str(number) for number in client.rent(3)}
    for kind in kinds:
        assert {item.id for item in provider(client).instances()} == numbers, kind


def test_an_outbid_machine_has_ended_and_a_lost_one_is_lost(opened: Callable[..., Client]) -> None:
    client = opened(
        HostFault(kind="outbid", rental=1), HostFault(kind="offline", rental=2), boot_s=0.2
    )
    numbers = [str(number) for number in client.rent(2)]
    vast, deadline = provider(client), time.monotonic() + 20
    while True:
        phases = {item.id: item.phase for item in vast.instances()}
        if phases == dict(zip(numbers, ("ended", "lost"), strict=True)):
            break
        assert time.monotonic() < deadline, phases
        time.sleep(0.05)


@pytest.mark.parametrize("seed", range(2))
def test_in_hell_what_our_adapter_says_of_a_create_is_true(
    opened: Callable[..., Client], spec: LaunchSpec, seed: int
) -> None:
    calls = [fault for fault in profile("hell") if isinstance(fault, Fault)]
    client = opened(*calls, *any_trouble(0.3), seed=seed, time_scale=50)
    vast, market = provider(client), client.sandbox.market
    outcomes = set()
    for count in range(80):
        label = f"test/job/{count}"
        with contextlib.suppress(ProviderError):
            (offer, *_) = vast.offers(GpuNeeds())
            number, error = None, None
            try:
                number = vast.create(offer, dataclasses.replace(spec, label=label))
            except ProviderError as raised:
                number, error = raised.instance_id, raised
            made = [item.id for item in list(market.contracts.values()) if item.label == label]
            outcomes.add(type(error))
            if number is not None:
                assert made == [int(number)]
            elif isinstance(error, Refused):
                assert made == [], error
            for item in made:
                market.destroy(item)
        market.settle()
    assert {type(None), Unknown, OfferGone} <= outcomes
