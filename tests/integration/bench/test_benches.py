"""What the benches do: they measure everything that they promise and leave nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from orchestrator.bench import latency, pages, reconcile
from orchestrator.bench.place import children, memory_mb
from orchestrator.cli import app

pytestmark = pytest.mark.slow

SMALL = reconcile.Sizes(few=20, many=60, finished=40, due=10)


def databases(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


@pytest.fixture(scope="module")
def passes(server_url: str) -> dict:
    before = databases(server_url)
    measured = reconcile.run(server_url, passes=2, sizes=SMALL)
    return {**measured, "databases left": databases(server_url) - before}


def test_the_reconcile_bench_times_each_database_and_drops_it(passes) -> None:
    counts = {
        name: (case["active"], case["due"], case["finished"])
        for name, case in passes["cases"].items()
    }
    assert counts == {"few": (20, 10, 0), "many": (60, 10, 0), "finished": (20, 10, 40)}
    assert all(case["median_ms"] > 0 for case in passes["cases"].values())
    assert passes["ratios"].keys() >= {"many_to_few", "finished_to_none"}
    assert passes["databases left"] == set()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("bench")
    scale = latency.Scale(
        queued=2, submits=2, burst=1, submit_every_s=0.0, report_every_s=0.0, agent=False
    )
    return latency.run(folder, scale=scale), folder


def test_the_latency_bench_sees_every_create_call_and_every_webhook(measured) -> None:
    got = measured[0]["latency"]
    assert [(got[name]["count"], got[name]["missing"]) for name in got] == [(2, 0), (8, 0), (1, 0)]


def test_the_latency_bench_leaves_no_file(measured) -> None:
    assert list(measured[1].iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_latency_bench_tells_the_memory_of_every_process(measured) -> None:
    memory = measured[0]["memory_mb"]
    assert memory["web"]
    assert all(size > 10 for size in (*memory["web"], memory["worker"], memory["beat"]))


@pytest.fixture
def bench(passes, server_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `stoker bench reconcile`, which finds that all bars were missed; the exit code."""
    missed = {**passes, "databases left": 0, "ratios": {name: 99.0 for name in passes["ratios"]}}
    monkeypatch.setenv("DATABASE_URL", server_url)
    monkeypatch.setattr(reconcile, "run", lambda url, **options: missed)

    def run(*options: str) -> int:
        with pytest.raises(SystemExit) as ended:
            app.run(["bench", "reconcile", *options])
        return ended.value.code

    return run


def test_a_bench_ends_well_whatever_it_found(bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--json") == 0
    assert json.loads(capsys.readouterr().out)["bar"] == {"many_to_few": 1.3}


def test_a_bench_prints_a_table_with_its_bar(bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    printed = capsys.readouterr().out
    assert "60 active, 10 due, 0 finished" in printed
    assert "bar: at most 1.3" in printed


def test_memory_of_a_process_that_is_gone_is_not_made_up() -> None:
    assert memory_mb(2**22 + 1) is None
    assert os.getpid() in children(os.getppid())


def test_the_pages_bench_times_fleet_and_sees_its_streams_live(server_url: str) -> None:
    before = databases(server_url)
    sizes = pages.Sizes(training=4, waiting=1, stalled=1, ended=10, events=12)
    got = pages.run(server_url, pairs=1, seconds=3.0, sizes=sizes, streams=3, views=3)
    assert (got["ran_on"]["jobs"], got["ran_on"]["events"]) == (16, 192)
    assert got["fleet"]["median_ms"] > 0
    assert got["receiver"]["with"]["statuses"].keys() == {"200"}
    assert got["receiver"]["p99_ratio"] > 0
    assert got["streams"]["fewest_messages_of_one"] >= 1
    assert got["streams"]["ended"] == 0
    assert databases(server_url) == before
