"""Reports over a bad line: in order, once each, none lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_agent.clock import Clock
from gpu_agent.halt import Halt
from gpu_agent.report import Reporter, Spool
from gpu_agent.wire import Fact, Order


@pytest.fixture
def reporter(stoker, tmp_path):
    """Makes reporters over the same spool; `.orders` and `.heard` are what came back."""
    made = []

    def make(*, wall=time.time, **spec):
        stoker.spec |= {"heartbeat_s": 60.0} | spec
        halt, orders, heard = Halt(), [], []
        item = Reporter(
            stoker.job_spec(),
            Spool(tmp_path / "spool.db"),
            clock=Clock(wall=wall),
            halt=halt,
            on_order=orders.append,
            on_heard=lambda: heard.append(1),
            status=lambda: {"phase": "testing"},
            delays=(0.02, 0.05),
        )
        item.halt, item.orders, item.heard = halt, orders, heard
        item.start()
        made.append(item)
        return item

    yield make
    for item in made:
        item.close()
        item._thread.join(10)


def sent(stoker):
    return [(item.seq, str(item.type)) for item in stoker.reports]


def test_reports_arrive_signed_and_numbered_in_the_order_of_what_happened(stoker, reporter):
    here = reporter()
    for fact in (Fact.GPU_READY, Fact.MODEL_READY, Fact.IMAGES_READY):
        here.put(fact)
    assert here.flush(10)
    assert sent(stoker) == [(1, "gpu.ready"), (2, "model.ready"), (3, "images.ready")]
    assert here.heard


@pytest.mark.parametrize("fault", ["lost", "cut", 500, 502, 404, 307, 401])
def test_what_was_not_acknowledged_is_sent_again_with_the_same_bytes(stoker, reporter, fault):
    stoker.faults["report"] += [fault, fault]
    here = reporter()
    here.put(Fact.GPU_READY)
    here.put(Fact.IMAGES_READY)
    assert here.flush(10)
    assert sent(stoker) == [(1, "gpu.ready"), (2, "images.ready")]
    tries = [item for item in stoker.requests if item.path.endswith("reports")]
    assert len(tries) == 4
    assert len({item.body for item in tries[:3]}) == 1
    assert {item.headers["webhook-id"] for item in tries[:3]} == {"job_1.1.1"}


def test_a_redirect_is_not_followed(stoker, reporter):
    def elsewhere(handler):
        handler.answer(308, b"", location=stoker.url + "/elsewhere/reports")
        return "done"

    stoker.faults["report"] += [elsewhere]
    here = reporter()
    here.put(Fact.GPU_READY)
    assert here.flush(10)
    assert not [item for item in stoker.requests if "elsewhere" in item.path]


def test_the_server_may_ask_for_patience(stoker, reporter):
    def busy(handler):
        handler.answer(429, b"", retry_after="1")
        return "done"

    stoker.faults["report"] += [busy]
    here = reporter()
    began = time.monotonic()
    here.put(Fact.GPU_READY)
    assert here.flush(10)
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("status", [413, 422])
def test_a_report_that_will_never_be_taken_is_dropped(stoker, reporter, status):
    stoker.faults["report"] += [status]
    here = reporter()
    here.put(Fact.GPU_READY)
    here.put(Fact.IMAGES_READY)
    assert here.flush(10)
    assert sent(stoker) == [(2, "images.ready")]


def test_the_end_of_the_attempt_ends_the_work(stoker, reporter, until):
    stoker.over = True
    here = reporter()
    here.put(Fact.GPU_READY)
    until(lambda: here.halt.reason)
    assert here.halt.reason == "gone"
    assert not here.flush(0.1)


def test_orders_come_with_the_answers(stoker, reporter):
    stoker.orders = [Order.CHECKPOINT_NOW, Order.CANCEL]
    here = reporter()
    here.put(Fact.GPU_READY)
    assert here.flush(10)
    assert here.orders == [Order.CHECKPOINT_NOW, Order.CANCEL]


def test_an_answer_of_garbage_is_an_acknowledgement_without_orders(stoker, reporter, faults):
    stoker.faults["report"] += [
        faults.send(b"<html>\xff"),
        faults.send(b'{"orders": ["dance", 7]}'),
    ]
    here = reporter()
    here.put(Fact.GPU_READY)
    here.put(Fact.IMAGES_READY)
    assert here.flush(10)
    assert here.orders == []


def test_a_machine_with_a_wrong_clock_learns_the_time(stoker, reporter):
    here = reporter(wall=lambda: time.time() - 86_400)
    stoker_date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())

    def refuse(handler):
        handler.answer(401, b"{}", date=stoker_date)
        return "done"

    stoker.faults["report"] += [refuse]
    here.put(Fact.GPU_READY)
    assert here.flush(10)
    assert sent(stoker) == [(1, "gpu.ready")]


def test_silence_is_broken_by_a_heartbeat(stoker, reporter, until):
    reporter(heartbeat_s=0.05)
    until(lambda: stoker.facts().count("heartbeat") >= 3)
    assert stoker.reports[0].data == {"phase": "testing", "moved": 0}
    assert [item.seq for item in stoker.reports[:3]] == [1, 2, 3]


def test_progress_is_merged_while_the_server_is_away_and_no_point_is_lost(stoker, reporter, until):
    stoker.always["report"] = 503
    here = reporter(progress_s=0.0)
    here.put(Fact.GPU_READY)
    until(lambda: stoker.requests)
    for step in range(1, 201):
        here.put(Fact.TRAINING_PROGRESS, {"step": step, "points": [[step, 0.5]]})
        if step == 100:
            here.put(Fact.TRAINING_CHECKPOINT, {"step": 100})
    stoker.always.clear()
    assert here.flush(10)
    assert sent(stoker) == [
        (1, "gpu.ready"),
        (2, "training.checkpoint"),
        (3, "training.progress"),
    ]
    progress = stoker.reports[-1].data
    assert progress["step"] == 200
    assert [point[0] for point in progress["points"]] == list(range(1, 201))


def test_a_long_series_is_spread_over_reports_that_fit(stoker, reporter, until):
    stoker.always["report"] = 503
    here = reporter(progress_s=0.0)
    here.put(Fact.GPU_READY)
    until(lambda: stoker.requests)
    for start in range(0, 20_000, 500):
        points = [[step, 0.123456789] for step in range(start, start + 500)]
        here.put(Fact.TRAINING_PROGRESS, {"step": start, "points": points})
    stoker.always.clear()
    assert here.flush(20)
    assert all(len(body) < 256 * 1024 for body in stoker.bodies.values())
    points = [point[0] for item in stoker.reports for point in item.data.get("points", [])]
    assert points == list(range(20_000))


def test_progress_keeps_its_pace_but_a_milestone_takes_it_along(stoker, reporter, until):
    here = reporter(progress_s=30.0)
    here.put(Fact.TRAINING_PROGRESS, {"step": 1})
    until(lambda: stoker.has("training.progress"))
    here.put(Fact.TRAINING_PROGRESS, {"step": 2})
    here.put(Fact.TRAINING_PROGRESS, {"step": 3})
    here.put(Fact.TRAINING_COMPLETED)
    until(lambda: stoker.has("training.completed"))
    steps = [item.data["step"] for item in stoker.reports if "step" in item.data]
    assert steps == [1, 3]
    assert stoker.facts()[-1] == "training.completed"


def test_numbers_that_json_lacks_and_texts_that_databases_lack_are_cleaned(stoker, reporter):
    here = reporter()
    here.put(
        Fact.TRAINING_PROGRESS,
        {"loss": float("nan"), "lr": float("inf"), "note": "a\x00b\ud800", "deep": [{"x": -1e999}]},
    )
    assert here.flush(10)
    assert stoker.reports[0].data == {
        "loss": None,
        "lr": None,
        "note": "ab?",
        "deep": [{"x": None}],
        "moved": 0,
    }


PUTTER = """
import sys, time
from pathlib import Path
from gpu_agent.clock import Clock
from gpu_agent.halt import Halt
from gpu_agent.report import Reporter, Spool
from gpu_agent.wire import Fact, JobSpec
home = Path(sys.argv[1])
life = int(sys.argv[2])
spec = JobSpec.from_bytes((home / "spec.json").read_bytes())
reporter = Reporter(spec, Spool(home / "spool.db"), clock=Clock(), halt=Halt(),
                    on_order=print, on_heard=lambda: None, delays=(0.01,))
