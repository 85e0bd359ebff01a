"""What an operator is told of money and machines, in a terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.api.instances import Instance, Instances, LastSweep, Stranger
from orchestrator.api.offers import MarketOffer, Offers
from orchestrator.api.spend import Spend, SpendRow
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit
from state.spending import GroupBy, Split

NOW = datetime(2026, 11, 3, tzinfo=UTC)


def said(document):
    """What the server answers with."""
    return 200, json.loads(document.model_dump_json())


def words(line):
    """A line whose columns are one space apart."""
    return " ".join(line.split())


def spend(*rows, left_out=0):
    splits = dict(rows)
    return Spend(
        group_by=GroupBy.HOST,
        since=NOW - timedelta(days=30),
        until=NOW,
        data=[SpendRow.of(key, split) for key, split in rows],
        left_out=left_out,
        total=SpendRow.of("", sum(splits.values(), Split())),
    )


def test_cost_is_a_line_for_each_group_a_total_and_a_bar(stoker, api):
    dear = Split(2, 1, training=1_500_000, boot=250_000, failed=250_000)
    api.answers["GET /v1/spend"] = said(spend(("m1", dear), ("", Split(1, 0, other=100_000))))
    title, first, second, total = stoker("cost", "--by", "host").out.splitlines()
    assert words(title) == "HOST MACHINES DONE TRAINING BOOT FAILED ORPHAN OTHER TOTAL PER JOB"
    assert words(first).startswith("m1 2 1 $1.50 $0.2500 $0.2500 $0.0000 $0.0000 $2.00 $2.00 █")
    assert words(second).startswith(
        "unknown 1 0 $0.0000 $0.0000 $0.0000 $0.0000 $0.1000 $0.1000 - █"
    )
    assert first.count("█") > second.count("█") > 0
    assert words(total) == "total 3 1 $1.50 $0.2500 $0.2500 $0.0000 $0.1000 $2.10 $2.10"


def test_a_day_on_which_only_an_orphan_cost_is_a_line(stoker, api):
    api.answers["GET /v1/spend"] = said(spend(("2026-11-02", Split(orphan=360_000))))
    _, line, _ = stoker("cost").out.splitlines()
    assert words(line).startswith(
        "2026-11-02 0 0 $0.0000 $0.0000 $0.0000 $0.3600 $0.0000 $0.3600 -"
    )


def test_cost_asks_for_the_span_that_was_typed(stoker, api):
    api.answers["GET /v1/spend"] = said(spend(("m1", Split(1, training=1)), left_out=3))
    ended = stoker("cost", "--since", "2026-11-01", "--until", "12h", "--limit", "1")
    assert "since=2026-11-01" in api.asked[-1]
    assert "group_by=day" in api.asked[-1]
    assert "until=20" in api.asked[-1]
    assert "3 more" in ended.err
    wrong = stoker("cost", "--since", "monday")
    assert wrong.code == Exit.USAGE
    assert "monday" in wrong.err


def test_nothing_spent_is_said_in_words(stoker, api):
    api.answers["GET /v1/spend"] = said(spend(("2026-11-02", Split())))
    ended = stoker("cost")
    assert (ended.code, ended.out) == (Exit.OK, "")
    assert "no machine was rented" in ended.err


def test_costs_for_programs_are_the_servers_document(stoker, api):
    status, document = said(spend(("m1", Split(1, training=1))))
    api.answers["GET /v1/spend"] = (status, document)
    assert json.loads(stoker("cost", "--json").out) == document


def test_offers_are_lines_in_the_order_in_which_a_job_would_take_them(stoker, api):
    machine = {
        "geo": "NO",
        "vram_gb": 24,
        "price_per_hour": 400_000,
        "by_bid": False,
        "download_mbps": 900,
        "reliability": 0.99,
    }
    times = {"boot_s": 120, "download_s": 60, "training_s": 1020}
    fit = MarketOffer(
        id="7", machine_id="m7", gpu="RTX 4090", verdict="fit", why="", chance=0.97,
        expected_cost=140_000, display="$0.1400", **machine, **times,
    )  # fmt: skip
    bad = MarketOffer(
        id="8", machine_id="m8", gpu="RTX 3090", verdict="refused", why="blocked", **machine
    )
    api.answers["GET /v1/offers"] = said(
        Offers(data=[fit, bad], fit=1, refused={"blocked": 1}, sentence="m7 is best", read_at=NOW)
    )
    ended = stoker("offers", "--gpu", "RTX 4090", "--min-vram", "20", "--max-price", "0.5")
    _, first, second = ended.out.splitlines()
    assert words(first) == "7 m7 RTX 4090 24 NO 0.400 97% $0.1400 20 min"
    assert second.endswith("refused: blocked")
    assert "m7 is best" in ended.err
    asked = api.asked[-1]
    assert "gpu=RTX+4090" in asked
    assert "min_vram_gb=20.0" in asked
    assert "max_price=500000" in asked


def instances(sweep_changes=None, **changes):
    machine = Instance(
        lease="ls_1", instance_id="77", machine_id="m1", gpu="RTX 4090", geo="NO", job="job_1",
        attempt=1, owner="alice", status="rented", verdict="kept",
        why="its job is running on it: training", note="", hedge=False, interruptible=False,
        created_at=NOW, expires_at=NOW, age_s=3700, price_per_hour=400_000, cost=411_000,
        display="$0.4110",
    )  # fmt: skip
    orphan = Stranger(
        instance="78", label="stoker/job_0/1-a", machine="m2", age_s=65, price=300_000,
        verdict="suspect", why="no open lease is for it",
    )  # fmt: skip
    sweep = LastSweep(
        at=NOW, age_s=12, stale=False, seen=3, ours=2, foreign=1, doubtful=False, error="",
        strangers=[orphan],
    )  # fmt: skip
    document = Instances(
        data=[machine], burn_per_hour=400_000, cost=411_000, rehearsed=0,
        sweep=sweep.model_copy(update=sweep_changes or {}),
    )  # fmt: skip
    return said(document.model_copy(update=changes))


def test_instances_are_machines_with_why_they_are_kept_and_orphans(stoker, api):
    api.answers["GET /v1/instances"] = instances()
    ended = stoker("instances")
    _, machine, orphan = ended.out.splitlines()
    kept = "kept its job is running on it: training"
    assert words(machine) == f"77 m1 RTX 4090 job_1 1 h 0.400 $0.4110 {kept}"
    assert "suspect" in orphan
    assert "no open lease" in orphan
    assert "12 s ago, saw 3 instances, 2 of them ours" in ended.err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"at": None, "age_s": None, "stale": True}, "no sweep"),
        ({"stale": True, "age_s": 900}, "running unseen"),
        ({"error": "HTML"}, "could not be read: HTML"),
        ({"doubtful": True}, "not believed"),
    ],
)
def test_a_sweep_that_is_not_to_be_relied_on_is_said_to_be_so(stoker, api, changes, told):
    api.answers["GET /v1/instances"] = instances({**changes, "strangers": []}, data=[])
    ended = stoker("instances")
    assert "no machine is rented" in ended.err
    assert told in ended.err


@pytest.mark.parametrize("command", ["cost", "offers", "instances"])
def test_an_answer_of_another_program_is_no_traceback(stoker, api, command):
    api.answers = {f"GET /v1/{path}": (200, {}) for path in ("spend", "offers", "instances")}
    ended = stoker(command)
    assert ended.code == Exit.FAILED
    assert "does not speak" in ended.err
    api.answers = {f"GET /v1/{path}": (403, {}) for path in ("spend", "offers", "instances")}
    assert stoker(command).code == Exit.AUTH


def test_a_key_that_asked_too_often_waits_as_long_as_it_is_told(api, capsys):
    waits = []
    client = Client(api.url, "key", sleep=waits.append)
    too_many = (429, {"detail": "too many", "code": "rate_limited"}, {"Retry-After": "7"})
    api.answers["GET /v1/spend"] = [too_many, too_many, (200, {"data": []})]
    assert client.get("/v1/spend") == {"data": []}
    assert waits == [7, 7]
    assert "going on in 7 s" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["soon", "-1", "", "9" * 5000])
def test_a_key_that_is_never_let_in_again_ends_with_the_servers_words(api, told):
    waits = []
    client = Client(api.url, "key", sleep=waits.append)
    refusal = {"detail": "this key may make 1 reads per minute", "code": "rate_limited"}
    api.answers["GET /v1/spend"] = (429, refusal, {"Retry-After": told})
    with pytest.raises(CliError, match="1 reads per minute"):
        client.get("/v1/spend")
    assert len(waits) <= 5
    assert all(wait <= 60 for wait in waits)
