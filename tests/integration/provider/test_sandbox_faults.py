"""Rehearsals: what goes wrong on the way to the market, and in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from infra.provider import LaunchSpec
from infra.sandbox.faults import Fault, read_faults
from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state.errors import ProviderError, Throttled, Unknown, Unreadable
from state.job import GpuNeeds

KEY = "sandbox-account-key"


@contextlib.contextmanager
def market(**options: Any) -> Iterator[tuple[Sandbox, VastProvider]]:
    with running_sandbox(account_key=KEY, **({"boot_s": 1e9} | options)) as sandbox:
        yield sandbox, VastProvider(KEY, sandbox.url, spacing=0, timeout=2)


def rent(vast: VastProvider, spec: LaunchSpec) -> str:
    (offer, *_) = vast.offers(GpuNeeds())
    return vast.create(offer, spec)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(op="create", kind="drop", after=True),
        Fault(op="create", kind="status", status=504, after=True),
        Fault(op="create", kind="html", after=True),
        Fault(op="create", kind="truncate"),
        Fault(op="create", kind="delay", seconds=2.5),
        Fault(op="create", kind="answer", status=200, body={"success": True}, after=True),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_lost_answer_to_create_is_unknown_and_the_label_finds_it(
    spec: LaunchSpec, fault: Fault
) -> None:
    with market(faults=[fault]) as (sandbox, vast):
        with pytest.raises(Unknown):
            rent(vast, spec)
        assert [item.label for item in vast.instances()] == [spec.label]
        assert len(sandbox.market.contracts) == 1


def test_a_request_lost_on_the_way_rents_nothing(spec: LaunchSpec) -> None:
    with market(faults=[Fault(op="create", kind="drop")]) as (_, vast):
        with pytest.raises(Unknown):
            rent(vast, spec)
        assert vast.instances() == []
        assert rent(vast, spec)


def test_a_lost_answer_to_destroy_is_mended_by_asking_again(spec: LaunchSpec) -> None:
    with market(faults=[Fault(op="destroy", kind="drop", after=True)]) as (_, vast):
        number = rent(vast, spec)
        with pytest.raises(Unknown):
            vast.destroy(number)
        vast.destroy(number)
        assert vast.instances() == []


def test_the_nth_call_fails_and_only_that(spec: LaunchSpec) -> None:
    with market(faults=[Fault(op="list", kind="status", nth=2, times=2)]) as (_, vast):
        outcomes = []
        for _ in range(5):
            try:
                outcomes.append(len(vast.instances()))
            except Unreadable:
                outcomes.append(None)
        assert outcomes == [0, None, None, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_a_list_is_whole_or_an_error(spec: LaunchSpec, seed: int) -> None:
    with market(fault_rate=0.4, seed=seed) as (sandbox, vast):
        whole = 0
        for _ in range(60):
            # In the end all offers are taken, and there is none to unpack.
            with contextlib.suppress(ProviderError, ValueError):
                rent(vast, spec)
            try:
                listed = {int(item.id) for item in vast.instances()}
            except ProviderError:
                continue
            whole += 1
            assert listed == set(sandbox.market.contracts)
        assert whole > 10


def test_calls_too_fast_are_throttled_in_all_shapes(spec: LaunchSpec) -> None:
    with market(rate_limits=True) as (_, vast):
        vast.instances()
        for _ in range(3):
            with pytest.raises(Throttled) as caught:
                vast.instances()
            assert caught.value.retry_after == 1.0


def test_calls_at_the_documented_distance_are_never_throttled() -> None:
    now = [1_800_000_000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def clock() -> float:
        return now[0]

    with running_sandbox(account_key=KEY, rate_limits=True, clock=clock) as sandbox:
        vast = VastProvider(KEY, sandbox.url, clock=clock, sleep=sleep)
        for _ in range(5):
            vast.instances()
            vast.account()
            vast.offers(GpuNeeds())
            vast.destroy("5")


def test_a_contract_that_the_host_cannot_start_has_ended(spec: LaunchSpec) -> None:
    with market() as (sandbox, vast):
        number = rent(vast, spec)
        sandbox.market.abandon(int(number))
        shown = vast.instance(number)
        assert shown is not None
        assert shown.phase == "ended"
        assert "OCI runtime create failed" in shown.message


def test_a_pull_that_does_not_move_stays_starting(spec: LaunchSpec) -> None:
    with market() as (sandbox, vast):
        number = rent(vast, spec)
        sandbox.market.stick(int(number))
        sandbox.market.tick()
        shown = vast.instance(number)
        assert shown is not None
        assert (shown.phase, shown.message) == ("starting", "Retrying in 5 seconds")


def test_a_host_off_line_is_lost_and_comes_back(spec: LaunchSpec) -> None:
    with market(boot_s=0) as (sandbox, vast):
        number = int(rent(vast, spec))
        sandbox.market.tick()
        phases = []
        for change in (sandbox.market.lose, sandbox.market.regain, sandbox.market.outbid):
            change(number)
            phases.append(vast.instances()[0].phase)
        assert phases == ["lost", "running", "ended"]
        answer = vast._client.put(f"/instances/{number}/", json_data={"state": "running"})
        assert (answer.status, answer.code) == (200, "resources_unavailable")


def test_a_new_contract_may_be_unseen_for_a_while(spec: LaunchSpec) -> None:
    with market() as (sandbox, vast):
        sandbox.market.read_lag_s = 1e9
        number = rent(vast, spec)
        assert vast.instances() == []
        assert vast.instance(number) is None
        sandbox.market.read_lag_s = 0
        assert [item.id for item in vast.instances()] == [number]


def test_faults_are_read_from_json() -> None:
    assert read_faults('[{"op": "create", "kind": "drop", "after": true}]') == [
        Fault(op="create", kind="drop", after=True)
    ]
    for odd in ("{}", "[5]", '[{"op": "x", "kind": "drop"}]', '[{"op": "create"}]', "nonsense"):
        with pytest.raises(ValueError, match=r"\w"):
            read_faults(odd)