reporter.start()
for number in range(100_000):
    reporter.put(Fact.TRAINING_CHECKPOINT, {"mark": [life, number]})
    reporter.put(Fact.TRAINING_PROGRESS, {"step": number, "points": [[life, number]]})
    print(number, flush=True)
"""


def test_the_spool_survives_kill_9_at_any_moment(stoker, tmp_path, until):
    stoker.spec |= {"heartbeat_s": 60.0, "progress_s": 0.0}
    (tmp_path / "spec.json").write_bytes(stoker.job_spec().to_bytes())
    promised: list[list[int]] = []
    for life in range(5):
        stoker.faults["report"].extend(["lost", "ok", "cut", "ok", 500] * 3)
        process = subprocess.Popen(
            [sys.executable, "-c", PUTTER, str(tmp_path), str(life)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        assert process.stdout is not None
        wanted = 3 + 7 * life
        for _ in range(wanted):
            promised.append([life, int(process.stdout.readline())])
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
    last = Reporter(
        stoker.job_spec(),
        Spool(tmp_path / "spool.db"),
        clock=Clock(),
        halt=Halt(),
        on_order=print,
        on_heard=lambda: None,
        delays=(0.01,),
    )
    last.start()
    assert last.flush(20)
    last.close()
    seqs = [item.seq for item in stoker.reports]
    assert seqs == list(range(1, len(seqs) + 1))
    marks = [item.data["mark"] for item in stoker.reports if "mark" in item.data]
    assert marks == sorted(marks)
    assert len(marks) == len({tuple(mark) for mark in marks})
    assert {tuple(mark) for mark in promised} <= {tuple(mark) for mark in marks}
    points = [tuple(point) for item in stoker.reports for point in item.data.get("points", [])]
    assert len(points) == len(set(points))
    assert {tuple(mark) for mark in promised} <= set(points)


def test_a_spool_on_a_full_disk_goes_on_in_memory(tmp_path):
    path = tmp_path / "spool.db"
    spool = Spool(path)
    spool.put(Fact.GPU_READY, {}, 1.0)
    spool._db.execute("PRAGMA max_page_count = 1")  # SQLite's own way to say that the disk is full
    spool.put(Fact.ERROR, {"log_tail": ["x" * 10_000]}, 2.0)
    spool.put(Fact.ERROR, {"code": "host.disk_full"}, 3.0)
    assert spool.waiting() == 3
    seqs = []
    for _ in range(3):
        seq, _, _, _ = spool.first(lambda fact: True)
        spool.drop(seq)
        seqs.append(seq)
    assert seqs == [1, 2, 3]
    assert not path.exists()
    spool.close()
