"""The process that looks at pages: what it answers, and that its end costs one look."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.settings import Settings
from orchestrator.cli.stage import descendants, is_running
from orchestrator.dashboard import aside
from orchestrator.dashboard.aside import Aside
from orchestrator.dashboard.live import LocalLooker, Page
from state.errors import NotFound, StoreUnavailable
from state.memory import MemoryStore

HERE = "tests.unit.orchestrator.test_aside:application"


class _Deps:
    store, settings = MemoryStore(), Settings()


class _Board(LocalLooker):
    """A looker at pages that show their own name."""

    def __init__(self, app: Any) -> None:
        super().__init__(app, _Deps())  # type: ignore[arg-type]  # all that is asked of it

    def _seen(self, tx: Any, page: Page) -> Any:
        if page.name == "missing":
            raise NotFound("no such job")
        if page.name == "away":
            raise StoreUnavailable("nobody is there")
        if page.name == "death":
            os._exit(1)
        if page.name == "fault":
            raise ZeroDivisionError
        return page.what

    def fragments(self, tx: Any, page: Page, before: int | None, after: int) -> str:
        return f"{self._kept.get((page, before or 0))} to {self._kept[page, after]}"


def application() -> Any:
    """What the process is told to make."""
    return SimpleNamespace(extensions={"looker": _Board(None)})


def told(*asked: list[Any]) -> list[Any]:
    out = io.StringIO()
    lines = "".join(json.dumps(item) + "\n" for item in asked)
    aside.answers(_Board(None), io.StringIO(lines), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_page_that_stays_the_same_keeps_its_number() -> None:
    (_, first), (_, again), (_, other) = told(
        ["look", "x", "one"], ["look", "x", "one"], ["look", "x", "two"]
    )
    assert first == again != other


def test_each_fault_is_told_as_what_it_is() -> None:
    kinds = [kind for kind, _ in told(["look", "missing", ""], ["look", "away", ""])]
    assert kinds == ["missing", "away"]
    ((kind, words),) = told(["look", "fault", "secret"])
    assert (kind, "secret" in words) == ("fault", False)


@pytest.fixture
def other() -> Any:
    made = Aside(HERE)
    yield made
    made.close()


def test_a_looker_that_died_starts_again_and_knows_no_earlier_look(other: Aside) -> None:
    tx: Any = None  # the process has its own
    page = Page("x", "one")
    first = other.look(tx, page)
    assert other.look(tx, page) == first
    with pytest.raises(StoreUnavailable):
        other.look(tx, Page("death", ""))
    second = other.look(tx, page)
    assert second != first
    assert other.fragments(tx, page, first, second) == "None to one"
    assert other.fragments(tx, page, second, second) == "one to one"


def test_after_the_end_there_is_no_process_and_no_other_one(other: Aside) -> None:
    tx: Any = None
    others = _beside()  # those of servers that other tests share
    other.look(tx, Page("x", "one"))
    assert _beside() == others + 1
    other.close()
    assert _beside() == others
    with pytest.raises(StoreUnavailable):
        other.look(tx, Page("x", "one"))
    assert _beside() == others


def _beside() -> int:
    """Processes of ours that look at pages and run."""
    argv = [Path(f"/proc/{pid}/cmdline") for pid in descendants(os.getpid()) if is_running(pid)]
    return sum(b"orchestrator.dashboard.aside" in path.read_bytes() for path in argv)
