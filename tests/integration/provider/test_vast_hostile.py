"""Vast.ai at its worst: what each answer, half answer or silence is taken for."""

from __future__ import annotations

import logging
import math
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest

from infra.provider import LaunchSpec
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
from state.offer import Offer

KEY = "sandbox-account-key"
OFFER = Offer(
    id="77",
    machine_id="9",
    gpu_name="RTX 4090",
    num_gpus=1,
    vram_gb=24,
    price=300_000,
    storage_price=5000,
    download_price=0,
    upload_price=0,
    download_mbps=500,
    upload_mbps=500,
    reliability=0.99,
    verified=True,
    cuda=12.8,
    disk_gb=100,
)
OFFER_ROW = {
    "id": 77,
    "machine_id": 9,
    "gpu_name": "RTX 4090",
    "num_gpus": 1,
    "gpu_ram": 24564,
    "dph_total": 0.34,
    "storage_cost": 0.15,
    "inet_down_cost": 0.002,
    "inet_up_cost": 0.002,
    "inet_down": 800,
    "inet_up": 300,
    "reliability2": 0.99,
    "verification": "verified",
    "cuda_max_good": 12.8,
    "disk_space": 500,
    "rentable": True,
    "rented": False,
}
ROW = {
    "id": 5,
    "label": "a",
    "machine_id": 9,
    "actual_status": "running",
    "intended_status": "running",
    "cur_state": "running",
    "next_state": "running",
    "status_msg": "success, running x/ssh\n",
    "start_date": 1_790_000_000.5,
    "dph_total": 0.31,
    "extra_env": [["STOKER_TOKEN", "one-use-token"]],
}
NO_SUCH_ASK = "error 404/3603: no_such_ask Instance type by id 77 is not available."
THROTTLES = [
    "API requests too frequent: endpoint threshold=4.5",
    {"detail": "API requests too frequent endpoint threshold=2.0"},
    {"success": False, "error": "rate_limit_exceeded", "msg": "API requests too frequent"},
]


def failure(hostile: Any, spec: LaunchSpec, *replies: Any, timeout: float = 5.0) -> ProviderError:
    """What a create call makes of these answers; it was sent once, whatever they are."""
    hostile.answers(*replies)
    with pytest.raises(ProviderError) as caught:
        hostile.provider(timeout).create(OFFER, spec)
    assert [request.method for request in hostile.seen] == ["PUT"]
    return caught.value


# --- creating: nothing is asked twice, no id is lost, only a clear no is a no ------------------


def test_a_dropped_create_is_unknown_and_not_repeated(hostile: Any, spec: LaunchSpec) -> None:
    assert type(failure(hostile, spec, hostile.dropped)) is Unknown


def test_a_silent_create_is_unknown_and_not_repeated(hostile: Any, spec: LaunchSpec) -> None:
    assert type(failure(hostile, spec, hostile.silence, timeout=0.3)) is Unknown


def test_a_create_answered_byte_by_byte_for_ever_is_unknown(hostile: Any, spec: LaunchSpec) -> None:
    assert type(failure(hostile, spec, hostile.drip, timeout=0.4)) is Unknown


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 520])
def test_a_server_error_on_create_is_unknown(hostile: Any, spec: LaunchSpec, status: int) -> None:
    error = failure(hostile, spec, hostile.http(status, {"success": False, "error": "oops"}))
    assert type(error) is Unknown


@pytest.mark.parametrize(
    "body",
    [
        "<html>Welcome to our captive portal</html>",
        "",
        "null",
        "[]",
        "42",
        '{"success": true, "new_con',
        "\x00\xff",
        "[" * 100_000,
        {"success": True},
        {"success": True, "new_contract": None},
        {"success": True, "new_contract": True},
        {"success": True, "new_contract": -4},
        {"success": True, "new_contract": {"id": 4}},
        {"success": "yes"},
        {},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_200_without_a_usable_id_is_unknown(hostile: Any, spec: LaunchSpec, body: Any) -> None:
    error = failure(hostile, spec, hostile.http(200, body))
    assert type(error) is Unknown
    assert error.instance_id is None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, {"success": False, "error": "invalid_price", "new_contract": 42}, Refused),
        (400, {"success": False, "error": "invalid_price", "new_contract": 42}, Refused),
        (400, {"success": False, "msg": NO_SUCH_ASK, "new_contract": "42"}, OfferGone),
        (429, {"success": False, "error": "rate_limit_exceeded", "new_contract": 42}, Throttled),
        (500, {"success": False, "new_contract": 42}, Unknown),
        (200, {"new_contract": 42}, Unknown),
        (200, '{"success": true, "new_contract": 42, "instance_a', Unknown),
        (502, '{"success": true, "new_contract": 42, "instance_a', Unknown),
    ],
)
def test_an_id_in_a_failed_create_is_handed_over(
    hostile: Any, spec: LaunchSpec, status: int, body: Any, kind: type[ProviderError]
) -> None:
    error = failure(hostile, spec, hostile.http(status, body))
    assert type(error) is kind
    assert error.instance_id == "42"


