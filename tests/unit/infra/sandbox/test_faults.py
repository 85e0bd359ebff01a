"""Faults as they are written down, drawn and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infra.sandbox.faults import (
    CALL_KINDS,
    HOST_KINDS,
    PROFILES,
    Fault,
    Faults,
    HostFault,
    any_trouble,
    profile,
    read_faults,
    told,
)
from infra.sandbox.notify import WORDS


def test_faults_are_read_from_json() -> None:
    entries = [
        {"op": "create", "kind": "drop", "after": True},
        {"op": "destroy", "machine": 30137, "kind": "lingers", "seconds": 20, "nth": 2, "times": 0},
        {"kind": "outbid", "machine": 30137, "at": "running", "after_s": [60, 600], "seconds": 30},
    ]
    assert read_faults(json.dumps(entries)) == [
        Fault(op="create", kind="drop", after=True),
        Fault(op="destroy", machine=30137, kind="lingers", seconds=20, nth=2, times=0),
        HostFault(kind="outbid", machine=30137, at="running", after_s=(60, 600), seconds=30),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "JSON"),
        ("{}", "list"),
        ("[5]", "entry 1 is no object"),
        ('[{"op": "create", "kind": "drop"}, {"op": "create"}]', "entry 2: kind None"),
        ('[{"op": "create", "kind": "explode"}]', "entry 1: kind 'explode' is none of drop"),
        ('[{"kind": "drop"}]', "needs op"),
        ('[{"op": "x", "kind": "drop"}]', "op of 'drop' must be one of"),
        ('[{"op": "list", "kind": "no_such_ask"}]', "op of 'no_such_ask' must be one of create"),
        ('[{"op": "list", "kind": "drop", "seconds": 5}]', "'drop' has no seconds"),
        ('[{"op": "list", "kind": "drop", "after": 1}]', "after cannot be 1"),
        ('[{"op": "list", "kind": "drop", "nth": 0}]', "nth counts from 1"),
        ('[{"op": "list", "kind": "drop", "chance": 1.5}]', "chance"),
        ('[{"op": "list", "kind": "status", "status": 200}]', "status of 'status' cannot be 200"),
        ('[{"op": "list", "kind": "throttle", "shape": "xml"}]', "shape"),
        ('[{"kind": "outbid", "op": "create"}]', "'outbid' has no op"),
        ('[{"kind": "outbid", "at": "noon"}]', "at must be one of"),
        ('[{"kind": "outbid", "after_s": [9, 1]}]', "after_s"),
        ('[{"kind": "outbid", "at": "printed"}]', "text"),
        ('[{"kind": "no_key", "after_s": 5}]', "'no_key' has no after_s"),
        ('[{"kind": "offline", "status": "asleep"}]', "status must be"),
        ('[{"kind": "slow_boot"}]', "needs seconds"),
        ('[{"kind": "lie", "vram_mib": "many"}]', "vram_mib cannot be 'many'"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_faults(text)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_can_be_written_down_and_read_again(name: str) -> None:
    plan = profile(name)
    assert read_faults(json.dumps([told(fault) for fault in plan])) == plan


def test_hell_has_every_kind_of_trouble_but_those_that_end_the_account() -> None:
    kinds = {fault.kind for fault in profile("hell")}
    left_out = {"answer", "delay", "auth", "insufficient_credit", "spend_rate_limit", "credit"}
    assert kinds >= (CALL_KINDS.keys() | HOST_KINDS.keys()) - left_out


def test_the_same_seed_gives_the_same_faults_however_calls_interleave() -> None:
    def play(seed: int, order: list[str]) -> list[tuple[str, int, str | None]]:
        faults, counts, struck = Faults(profile("hell"), seed=seed), {"list": 0, "show": 0}, []
        for op in order:
            counts[op] += 1
            fault = faults.due(op, None)
            struck.append((op, counts[op], fault and fault.kind))
        return sorted(struck, key=str)

    turns, blocks = ["list", "show"] * 200, ["list"] * 200 + ["show"] * 200
    struck = play(7, turns)
    assert struck == play(7, blocks)
    assert {kind for _, _, kind in struck} > {None, "drop", "stale_page"}
    assert play(8, turns) != struck


def test_rentals_draw_the_same_faults_from_the_same_seed() -> None:
    def rentals(seed: int) -> list[list[HostFault]]:
        faults = Faults(profile("market"), seed=seed)
        return [faults.rented(machine) for machine in (1, 2, 3) for _ in range(30)]

    assert rentals(3) == rentals(3) != rentals(4)
    assert any(rentals(3))


def test_a_fault_counts_the_calls_that_it_means() -> None:
    faults = Faults([Fault(op="destroy", kind="drop", machine=5, nth=2, times=2)])
    calls = [("destroy", 5), ("destroy", 6), ("show", 5), *[("destroy", 5)] * 4]
    assert [bool(faults.due(*call)) for call in calls] == [0, 0, 0, 1, 1, 0, 0]


def test_a_fault_added_later_counts_from_then() -> None:
    faults = Faults()
    for _ in range(3):
        assert faults.due("list", None) is None
    faults.add(Fault(op="list", kind="empty", times=0))
    assert all(faults.due("list", None) for _ in range(5))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_usual_troubles_come_as_often_as_told(rate: float) -> None:
    faults = Faults(any_trouble(rate), seed=1)
    struck = sum(faults.due("list", None) is not None for _ in range(2000)) / 2000
    assert struck == pytest.approx(rate, abs=0.04)


def test_every_kind_can_be_made() -> None:
    needed: dict[str, dict[str, Any]] = {"slow_boot": {"seconds": 1}, "clock_skew": {"seconds": 1}}
    for kind, (ops, _) in CALL_KINDS.items():
        assert Fault(op=min(ops - {"*"}), kind=kind)
    for kind in HOST_KINDS:
        assert HostFault(kind=kind, **needed.get(kind, {}))


def test_the_docs_tell_of_every_kind_and_their_examples_can_be_read() -> None:
    page = (Path(__file__).parents[4] / "docs" / "sandbox.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    calls, hosts = map(read_faults, examples)
    assert {fault.kind for fault in calls} <= CALL_KINDS.keys()
    assert {fault.kind for fault in hosts} == HOST_KINDS.keys()
    for kind in CALL_KINDS.keys() | HOST_KINDS.keys():
        assert f"`{kind}`" in page


def test_the_docs_tell_of_every_notification() -> None:
    page = (Path(__file__).parents[4] / "docs" / "sandbox.md").read_text()
    for event in WORDS:
        assert f"`{event}`" in page
