"""`stoker hosts`: what an operator sees of machines, and does about them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from orchestrator.cli.console import Exit


def host(machine, **changes):
    return {
        "machine_id": machine,
        "gpu": "RTX 4090",
        "geo": "Ohio, US",
        "good": 3.0,
        "bad": 0.5,
        "lies": 0,
        "boot_s": 84.2,
        "download_mbps": 612.0,
        "steps_per_s": 6.514,
        "last_seen_at": None,
        "last_failed_at": None,
        "last_reason": "",
        "blocked": False,
        "blocked_why": "",
        "shunned": None,
        **changes,
    }


def test_machines_are_lines_in_the_servers_order(stoker, api):
    failed_at = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    page = [
        host("77", blocked=True, blocked_why="throttles", shunned="blocked by an operator"),
        host("78", lies=1, shunned="not what it was offered as"),
        host(
            "79",
            boot_s=None,
            download_mbps=None,
            steps_per_s=None,
            last_failed_at=failed_at,
            last_reason="training.frozen: no step for 50 s at step 4/9",
            shunned="failed a job lately",
        ),
        host("80"),
    ]
    api.answers["GET /v1/hosts"] = (200, {"data": page, "total": 4})
    title, *lines = stoker("hosts", "ls").out.splitlines()
    assert title.split()[:4] == ["MACHINE", "GPU", "PLACE", "GOOD/BAD"]
    assert [line.split()[0] for line in lines] == ["77", "78", "79", "80"]
    assert "BLOCKED (throttles)" in lines[0]
    assert "LIED" in lines[1]
    assert "3 h ago: training.frozen: no step for 50 s at step 4/9" in lines[2]
    assert " ".join(lines[3].split()) == "80 RTX 4090 Ohio, US 3.0/0.5 84 s 612 6.51 ok -"


def test_hosts_for_programs_are_one_document(stoker, api):
    api.answers["GET /v1/hosts"] = (200, {"data": [host("80")], "total": 1})
    assert json.loads(stoker("hosts", "ls", "--json").out) == [host("80")]
    api.answers["GET /v1/hosts/80"] = (200, host("80"))
    assert json.loads(stoker("hosts", "show", "80", "--json").out) == host("80")


def test_blocking_says_why_and_unblocking_needs_no_reason(stoker, api):
    api.answers["POST /v1/hosts/80/block"] = (200, host("80", blocked=True, blocked_why="hot"))
    api.answers["POST /v1/hosts/80/unblock"] = (200, host("80"))
    assert stoker("hosts", "block", "80").code == Exit.USAGE
    ran = stoker("hosts", "block", "80", "--reason", "hot")
    assert json.loads(api.bodies[-1]) == {"reason": "hot"}
    assert "BLOCKED (hot)" in ran.out
    assert "ok" in stoker("hosts", "unblock", "80").out


def test_a_machine_that_nobody_remembers_is_not_found(stoker, api):
    assert stoker("hosts", "show", "../jobs").code == Exit.NOT_FOUND
    assert api.asked == ["GET /v1/hosts/..%2Fjobs"]


def test_no_machine_at_all_is_said_on_stderr(stoker, api):
    api.answers["GET /v1/hosts"] = (200, {"data": [], "total": 0})
    ran = stoker("hosts", "ls")
    assert (ran.out, ran.code) == ("", Exit.OK)
    assert "no machine is remembered" in ran.err