def test_an_id_that_was_cut_short_is_no_id(hostile: Any, spec: LaunchSpec) -> None:
    error = failure(hostile, spec, hostile.http(200, '{"success": true, "new_contract": 123'))
    assert type(error) is Unknown
    assert error.instance_id is None


def test_an_answer_shorter_than_announced_is_unknown(hostile: Any, spec: LaunchSpec) -> None:
    whole = b'{"success": true, "new_contract": 42}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
    assert type(failure(hostile, spec, hostile.raw(head + whole))) is Unknown


def test_an_answer_that_is_not_http_is_unknown(hostile: Any, spec: LaunchSpec) -> None:
    assert type(failure(hostile, spec, hostile.raw(b"SSH-2.0-OpenSSH_9.6\r\n"))) is Unknown


def test_a_broken_encoding_is_unknown(hostile: Any, spec: LaunchSpec) -> None:
    reply = hostile.http(200, {"success": True, "new_contract": 42}, Content_Encoding="gzip")
    assert type(failure(hostile, spec, reply)) is Unknown


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"success": False, "error": "invalid_args", "msg": NO_SUCH_ASK, "ask_id": 77}),
        (410, {"error": "no_such_ask", "msg": "error 410/3907: no_such_ask Instance type 77"}),
        (400, {"success": False, "error": "no_such_ask", "msg": ""}),
        (200, {"success": False, "error": "no_such_ask"}),
        (200, {"success": False, "msg": NO_SUCH_ASK}),
    ],
)
def test_a_taken_offer_is_gone_in_every_shape(
    hostile: Any, spec: LaunchSpec, status: int, body: Any
) -> None:
    assert type(failure(hostile, spec, hostile.http(status, body))) is OfferGone


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}),
        (401, "<html>no</html>"),
        (404, {"success": False, "error": "auth_error", "msg": "Invalid user key"}),
        (400, {"success": False, "error": "insufficient_credit", "msg": "add credit"}),
        (200, {"success": False, "error": "insufficient_credit"}),
        (400, {"success": False, "error": "spend_rate_limit"}),
    ],
)
def test_what_only_the_account_can_mend_is_an_account_fault(
    hostile: Any, spec: LaunchSpec, status: int, body: Any
) -> None:
    assert type(failure(hostile, spec, hostile.http(status, body))) is AccountFault


@pytest.mark.parametrize("body", THROTTLES, ids=str)
def test_too_frequent_is_throttled_in_every_shape(
    hostile: Any, spec: LaunchSpec, body: Any
) -> None:
    error = failure(hostile, spec, hostile.http(429, body))
    assert isinstance(error, Throttled)
    assert error.retry_after >= 12  # the documented penalty of a refused create


def test_a_named_wait_is_obeyed(hostile: Any, spec: LaunchSpec) -> None:
    error = failure(hostile, spec, hostile.http(429, "slow down", Retry_After="7"))
    assert isinstance(error, Throttled)
    assert error.retry_after == 7


def test_other_clear_refusals_keep_their_code(hostile: Any, spec: LaunchSpec) -> None:
    body = {"success": False, "error": "invalid_args", "msg": "error 400/3467: Invalid args: disk"}
    error = failure(hostile, spec, hostile.http(400, body))
    assert type(error) is Refused
    assert error.code == "invalid_args"
    assert "Invalid args: disk" in str(error)


def test_a_4xx_that_is_not_the_markets_own_is_unknown(hostile: Any, spec: LaunchSpec) -> None:
    assert type(failure(hostile, spec, hostile.http(403, "<html>Cloudflare</html>"))) is Unknown


