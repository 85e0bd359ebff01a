"""The real `vastai` SDK and the real `vastai` command line, used as their owners meant it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from vastai import VastAI

KEY = "sandbox-account-key"


@pytest.fixture
def sdk(sandbox: Any) -> VastAI:
    # A trailing slash is not stripped by the SDK: its requests go to `//api/...`.
    return VastAI(api_key=KEY, server_url=sandbox.url + "/")


@pytest.fixture
def cli(sandbox: Any, tmp_path: Path) -> Any:
    """Runs the command line in a home of its own; what it printed, read where it is JSON."""
    program = Path(sys.executable).parent / "vastai"

    def run(*words: str) -> Any:
        env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "VAST_API_KEY": KEY}
        argv = [str(program), *words, "--raw", "--url", sandbox.url]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
        assert not done.stderr, done.stderr
        return json.loads(done.stdout) if done.stdout[:1] in ("[", "{") else done.stdout

    return run


def until(sandbox: Any, number: int, status: str) -> None:
    """Wait until an instance is in `status`."""
    contract = sandbox.market.need(number)
    wait_for(lambda: contract.actual == status)


def wait_for(look: Callable[[], bool]) -> None:
    for _ in range(1000):
        if look():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def until_printed(sandbox: Any, number: int, words: str) -> None:
    wait_for(lambda: words in sandbox.market.machines.log(str(number)))


def test_the_sdk_lives_a_whole_rental(sdk: VastAI, sandbox: Any) -> None:
    offers = sdk.search_offers()
    assert [offer["score"] for offer in offers] == sorted(
        (offer["score"] for offer in offers), reverse=True
    )
    made = sdk.create_instance(
        offers[0]["id"],
        image="ghcr.io/x/y:1",
        disk=80,
        env={"A": "1", "-p 8000:8000": "1"},
        label="job-1",
        onstart_cmd="echo A=$A; sleep 600",
        login="-u u -p p ghcr.io",
        ssh=True,
        direct=True,
        cancel_unavail=True,
    )
    number = made["new_contract"]
    assert made["success"] is True
    assert made["instance_api_key"]
    until_printed(sandbox, number, "A=1")
    (shown,) = sdk.show_instances()
    assert shown["extra_env"] == {"A": "1", "-p 8000:8000": "1"}
    assert sdk.show_instance(number)["label"] == "job-1"
    assert sdk.label_instance(number, "job-2")["success"]
    listed = sdk.show_instances_v1({"select_filters": {"label": {"eq": "job-2"}}, "limit": 25})
    assert (listed["instances_found"], listed["label_counts"]) == (1, {"job-2": 1})
    assert "A=1" in sdk.logs(number, tail="100")
    assert "success, running" in sdk.logs(number, daemon_logs=True)
    assert sdk.show_user()["credit"] < 100
    assert sdk.stop_instance(number)["success"]
    until(sandbox, number, "exited")
    assert sdk.start_instance(number)["success"]
    until(sandbox, number, "running")
    assert sdk.destroy_instance(number)["success"]
    assert sdk.show_instance(number) is None
    assert sdk.show_instances() == []


def test_the_sdk_looks_into_a_machine_and_keeps_keys_and_secrets(sdk: VastAI, sandbox: Any) -> None:
    post = sdk.client.post
    assert post("/ssh/", json_data={"ssh_key": "ssh-ed25519 A"}).json()["key"]["id"] == 1
    assert [key["public_key"] for key in sdk.show_ssh_keys()] == ["ssh-ed25519 A"]
    assert post("/secrets/", json_data={"key": "HF", "value": "x"}).json()["success"]
    (offer,) = sdk.search_offers(limit=1)
    made = sdk.create_instance(
        offer["id"], image="x", disk=16, onstart_cmd="touch seen; echo HF=$HF", ssh=True
    )
    number = made["new_contract"]
    until_printed(sandbox, number, "HF=x")
    assert sdk.attach_ssh(number, "ssh-ed25519 A")["success"]
    assert "seen" in sdk.execute(number, "ls -l /")
    sdk.execute(number, "rm /seen")
    assert "seen" not in sdk.execute(number, "ls")
    outside = ask(
        sandbox, "PUT", f"/api/v0/instances/command/{number}/", body={"command": "ls ../.."}
    )
    refused = ask(sandbox, "PUT", f"/api/v0/instances/command/{number}/", body={"command": "id"})
    assert (outside[0], refused[0]) == (400, 400)


def test_a_reboot_keeps_the_disk_and_a_recycle_pulls_again(sdk: VastAI, sandbox: Any) -> None:
    (offer,) = sdk.search_offers(query={"inet_down_cost": {"gt": 0}}, limit=1)
    script = "date +%N >> starts; echo start $(wc -l < starts); sleep 600"
    made = sdk.create_instance(offer["id"], image="x", disk=16, onstart_cmd=script, ssh=True)
    number = made["new_contract"]
    until_printed(sandbox, number, "start 1")
    pulled = sandbox.market.need(number).charges["bwd"]
    assert sdk.reboot_instance(number)["success"]
    until_printed(sandbox, number, "start 2")
    assert sandbox.market.need(number).charges["bwd"] == pulled > 0
    assert sdk.recycle_instance(number)["success"]
    until_printed(sandbox, number, "start 3")
    assert sandbox.market.need(number).charges["bwd"] == pytest.approx(2 * pulled)


def test_charges_come_with_their_label(sdk: VastAI, sandbox: Any) -> None:
    (offer,) = sdk.search_offers(limit=1)
    sdk.create_instance(offer["id"], image="x", disk=16, label="job-1")
    sandbox.market.tick()
    query = {"select_filters": {"type": {"in": ["instance"]}}, "limit": 5}
    answer = sdk.client.get("/charges/", query).json()
    (row,) = answer["results"]
    assert (answer["total"], row["metadata"], row["type"]) == (1, {"label": "job-1"}, "instance")
    assert sum(item["amount"] for item in row["items"]) == pytest.approx(row["amount"])


def test_the_sdks_string_query_sends_numbers_as_text(sdk: VastAI) -> None:
    offers = sdk.search_offers(
        query="gpu_name=RTX_4090 num_gpus=1 reliability>0.98 gpu_ram>=24 inet_down>=500 "
        "disk_space>=100 cuda_max_good>=12.4 direct_port_count>=1 dph_total<=0.6 "
        "geolocation in [US,SE]",
        order="dph_total",
        limit=50,
        storage=100,
    )
    assert len(offers) == 2
    assert offers[0]["dph_total"] < offers[1]["dph_total"]
    assert {offer["geolocation"][-2:] for offer in offers} == {"US", "SE"}


def test_the_sdks_new_search_finds_the_same(sdk: VastAI) -> None:
    old = sdk.search_offers(query={"gpu_name": {"eq": "RTX 4090"}})
    new = sdk.search_offers_new(query={"gpu_name": {"eq": "RTX 4090"}})
    assert {offer["id"] for offer in old} == {offer["id"] for offer in new} != set()


def test_bids_are_cheaper_and_can_be_changed(sdk: VastAI) -> None:
    (offer,) = sdk.search_offers(query={"gpu_name": {"eq": "H100 SXM"}}, type="bid")
    made = sdk.create_instance(offer["id"], image="x", disk=16, price=offer["min_bid"])
    assert sdk.show_instance(made["new_contract"])["is_bid"] is True
    assert sdk.change_bid(made["new_contract"], price=offer["min_bid"] * 1.5)["success"]
    dearer = sdk.show_instance(made["new_contract"])["dph_base"]
    assert dearer == pytest.approx(offer["min_bid"] * 1.5)


def test_several_are_started_stopped_and_destroyed_at_once(sdk: VastAI, sandbox: Any) -> None:
    numbers = [
        sdk.create_instance(offer["id"], image="x", disk=16)["new_contract"]
        for offer in sdk.search_offers(limit=2)
    ]
    assert sdk.client.put("/instances/", json_data={"state": "stopped", "ids": numbers}).json()
    assert {sandbox.market.need(number).intended for number in numbers} == {"stopped"}
    assert sdk.client.delete("/instances/", json_data={"instance_ids": numbers}).json()["success"]
    assert sdk.show_instances() == []


def test_more_instances_than_a_page_are_listed_by_the_sdk(sdk: VastAI, sandbox: Any) -> None:
    sandbox.market.boot_s = 1e9
    page = sdk.show_instances_v1({"limit": 25})
    assert page["next_token"] is None
    numbers = [
        sdk.create_instance(offer["id"], image="x", disk=16)["new_contract"]
        for offer in sdk.search_offers(query={"verified": {}})
    ]
    pages = [sdk.show_instances_v1({"limit": 4})]
    while token := pages[-1]["next_token"]:
        pages.append(sdk.show_instances_v1({"limit": 4, "after_token": token}))
    assert len(pages) == -(-len(numbers) // 4)
    assert [row["id"] for page in pages for row in page["instances"]] == numbers


@pytest.mark.slow
def test_the_command_line_lives_a_whole_rental(cli: Any, sandbox: Any) -> None:
    offers = cli("search", "offers", "gpu_name=RTX_4090 num_gpus=1", "-o", "dph_total")
    assert offers
    ask = str(offers[0]["id"])
    made = cli(
        *("create", "instance", ask, "--image", "pytorch/pytorch", "--disk", "20"),
        *("--env", "-e A=1 -p 8000:8000", "--label", "job-1"),
        *("--onstart-cmd", "echo A=$A; sleep 600"),
    )
    number = made["new_contract"]
    until_printed(sandbox, number, "A=1")
    assert [row["label"] for row in cli("show", "instances")] == ["job-1"]
    assert cli("show", "instance", str(number))["actual_status"] == "running"
    cli("label", "instance", str(number), "job-2")
    assert sandbox.market.need(number).label == "job-2"
    assert "A=1" in cli("logs", str(number))
    cli("stop", "instance", str(number))
    until(sandbox, number, "exited")
    cli("start", "instance", str(number))
    until(sandbox, number, "running")
    assert cli("show", "user")["credit"] < 100
    cli("destroy", "instance", str(number), "-y")
    assert cli("show", "instances") == []


# --- refusals, as they look on the wire ---------------------------------------------------------


def ask(sandbox: Any, method: str, path: str, key: str = KEY, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    url = sandbox.url + path
    answer = requests.request(method, url, headers=headers, json=body, timeout=10)
    return answer.status_code, answer.json()


def test_a_wrong_key_is_told_so(sandbox: Any) -> None:
    for path in ("/api/v1/instances/", "/api/v0/users/current", "/api/v0/users/current/"):
        status, body = ask(sandbox, "GET", path, key="wrong")
        assert (status, body["error"]) == (401, "auth_error")


def test_the_old_list_is_dead(sandbox: Any) -> None:
    status, body = ask(sandbox, "GET", "/api/v0/instances/")
    assert (status, body["error"], body["success"]) == (410, "deprecated_endpoint", False)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ('select_filters={"dph_total":{"lte":1}}', "invalid_request"),
        ('order_by=[{"col":"num_gpus","dir":"asc"}]', "invalid_request"),
        ("select_filters=nonsense", "invalid_request"),
        ("after_token=nonsense", "invalid_token"),
    ],
)
def test_lists_are_particular_about_their_query(sandbox: Any, query: str, error: str) -> None:
    status, body = ask(sandbox, "GET", f"/api/v1/instances/?{query}")
    assert (status, body["error"]) == (400, error)


def test_an_instances_key_is_for_itself_alone(sandbox: Any, sdk: VastAI) -> None:
    first, second = (
        sdk.create_instance(offer["id"], image="x", disk=16) for offer in sdk.search_offers(limit=2)
    )
    key = first["instance_api_key"]
    own = f"/api/v0/instances/{first['new_contract']}/"
    other = f"/api/v0/instances/{second['new_contract']}/"
    assert ask(sandbox, "GET", own, key)[0] == 200
    assert ask(sandbox, "GET", other, key)[0] == 403
    assert ask(sandbox, "DELETE", other, key)[0] == 403
    assert ask(sandbox, "GET", "/api/v1/instances/", key)[0] == 403
    assert ask(sandbox, "PUT", "/api/v0/asks/1/", key, {})[0] == 403
    assert ask(sandbox, "PUT", own, key, {"state": "stopped"})[0] == 200
    assert ask(sandbox, "DELETE", own, key, {})[0] == 200
    assert ask(sandbox, "GET", own)[1] == {"instances": None}
    assert ask(sandbox, "GET", own, key)[0] == 401


@pytest.mark.parametrize(
    "odd",
    [
        {"onstart": "x" * 4049},
        {"label": "x" * 257},
        {"disk": 4},
        {"disk": 1e9},
        {"image": None},
        {"price": 1000},
        {"env": {"A": "x" * 40000}},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_a_create_that_vast_would_refuse_is_refused(
    sandbox: Any, sdk: VastAI, odd: dict[str, Any]
) -> None:
    (offer,) = sdk.search_offers(limit=1)
    body = {"image": "x", "disk": 16, **odd}
    status, answer = ask(sandbox, "PUT", f"/api/v0/asks/{offer['id']}/", body=body)
    assert (status, answer["success"]) == (400, False)
    assert sdk.show_instances() == []


def test_a_bid_below_the_least_is_refused_and_yet_a_contract_exists(
    sandbox: Any, sdk: VastAI
) -> None:
    (offer,) = sdk.search_offers(limit=1)
    body = {"image": "x", "disk": 16, "price": 0.001}
    status, answer = ask(sandbox, "PUT", f"/api/v0/asks/{offer['id']}/", body=body)
    assert (status, answer["success"]) == (400, False)
    shown = sdk.show_instance(answer["new_contract"])
    assert (shown["actual_status"], shown["intended_status"]) == ("created", "stopped")


def test_unknown_instances_are_404(sandbox: Any) -> None:
    calls = [
        ("DELETE", "/api/v0/instances/5/", {}),
        ("PUT", "/api/v0/instances/5/", {"state": "stopped"}),
        ("PUT", "/api/v0/instances/bid_price/5/", {"price": 1.0}),
        ("PUT", "/api/v0/instances/request_logs/5/", {}),
    ]
    for method, path, body in calls:
        status, answer = ask(sandbox, method, path, body=body)
        assert (status, answer["success"]) == (404, False)


def test_a_body_that_is_no_json_is_400(sandbox: Any) -> None:
    url = sandbox.url + "/api/v0/bundles/"
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.post(url, data=b"{nonsense", headers=headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
