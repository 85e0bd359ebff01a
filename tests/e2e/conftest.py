"""A whole Stoker on this machine, for all end-to-end tests: real servers, web, worker, beat, the
Vast sandbox and a tiny base model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpu_agent import wire
from infra.provider import Instance
from infra.wiring import Services
from orchestrator.cli.client import Client
from orchestrator.cli.demo import TINY_RECIPE, skimage_photos
from orchestrator.cli.follow import ENDED
from orchestrator.cli.jobs import photo_files, upload_dataset
from orchestrator.cli.receiver import Receiver
from orchestrator.cli.stage import TINY_BASE, Stage, descendants, free_port, is_running
from state.errors import StoreUnavailable
from state.job import Job
from state.lease import Lease

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """What `condition` brings as soon as that is true; fails, saying `what`, when it is late."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StoreUnavailable):  # a database that was killed comes back
            if got := condition():
                return got
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.02)


class Stoker:
    """A running Stoker, as its customer and as its operator sees it."""

    def __init__(self, stage: Stage, client: Client, services: Services, dataset: str) -> None:
        self.stage, self.client, self.services = stage, client, services
        #: A dataset of four photographs, ready.
        self.dataset = dataset

    # --- the customer's side

    def order(self, receiver: Receiver | None = None, **changes: Any) -> str:
        """Order a training; the job's id."""
        body: dict[str, Any] = {
            "dataset_id": self.dataset,
            "base": TINY_BASE,
            "recipe": TINY_RECIPE,
            **changes,
        }
        if receiver is not None:
            body["webhook"] = {"url": receiver.url, "secret": receiver.secret}
        return str(self.client.post("/v1/jobs", body)["id"])

    def show(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/jobs/{job_id}"))

    def ended(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        """The job, once it is completed, failed or cancelled."""
        until(lambda: self.job(job_id).status in ENDED, f"the end of {job_id}", seconds)
        return self.show(job_id)

    # --- the operator's side: the database and the market, whatever happens to the web process

    def job(self, job_id: str) -> Job:
        with self.services.store.transaction() as tx:
            return tx.job(job_id)

    def leases(self, job_id: str) -> list[Lease]:
        with self.services.store.transaction() as tx:
            return tx.leases_of(job_id)

    def instances(self, job_id: str = "") -> list[Instance]:
        """What the market shows of this job, or of all."""
        prefix = f"{self.services.settings.deployment}/{job_id}"
        listed = self.services.provider.instances()
        return [item for item in listed if item.label.startswith(prefix)]

    def given_back(self, job_id: str) -> None:
        """Wait until the market and we agree that the job has no machine."""

        def gone() -> bool:
            leases = self.leases(job_id)
            return not any(lease.open for lease in leases) and not self.instances(job_id)

        until(gone, f"{job_id} has no instance left")

    def pids(self) -> dict[str, int]:
        assert self.stage.servers is not None
        return self.stage.servers.pids

    def kill(self, name: str) -> int | None:
        """SIGKILL for web, worker, beat …, which the supervisor starts again; the process id."""
        pid = self.pids().get(name)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def orphans(self) -> set[int]:
        """Processes of this Stoker that nobody here would end."""
        top = self.pids()["supervisor"]
        return set(running_from(self.stage.root)) - descendants(top) - {top}

    def machines_ever(self) -> set[str]:
        """Ids of all instances that ever ran: the sandbox keeps a log of each."""
        return {path.stem for path in (self.stage.root / "sandbox" / "logs").glob("*.log")}

    def machine(self, job_id: str) -> frozenset[int]:
        """The processes of the machine that the job runs on."""
        label = f"{self.services.settings.deployment}/{job_id}/"
        (instance,) = (item for item in self.instances() if item.label.startswith(label))
        folder = self.machine_folder(instance)
        tops = [
            pid for pid in descendants(self.pids()["sandbox"]) if str(folder).encode() in _argv(pid)
        ]
        return frozenset(tops).union(*(descendants(pid) for pid in tops))

    def machine_folder(self, instance: Instance) -> Path:
        return self.stage.root / "sandbox" / "machines" / instance.id


def _argv(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def running_from(folder: Path) -> list[int]:
    """Processes that were given something below `folder`, whoever their parent is by now."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            given = (place / "environ").read_bytes() + (place / "cmdline").read_bytes()
            if str(folder).encode() in given and int(place.name) != os.getpid():
                found.append(int(place.name))
    return sorted(found)


class Customer(Receiver):
    """A webhook receiver that knows its own secret."""

    def __init__(self) -> None:
        self.secret = wire.new_secret()
        super().__init__(self.secret)


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
        stage = Stage(root=root, port=free_port(), show=Console(quiet=True))
        with contextlib.ExitStack() as stack:
            client, services = stage.start(stack)
            stack.callback(services.store.close)
            dataset = upload_dataset(client, photos, photo_files(photos))
            running = Stoker(stage, client, services, dataset)
            until(lambda: client.get(f"/v1/datasets/{dataset}")["status"] == "ready", "a dataset")
            yield running
    assert not stage.left(), "processes were left"
    until(lambda: not running_from(root), "no orphan of a killed process is left", 10.0)


class Demo:
    """`stoker demo`, as a process of its own."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.port = folder, free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
        env |= {"STOKER_DATA": str(folder / "data"), "PYTHONPATH": str(ROOT)}
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