def test_a_server_that_cannot_be_reached_refused_for_sure(spec: LaunchSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    provider = VastProvider(KEY, f"http://127.0.0.1:{port}", spacing=0)
    with pytest.raises(Refused) as caught:
        provider.create(OFFER, spec)
    assert caught.value.code == "unreachable"


def test_a_redirect_elsewhere_gets_neither_key_nor_body(hostile: Any, spec: LaunchSpec) -> None:
    away = hostile.http(308, {}, Location="https://example.com/api/v0/asks/77/")
    assert type(failure(hostile, spec, away)) is Unknown


def test_a_redirect_within_the_service_is_followed(hostile: Any, spec: LaunchSpec) -> None:
    made = hostile.http(200, {"success": True, "new_contract": 42})
    hostile.answers(hostile.http(308, {}, Location="/api/v0/moved/77/"), made)
    assert hostile.provider().create(OFFER, spec) == "42"
    first, second = hostile.seen
    assert second.method == "PUT"
    assert second.json == first.json
    assert second.headers["authorization"] == f"Bearer {KEY}"


def test_the_create_call_says_all_that_must_be_said(hostile: Any, spec: LaunchSpec) -> None:
    hostile.answers(hostile.http(200, {"success": True, "new_contract": 42}))
    assert hostile.provider().create(OFFER, spec) == "42"
    (request,) = hostile.seen
    assert request.path == "/api/v0/asks/77/"
    assert request.headers["user-agent"] == "vastai-sdk/1.9.1"
    wanted = {
        "image": spec.image,
        "disk": 20,
        "label": spec.label,
        "env": dict(spec.env),
        "onstart": spec.onstart,
        "runtype": "ssh_proxy",
        "price": None,
        "cancel_unavail": True,
        "client_id": "me",
    }
    assert {key: request.json[key] for key in wanted} == wanted


def test_what_vast_would_not_take_is_refused_before_it_is_sent(hostile: Any) -> None:
    long_script = LaunchSpec(label="l", image="i", disk_gb=20, onstart="x" * 4049)
    long_env = LaunchSpec(label="l", image="i", disk_gb=20, onstart="", env={"A": "x" * 32769})
    for spec in (long_script, long_env):
        with pytest.raises(Refused):
            hostile.provider().create(OFFER, spec)
    assert hostile.seen == []


def test_netrc_and_proxies_do_not_come_between(
    hostile: Any, spec: LaunchSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password wrong\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    hostile.answers(hostile.http(200, {"success": True, "new_contract": 42}))
    hostile.provider().create(OFFER, spec)
    assert hostile.seen[0].headers["authorization"] == f"Bearer {KEY}"


# --- reading: what cannot be read is never empty -----------------------------------------------


def page(*rows: Any, token: Any = None) -> dict[str, Any]:
    return {"success": True, "instances": list(rows), "next_token": token}


UNREADABLE = [
    (200, "<html></html>"),
    (200, '{"success": true, "instances": ['),
    (200, ""),
    (200, "[]"),
    (200, "null"),
    (200, {}),
    (200, {"success": True}),
    (200, {"success": True, "instances": None}),
    (200, {"success": True, "instances": "none"}),
    (200, {"success": True, "instances": {}}),
    (200, {"success": False, "error": "deprecated_endpoint"}),
    (200, {"success": False}),
    (410, {"success": False, "error": "deprecated_endpoint", "msg": "use v1"}),
    (401, {"success": False, "error": "auth_error"}),
    (404, {"success": False, "error": "auth_error"}),
    (404, "<html></html>"),
    (429, "API requests too frequent"),
    (500, {"success": True, "instances": []}),
    (503, ""),
]


@pytest.mark.parametrize(("status", "body"), UNREADABLE, ids=str)
def test_a_list_that_cannot_be_read_is_never_an_empty_list(
    hostile: Any, status: int, body: Any
) -> None:
    hostile.answers(hostile.http(status, body))
    with pytest.raises((Unreadable, Refused)):
        hostile.provider().instances()


@pytest.mark.parametrize(("status", "body"), UNREADABLE, ids=str)
def test_offers_and_account_that_cannot_be_read_raise(hostile: Any, status: int, body: Any) -> None:
    hostile.answers(hostile.http(status, body))
    for ask in (lambda vast: vast.offers(GpuNeeds()), lambda vast: vast.account()):
        with pytest.raises((Unreadable, Refused)):
            ask(hostile.provider())


@pytest.mark.parametrize("reply", ["dropped", "silence", "drip"])
def test_a_read_without_an_answer_is_unreadable(hostile: Any, reply: str) -> None:
    hostile.answers(getattr(hostile, reply))
    vast = hostile.provider(timeout=0.3)
    for ask in (
        vast.instances,
        vast.account,
        lambda: vast.offers(GpuNeeds()),
        lambda: vast.instance("5"),
        lambda: vast.logs("5"),
    ):
        with pytest.raises(Unreadable):
            ask()


def test_one_odd_row_does_not_hide_the_others(hostile: Any) -> None:
    odd = [
        None,
        "row",
        {},
        {"id": None},
        {"id": 6, "start_date": None, "extra_env": None, "label": None},
        {"id": 7, "actual_status": {"odd": 1}, "dph_total": "much", "start_date": math.inf},
        {"id": 8, "start_date": 1e300, "status_msg": 5, "dph_total": -1},
    ]
    hostile.answers(hostile.http(200, page(*odd, ROW)))
    read = hostile.provider().instances()
    assert [item.id for item in read] == ["6", "7", "8", "5"]
    assert [item.phase for item in read] == ["lost", "lost", "lost", "running"]
    assert [item.started_at is None for item in read] == [True, True, True, False]
    assert read[-1].message == "success, running x/ssh"


def test_pages_are_followed_and_a_row_on_two_of_them_counts_once(hostile: Any) -> None:
    later = {**ROW, "status_msg": "later"}
    hostile.answers(
        hostile.http(200, page(ROW, {**ROW, "id": 6}, token="t+/=1")),
        hostile.http(200, page(later, {**ROW, "id": 7})),
    )
    read = hostile.provider().instances()
    assert sorted(item.id for item in read) == ["5", "6", "7"]
    assert next(item for item in read if item.id == "5").message == "later"
    assert "after_token=t%2B%2F%3D1" in hostile.seen[1].path


def test_a_list_whose_second_page_fails_is_not_half_a_list(hostile: Any) -> None:
    hostile.answers(hostile.http(200, page(ROW, token="t1")), hostile.http(502, ""))
    with pytest.raises(Unreadable):
        hostile.provider().instances()


def test_a_cursor_that_runs_in_circles_is_unreadable(hostile: Any) -> None:
    hostile.answers(hostile.http(200, page(ROW, token="t1")))
    with pytest.raises(Unreadable):
        hostile.provider().instances()
    assert len(hostile.seen) == 2


def test_a_page_without_rows_but_with_a_cursor_is_unreadable(hostile: Any) -> None:
    hostile.answers(hostile.http(200, page(token="t1")))
    with pytest.raises(Unreadable):
        hostile.provider().instances()


def test_a_missing_cursor_is_the_end_only_when_the_count_says_so(hostile: Any) -> None:
    body = {"success": True, "instances": [ROW]}
    hostile.answers(hostile.http(200, {**body, "total_instances": 1}))
    assert len(hostile.provider().instances()) == 1
    for more in ({"total_instances": 26}, {}):
        hostile.answers(hostile.http(200, {**body, **more}))
        with pytest.raises(Unreadable):
            hostile.provider().instances()


def test_a_list_that_shows_fewer_than_it_found_is_unreadable(hostile: Any) -> None:
    hostile.answers(hostile.http(200, {**page(ROW), "instances_found": 2}))
    with pytest.raises(Unreadable):
        hostile.provider().instances()


def test_a_row_shown_twice_does_not_stand_in_for_one_that_is_missing(hostile: Any) -> None:
    hostile.answers(
        hostile.http(200, {**page(ROW, token="t1"), "instances_found": 2}),
        hostile.http(200, {**page(ROW), "instances_found": 2}),
    )
    with pytest.raises(Unreadable):
        hostile.provider().instances()


def test_an_empty_cursor_is_the_end(hostile: Any) -> None:
    hostile.answers(hostile.http(200, page(ROW, token="")))
    assert len(hostile.provider().instances()) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"instances": None}),
        (404, {"success": False, "error": "no_such_instance", "msg": "Instance 5 not found."}),
        (404, {"success": False, "error": "not_found"}),
        (404, {"success": False, "msg": "Instance 5 not found."}),
        (200, {"instances": {"id": 5, "label": None}}),
    ],
    ids=str,
)
def test_an_instance_is_gone_when_the_market_says_so(hostile: Any, status: int, body: Any) -> None:
    hostile.answers(hostile.http(status, body))
    assert hostile.provider().instance("5") is None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"success": False, "error": "auth_error"}),
        (404, "<html>404</html>"),
        (404, {}),
        (200, {}),
        (200, {"instances": []}),
        (200, {"instances": {}}),
        (200, {"instances": {**ROW, "id": 6}}),
        (200, {"success": False, "instances": None}),
        (200, ""),
        (500, {"instances": None}),
    ],
    ids=str,
)
def test_an_instance_is_not_gone_because_the_answer_is_odd(
    hostile: Any, status: int, body: Any
) -> None:
    hostile.answers(hostile.http(status, body))
    with pytest.raises((Unreadable, Refused)):
        hostile.provider().instance("5")


