"""Group commit: nobody waits for company, nobody is failed by a neighbour."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from orchestrator.group_commit import GroupCommitter


def test_a_lone_item_is_committed_at_once() -> None:
    committer = GroupCommitter[int, int](lambda items: [item * 2 for item in items])
    assert committer.submit(21, timeout_s=10) == 42


def test_those_who_wait_are_committed_together_in_order() -> None:
    groups: list[list[int]] = []
    held, first = threading.Event(), threading.Event()

    def apply(items: Sequence[int]) -> list[int]:
        groups.append(list(items))
        if len(groups) == 1:
            first.set()
            assert held.wait(10)
        return list(items)

    committer = GroupCommitter(apply, limit=3)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(committer.submit, 0, timeout_s=10)]
        assert first.wait(10)
        answers += [pool.submit(committer.submit, item, timeout_s=10) for item in range(1, 8)]
        while committer.waiting() < 7:
            threading.Event().wait(0.001)
        held.set()
        assert [answer.result() for answer in answers] == list(range(8))
    assert [len(group) for group in groups] == [1, 3, 3, 1]


def test_nobody_is_answered_before_its_item_is_on_disk() -> None:
    begun, held = threading.Event(), threading.Event()

    def apply(items: Sequence[int]) -> list[int]:
        begun.set()
        assert held.wait(10)
        return list(items)

    committer = GroupCommitter(apply)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(committer.submit, 7, timeout_s=10)
        assert begun.wait(10)
        early, _ = wait([answer], timeout=0.05)
        held.set()
        assert not early
        assert answer.result() == 7


def test_a_poisoned_item_fails_alone() -> None:
    def apply(items: Sequence[str]) -> list[str]:
        if "poison" in items:
            raise ValueError("poison")
        return [item.upper() for item in items]

    committer = GroupCommitter(apply)
    with ThreadPoolExecutor(5) as pool:
        answers = {
            item: pool.submit(committer.submit, item, timeout_s=10)
            for item in ("a", "b", "poison", "c")
        }
        assert [answers[item].result() for item in "abc"] == ["A", "B", "C"]
        with pytest.raises(ValueError, match="poison"):
            answers["poison"].result()


def test_what_is_hopeless_is_not_tried_one_by_one() -> None:
    calls: list[int] = []
    held = threading.Event()

    def apply(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        assert held.wait(10)
        raise ConnectionError("gone")

    committer = GroupCommitter(apply, hopeless=lambda error: isinstance(error, ConnectionError))
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(committer.submit, item, timeout_s=10) for item in range(5)]
        while committer.waiting() + sum(calls) < 5:
            threading.Event().wait(0.001)
        held.set()
        for answer in answers:
            with pytest.raises(ConnectionError):
                answer.result()
    assert sum(calls) == 5
    assert len(calls) <= 5


def test_nobody_waits_for_ever() -> None:
    held = threading.Event()

    def apply(items: Sequence[int]) -> list[int]:
        assert held.wait(10)
        return list(items)

    committer = GroupCommitter(apply)
    with pytest.raises(TimeoutError):
        committer.submit(1, timeout_s=0.01)
    held.set()
    assert committer.submit(2, timeout_s=10) == 2


def test_a_timeout_raised_by_the_work_itself_is_handed_over() -> None:
    def apply(items: Sequence[int]) -> list[int]:
        raise TimeoutError("of the work")

    with pytest.raises(TimeoutError, match="of the work"):
        GroupCommitter(apply).submit(1, timeout_s=10)
