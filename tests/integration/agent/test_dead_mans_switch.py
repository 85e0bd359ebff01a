"""A machine gives itself back though nobody else does: no database, no sweep, only itself.

The market is the real sandbox, the machine runs the real start script and the real agent. The
other layers, alone in their turn: `tests/unit/tasks/test_dead_mans_switch.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.agent_bundle import BUNDLE_PATH, build_bundle, onstart_script
from infra.provider import LaunchSpec
from infra.sandbox.faults import HostFault
from infra.sandbox.server import Sandbox, running_sandbox
from infra.vast import VastProvider
from state.job import GpuNeeds

KEY = "account-key-of-a-test"


@pytest.fixture(scope="module")
def bundle() -> Any:
    return build_bundle()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with running_sandbox(account_key=KEY, boot_s=0.1, keep_logs=True) as running:
        yield running


class Machine:
    """A rented machine, seen from the market and from its insides."""

    def __init__(self, sandbox: Sandbox, vast: VastProvider, number: str) -> None:
        self._sandbox, self._vast, self.number = sandbox, vast, number

    @property
    def phase(self) -> str | None:
        """What the market says of it; None when there is no such instance any more."""
        found = self._vast.instance(self.number)
        return found.phase if found else None

    @property
    def console(self) -> str:
        return str(self._sandbox.market.machines.log(self.number))

    @property
    def agent(self) -> int | None:
        """The process id of its agent."""
        home = str(self._sandbox.market.machines.directory(self.number))
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                place = os.readlink(f"/proc/{pid}/cwd")
            except OSError:
                continue
            if argv[1:2] == [b"gpu_agent.pyz"] and place.startswith(home):
                return int(pid)
        return None

    @property
    def promised(self) -> tuple[int, int]:
        """How often its agent told the start script how long to wait, and the last of it (s)."""
        home = self._sandbox.market.machines.directory(self.number)
        count, seconds = (home / "stoker" / "due").read_text().split()
        return int(count), int(seconds)

    def turn_on(self) -> None:
        """What somebody at the market's console might do."""
        self._sandbox.market.start(int(self.number))


@pytest.fixture
def rent(stoker: Any, sandbox: Sandbox, bundle: Any, faults: Any) -> Callable[..., Machine]:
    """Rents a machine whose agent has a job, and hangs in its downloads.

    `hurry` is how many seconds of its start script's watch pass in one.
    """
    stoker.spec["method"] = "lora"
    stoker.documents[BUNDLE_PATH] = bundle.bytes
    stoker.always["get"] = faults.hang
    vast = VastProvider(KEY, sandbox.url, spacing=0, timeout=10)

    def begin(*, hurry: float = 1.0) -> Machine:
        script = onstart_script(stoker.url, bundle.sha256)
        first, rest = script.split("\n", 1)
        clock = f'sleep() {{ [ "$1" != 15 ] || set -- {15 / hurry}; command sleep "$1"; }}'
        spec = LaunchSpec(
            label="t/j/1",
            image="x/y:1",
            disk_gb=40,
            onstart=f"{first}\n{clock}\n{rest}",
            env={"STOKER_URL": stoker.url, "STOKER_TOKEN": stoker.container["STOKER_TOKEN"]},
        )
        offer = min(vast.offers(GpuNeeds()), key=lambda offer: offer.price)
        return Machine(sandbox, vast, vast.create(offer, spec))

    return begin


def test_the_silence_of_the_server(stoker: Any, rent: Any, until: Any) -> None:
    stoker.spec["silence_limit_s"] = 1.0
    stoker.always["report"] = 503
    machine = rent()
    until(lambda: machine.phase is None)
    assert "this machine ends itself: silence" in machine.console


def test_the_end_of_the_lease(stoker: Any, rent: Any, until: Any) -> None:
    stoker.spec["lease_ends_at"] = time.time() + 2.0
    machine = rent()
    until(lambda: machine.phase is None)
    assert "this machine ends itself: lease" in machine.console


def test_a_server_that_refuses_the_machine_for_what_it_is(
    stoker: Any, rent: Any, until: Any, sandbox: Sandbox
) -> None:
    sandbox.faults.add(HostFault(kind="lie", gpu_name="GTX 1060", vram_mib=6144, disk_gb=1.5))
    seen: list[dict[str, Any]] = []

    def refuse(handler: Any) -> int:
        seen.append(stoker.requests[-1].body)
        return 410

    stoker.always["hello"] = refuse
    machine = rent()
    until(lambda: machine.phase is None)
    assert b'"gpu_name": "NVIDIA GeForce GTX 1060"' in seen[0]
    assert b'"vram_mb": 6144' in seen[0]
    assert b'"disk_free_gb": 1.5' in seen[0]
    assert f'"instance": "{machine.number}"'.encode() in seen[0]


def test_an_agent_that_is_killed_as_often_as_it_is_started(
    stoker: Any, rent: Any, until: Any
) -> None:
    machine = rent()
    killed: set[int] = set()

    def kill() -> bool:
        if (pid := machine.agent) and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return machine.phase is None

    until(kill)
    assert len(killed) == 3


def test_an_agent_that_is_frozen(stoker: Any, rent: Any, until: Any) -> None:
    stoker.spec["silence_limit_s"] = 30.0
    machine = rent(hurry=40.0)
    until(lambda: stoker.has("gpu.ready") and machine.promised >= (4, 0))
    assert machine.promised[1] <= 90, "what was promised first would have passed by now"
    os.kill(until(lambda: machine.agent), signal.SIGSTOP)
    until(lambda: machine.phase is None)
    assert "this machine is overdue" in machine.console


def test_a_start_that_hangs_before_there_is_an_agent(
    stoker: Any, rent: Any, until: Any, faults: Any
) -> None:
    stoker.always["document"] = faults.hang
    machine = rent(hurry=2000.0)
    until(lambda: machine.phase is None)
    assert "this machine is overdue" in machine.console
    assert not stoker.hellos


def test_a_key_that_may_only_stop_stops_it_as_often_as_it_is_turned_on(
    stoker: Any, rent: Any, until: Any, sandbox: Sandbox
) -> None:
    sandbox.faults.add(HostFault(kind="weak_key"))
    stoker.always["hello"] = 410
    machine = rent()
    until(lambda: machine.phase == "ended")
    machine.turn_on()
    until(lambda: machine.phase == "running")
    until(lambda: machine.phase == "ended")


def test_a_machine_without_its_key_ends_its_work_and_leaves_the_rest_to_the_server(
    stoker: Any, rent: Any, until: Any, sandbox: Sandbox
) -> None:
    sandbox.faults.add(HostFault(kind="no_key"))
    stoker.always["hello"] = 410
    machine = rent()
    until(lambda: "giving this machine back" in machine.console)
    assert "its number or key is not known" in machine.console
    until(lambda: machine.agent is None)
    assert machine.phase == "running"