def test_offers_are_checked_again_on_our_side(hostile: Any) -> None:
    wrong = [
        {"gpu_ram": 4000},
        {"disk_space": 10},
        {"dph_total": 9.0},
        {"reliability2": 0.2},
        {"inet_down": 1},
        {"verification": "unverified"},
        {"cuda_max_good": 11.0},
        {"rentable": False},
        {"rented": True},
        {"num_gpus": 8},
        {"dph_total": None},
        {"dph_total": math.nan},
        {"machine_id": None},
        {"id": "../77"},
    ]
    rows = [{**OFFER_ROW, "id": 100 + index, **odd} for index, odd in enumerate(wrong)]
    hostile.answers(hostile.http(200, {"offers": [*rows, None, 5, OFFER_ROW, OFFER_ROW]}))
    (offer,) = hostile.provider().offers(GpuNeeds())
    assert hostile.provider().offers(GpuNeeds(min_vram_gb=80)) == []
    assert (offer.id, offer.price, offer.download_price) == ("77", 340_000, 2000)
    assert offer.storage_price == round(0.15 * 40 / 730 * 1_000_000)


def test_offers_none_of_which_can_be_read_are_unreadable(hostile: Any) -> None:
    hostile.answers(hostile.http(200, {"offers": [None, {"odd": 1}]}))
    with pytest.raises(Unreadable):
        hostile.provider().offers(GpuNeeds())


