"""A whole Stoker on this machine, for all end-to-end tests: real servers, web, worker, beat, the
Vast sandbox and a tiny base model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from rich.console import Console

from orchestrator.cli.demo import skimage_photos
from orchestrator.cli.jobs import photo_files, upload_dataset
from orchestrator.cli.servers import make_key
from orchestrator.cli.stage import Stage, descendants, free_port, is_running
from stand.browser import Reader, chromium
from stand.running import Customer, Stoker, argv_of, running_from, until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def new_customer() -> type[Customer]:
    return Customer


@pytest.fixture
def customer() -> Iterator[Customer]:
    with Customer() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return skimage_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def stoker(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[Stoker]:
    """Started once; all that it started must be gone after the last test."""
    root = tmp_path_factory.mktemp("stoker")
    with pytest.MonkeyPatch.context() as ambient:
        for name in list(os.environ):
            if name.startswith(("STOKER_", "HF_", "AWS_")) or name.lower().endswith("_proxy"):
                ambient.delenv(name)
        # keys that nothing here needs: canaries, which must turn up nowhere
        ambient.setenv("HF_TOKEN", "hf_canaryofhuggingface")
        ambient.setenv("STOKER_VAST_WEBHOOK_SECRET", "canary-of-vasts-notifications")
        for kind in ("READS", "WRITES", "LOGINS"):
            ambient.setenv(f"STOKER_RATE_{kind}", "0")  # tests ask as often as they want
        stage = Stage(root=root, port=free_port(), show=Console(quiet=True))
        with contextlib.ExitStack() as stack:
            client, services = stage.start(stack)
            stack.callback(services.store.close)
            dataset = upload_dataset(client, photos, photo_files(photos))
            running = Stoker(stage, client, services, dataset)
            until(lambda: client.get(f"/v1/datasets/{dataset}")["status"] == "ready", "a dataset")
            yield running
    assert {pid: argv_of(pid) for pid in stage.left()} == {}, "processes were left"
    until(lambda: not running_from(root), "no orphan of a killed process is left", 10.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def reader(browser: Browser, stoker: Any, request: pytest.FixtureRequest) -> Iterator[Reader]:
    """An operator's browser; what it noticed fails the test."""
    shots = request.config.getoption("--shots")
    storage = stoker.services.settings.s3_endpoint
    one = Reader(browser, stoker.stage.url, storage, shots=Path(shots) if shots else None)
    yield one
    one.close()
    assert one.faults == []


@pytest.fixture(scope="module")
def key(stoker: Any) -> str:
    scopes = frozenset({"operator", "jobs:read", "jobs:write"})
    return make_key(stoker.services, owner="ops", name="ops", scopes=scopes)


class Demo:
    """`stoker demo`, as a process of its own."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.port = folder, free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
        env |= {"STOKER_DATA": str(folder / "data"), "PYTHONPATH": str(ROOT)}
        self._env = env
        self.said = folder / f"said-{self.port}.txt"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "demo", *args, "--port", str(self.port),
                 "--output", str(folder / "output")],
                cwd=folder, env=env, stdout=subprocess.PIPE, stderr=said, start_new_session=True,
            )  # fmt: skip
        self.seen: frozenset[int] = frozenset()

    def until_said(self, *words: str) -> None:
        """Until it said all of `words`; remembers every process that it has by then."""

        def said() -> bool:
            assert self.process.poll() is None, self.words()
            return all(item in self.words() for item in words)

        until(said, " and ".join(words), 120.0)
        self.seen = descendants(self.process.pid)

    def until_training(self) -> None:
        self.until_said("-> training", "step ")

    def words(self) -> str:
        return self.said.read_text(errors="replace")

    def beside(self, *args: str) -> str:
        """What another command says, in the same directory."""
        command = [sys.executable, "-m", "orchestrator.cli", *args]
        return subprocess.check_output(command, cwd=self.folder, env=self._env, text=True)

    def end(self, seconds: float = 200.0) -> tuple[int, str]:
        """Wait for its end; exit code and stdout."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output.decode()

    def left(self) -> list[int]:
        """Its processes that run still."""
        known = {pid for pid in self.seen if is_running(pid)}
        return sorted(known.union(running_from(self.folder)))

    def files(self) -> list[str]:
        """What is left of the demo's own files."""
        return [str(path) for path in (self.folder / "data" / "demo").glob("*")]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all demos of a module: each must cope with what the one before left."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def start_demo(demo_folder: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*args: str) -> Demo:
        started.append(Demo(demo_folder, *args))
        return started[-1]

    yield start
    for demo in started:
        demo.close()


@pytest.fixture(scope="session", name="until")
def until_() -> Callable[..., Any]:
    return until
