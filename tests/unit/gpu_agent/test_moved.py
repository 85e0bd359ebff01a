"""The count of what moves, and the line that is watched."""

from __future__ import annotations

import threading

import pytest

from gpu_agent.halt import Fault
from gpu_agent.moved import Moved
from gpu_agent.pull import Line

MEGABIT = 125_000


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def test_the_count_grows_whoever_counts(tmp_path):
    moved = Moved(tmp_path / "moved")
    threads = [
        threading.Thread(target=lambda: [moved.add(1) for _ in range(5_000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moved.read() == 20_000


def test_an_agent_that_was_started_again_never_counts_less(tmp_path):
    before = Moved(tmp_path / "moved")
    before.add(7)
    told = before.read()
    before.add(1)
    assert Moved(tmp_path / "moved").read() >= told


@pytest.mark.parametrize("garbage", ["", "x", "\x00"])
def test_a_count_that_was_lost_begins_anew(tmp_path, garbage):
    (tmp_path / "moved").write_text(garbage)
    assert Moved(tmp_path / "moved").read() == 0


def test_a_count_is_told_though_it_cannot_be_kept(tmp_path):
    moved = Moved(tmp_path / "no" / "such" / "folder")
    moved.add(3)
    assert moved.read() == 3


def drive(line, time, seconds, mbps):
    """So many seconds with one chunk every tenth."""
    with line.used():
        for _ in range(round(seconds * 10)):
            time.now += 0.1
            line.took(round(mbps * MEGABIT / 10))


def test_a_line_that_is_too_slow_is_the_hosts_fault(time):
    line = Line(least=25.0, monotonic=time)
    drive(line, time, 19, 24)
    with pytest.raises(Fault, match=r"24\.0 Mbit/s, at least 25") as caught:
        drive(line, time, 2, 24)
    assert (caught.value.code, caught.value.retryable) == ("host.slow", True)


def test_a_line_that_was_fast_enough_is_not_judged_again(time):
    line = Line(least=25.0, monotonic=time)
    drive(line, time, 21, 30)
    drive(line, time, 300, 1)
    assert line.mbps == pytest.approx((21 * 30 + 300) / 321, rel=0.01)


def test_what_is_done_sooner_is_not_judged(time):
    line = Line(least=25.0, monotonic=time)
    drive(line, time, 15, 1)
    time.now += 600
    assert line.mbps == pytest.approx(1)


def test_a_source_that_stands_still_is_not_a_slow_line(time):
    line = Line(least=25.0, monotonic=time)
    for _ in range(5):
        drive(line, time, 3, 200)
        with line.used():
            time.now += 60  # a body of which nothing comes
            line.took(1)
    drive(line, time, 3, 200)


def test_downloads_at_the_same_time_share_the_line(time):
    line = Line(least=25.0, monotonic=time)
    with line.used():
        drive(line, time, 30, 26)
    with line.used(), line.used():
        for _ in range(10):
            time.now += 0.1
            assert line.took(MEGABIT) == line.took(MEGABIT) == 0.0
    assert line.mbps == pytest.approx((30 * 26 + 20) / 31, rel=0.01)


def test_a_line_of_the_sandbox_is_as_slow_as_it_says(time):
    moved = []
    line = Line(most=8.0, moved=moved.append, monotonic=time)
    with line.used(), line.used():
        assert line.took(1_000_000) == pytest.approx(1.0)
        assert line.took(1_000_000) == pytest.approx(2.0), "two downloads get half of it each"
        time.now += 5.0
        assert line.took(1_000_000) == pytest.approx(1.0), "what was not used is not saved up"
    assert sum(moved) == 3_000_000