def test_the_search_is_a_dict_of_every_need(hostile: Any) -> None:
    hostile.answers(hostile.http(200, {"offers": []}))
    needs = GpuNeeds(gpu_names=("RTX 4090",), min_vram_gb=20, disk_gb=50, max_price=400_000)
    assert hostile.provider().offers(needs, limit=500) == []
    (request,) = hostile.seen
    assert request.json == {
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
        "verified": {"eq": True},
        "num_gpus": {"eq": 1},
        "gpu_name": {"in": ["RTX 4090"]},
        "gpu_ram": {"gte": 20000},
        "disk_space": {"gte": 50},
        "reliability": {"gte": 0.9},
        "inet_down": {"gte": 100.0},
        "cuda_max_good": {"gte": 12.4},
        "dph_total": {"lte": 0.4},
        "order": [["dph_total", "asc"]],
        "type": "on-demand",
        "limit": 64,
        "allocated_storage": 50,
    }


@pytest.mark.parametrize("credit", [None, "lots", math.nan, True])
def test_credit_that_is_no_number_is_unreadable(hostile: Any, credit: Any) -> None:
    hostile.answers(hostile.http(200, {"id": 1, "credit": credit}))
    with pytest.raises(Unreadable):
        hostile.provider().account()


def test_debts_are_read_as_debts(hostile: Any) -> None:
    hostile.answers(hostile.http(200, {"id": 1, "credit": -2.5}))
    assert hostile.provider().account().credit == -2_500_000


