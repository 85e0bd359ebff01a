"""Shared by all tests: a clean environment and a clock that only moves when told."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "tests/chaos")
    group.addoption("--chaos-rounds", type=int, default=3, help="so many kills; default: 3")
    group.addoption("--chaos-seed", type=int, default=1, help="what is killed, and when")
    group.addoption("--chaos-jobs", type=int, default=2, help="jobs under way all the time")
    group.addoption("--chaos-report", default="", help="a JSON file for what came of it")
    group = parser.getgroup("pages", "tests/e2e/test_story.py")
    group.addoption("--shots", default="", help="a folder for pictures of every page")
    group.addoption("--picture", default="", help="a PNG file: what the README shows")
    parser.addoption("--slow", action="store_true", help="also what takes a minute or more")
    group = parser.getgroup("mutations", "tests/mutations")
    group.addoption("--mutants", action="store_true", help="try every mutation of the catalogue")


def pytest_configure() -> None:
    """Whoever runs us in the background ignores SIGINT, and our children would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless it was asked for."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several at a time: a file stays together, and with those that share a whole Stoker, which
    takes half a minute to start. (xdist's own groups do nothing under pytest 9.)"""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Sharing(LoadFileScheduling):  # type: ignore[misc]  # untyped to us
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            shares = file.startswith("tests/e2e/") and not file.endswith("test_demo.py")
            return "tests/e2e" if shares else file

    return Sharing(config, log)


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own keys and proxies must not reach a test."""
    for name in list(os.environ):
        if name.startswith(("STOKER_", "VAST_", "AWS_", "S3_", "CIVITAI_", "HF_")) or (
            name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STOKER_CONFIG", "")  # nor a file of theirs


class ManualClock:
    """Time as a test wants it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