# --- destroying: only the market's word counts -------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"success": True, "msg": "Instance destroyed successfully"}),
        (404, {"success": False, "error": "no_such_instance", "msg": "Instance 5 not found."}),
        (404, {"success": False, "error": "not_found"}),
        (200, {"success": False, "error": "no_such_instance"}),
    ],
    ids=str,
)
def test_destroyed_and_already_gone_are_successes(hostile: Any, status: int, body: Any) -> None:
    hostile.answers(hostile.http(status, body))
    hostile.provider().destroy("5")
    (request,) = hostile.seen
    assert (request.method, request.path, request.json) == ("DELETE", "/api/v0/instances/5/", {})


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, {}, Unknown),
        (200, "", Unknown),
        (200, "<html></html>", Unknown),
        (404, "<html></html>", Unknown),
        (500, {"success": True}, Unknown),
        (500, {"success": False, "error": "no_such_instance"}, Unknown),
        (503, "", Unknown),
        (400, {"success": False, "error": "invalid_args", "msg": "invalid instance_id"}, Refused),
        (404, {"success": False, "error": "auth_error"}, AccountFault),
        (429, "API requests too frequent", Throttled),
        (200, {"success": False, "error": "busy"}, Refused),
    ],
    ids=str,
)
def test_a_destroy_that_was_not_confirmed_raises(
    hostile: Any, status: int, body: Any, kind: type[ProviderError]
) -> None:
    hostile.answers(hostile.http(status, body))
    with pytest.raises(ProviderError) as caught:
        hostile.provider().destroy("5")
    assert type(caught.value) is kind


def test_a_destroy_without_an_answer_is_unknown(hostile: Any) -> None:
    hostile.answers(hostile.dropped, hostile.silence)
    for _ in range(2):
        with pytest.raises(Unknown):
            hostile.provider(timeout=0.3).destroy("5")
    assert len(hostile.seen) == 2


@pytest.mark.parametrize("odd", ["", "5/../6", "abc", "-5", "\u0665", "5?x=1"])
def test_an_id_that_is_none_of_theirs_is_not_sent(hostile: Any, odd: str) -> None:
    for ask in ("destroy", "instance", "logs"):
        with pytest.raises(Refused):
            getattr(hostile.provider(), ask)(odd)
    assert hostile.seen == []


# --- logs ---------------------------------------------------------------------------------------


def test_logs_are_fetched_where_they_were_put_without_our_key(hostile: Any) -> None:
    place = {"success": True, "result_url": f"{hostile.url}/bucket/x.log"}
    hostile.answers(
        hostile.http(200, place), hostile.http(403, "<Error/>"), hostile.http(200, "line 1\nline 2")
    )
    assert hostile.provider().logs("5", tail=2) == "line 1\nline 2"
    request, *fetches = hostile.seen
    assert request.json == {"tail": "2"}
    assert [fetch.method for fetch in fetches] == ["GET", "GET"]
    assert not any("authorization" in fetch.headers for fetch in fetches)


def test_logs_that_never_arrive_are_unreadable(hostile: Any) -> None:
    place = {"success": True, "result_url": f"{hostile.url}/bucket/x.log"}
    hostile.answers(hostile.http(200, place), hostile.http(404, ""))
    with pytest.raises(Unreadable):
        hostile.provider(timeout=1.0).logs("5")


@pytest.mark.parametrize("url", [None, "", "file:///etc/passwd", 5])
def test_logs_without_a_place_are_unreadable(hostile: Any, url: Any) -> None:
    hostile.answers(hostile.http(200, {"success": True, "result_url": url}))
    with pytest.raises(Unreadable):
        hostile.provider().logs("5")


# --- what must not be seen ----------------------------------------------------------------------


def test_no_secret_is_in_any_error_or_log_line(
    hostile: Any,
    spec: LaunchSpec,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    # The second one is where a message is cut, and must not be cut into an unknown word.
    echo = f"bad request with {KEY} and one-use-token".ljust(295) + KEY + "one-use-token"
    replies = [
        hostile.http(400, {"success": False, "error": "invalid_args", "msg": echo}),
        hostile.http(502, echo),
        hostile.http(200, echo),
        hostile.dropped,
    ]
    for reply in replies:
        hostile.answers(reply)
        try:
            hostile.provider().create(OFFER, spec)
        except ProviderError as error:
            shown = "".join(traceback.format_exception(error)) + repr(error)
            shown += repr(error.__context__) + repr(vars(error))
        assert KEY[:5] not in shown
        assert "one-use" not in shown
    everything = caplog.text + "".join(capfd.readouterr()) + repr(hostile.provider())
    assert KEY not in everything
    assert "one-use-token" not in everything
