"""What is made of a machine that boots, or does not, and of what it says that it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from state import boot
from state.job import GpuNeeds
from state.lease import Lease, LeaseStatus

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
CDI = (
    "Error response from daemon: failed to create task for container: OCI runtime create failed: "
    "could not apply required modification to OCI specification: unresolvable CDI devices"
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    phase: str
    message: str = ""
    preempted: bool = False


def rented(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "id": "job_1.001",
        "job": "job_1",
        "attempt": 1,
        "label": "test/job_1/1-0",
        "created_at": NOW,
        "rented_at": NOW,
        "expires_at": NOW + timedelta(hours=12),
        "status": LeaseStatus.RENTED,
        "machine_id": "m1",
        "gpu_name": "RTX 4090",
        "vram_gb": 24.564,
        "disk_gb": 40.0,
    }
    return Lease(**{**fields, **changes})


def ends_after(lease: Lease, *shown: Shown, minutes: float = 30, **known: Any) -> tuple[str, float]:
    """The sweeps of half an hour, each of which sees the next of `shown` (the last for ever): the
    code that ends the machine, and after how many minutes; nothing and 0 when none does."""
    for sweep in range(int(minutes * 2)):
        now = NOW + timedelta(seconds=30 * sweep)
        seen = shown[min(sweep, len(shown) - 1)]
        verdict = boot.verdict(lease, seen, now, **known)
        lease = lease.evolve(note=verdict.note, noted_at=verdict.noted_at)
        if verdict.reason:
            return verdict.reason.code, sweep / 2
    return "", 0.0


LOADING = Shown(phase="starting", message="0d30c18b26f8: Pulling fs layer")


@pytest.mark.parametrize(
    ("shown", "code", "minutes"),
    [
        (Shown(phase="ended", message=CDI), "host.boot", 0),
        (Shown(phase="ended", message="Successfully loaded image", preempted=True), "host.boot", 0),
        (LOADING, "host.boot", 5),
        (Shown(phase="starting"), "host.boot", 5),
        (Shown(phase="starting", message="Retrying in 5 seconds"), "host.boot", 2),
        (Shown(phase="running", message="success, running image"), "host.boot", 5),
        (Shown(phase="lost"), "host.lost", 2),
        (Shown(phase="starting", message="manifest for image:1 not found"), "image.unavailable", 0),
        (Shown(phase="starting", message="pull access denied for x"), "image.unavailable", 0),
        (
            Shown(phase="ended", message="unauthorized: authentication required"),
            "image.unavailable",
            0,
        ),
    ],
)
def test_a_boot_that_comes_to_nothing_is_given_up_in_time(
    shown: Shown, code: str, minutes: float
) -> None:
    assert ends_after(rented(), shown) == (code, minutes)


def test_an_image_that_nobody_has_is_no_hosts_fault_and_not_tried_again() -> None:
    seen = Shown(phase="starting", message="manifest for image:1 not found: manifest unknown")
    reason = boot.verdict(rented(), seen, NOW).reason
    assert reason is not None
    assert not reason.retryable


def test_a_countdown_of_retries_is_one_message() -> None:
    counting = (
        Shown(phase="starting", message=f"Retrying in {n} seconds") for n in range(9, 0, -1)
    )
    assert ends_after(rented(), *counting) == ("host.boot", 2)


def test_a_slow_boot_that_moves_is_waited_for() -> None:
    layers = (Shown(phase="starting", message=f"{n:012x}: Pull complete") for n in range(60))
    assert ends_after(rented(), *layers, minutes=28) == ("", 0)


def test_a_host_that_is_out_of_sight_for_a_moment_boots_on() -> None:
    lost, back = Shown(phase="lost"), LOADING
    assert ends_after(rented(), *(lost, lost, lost, back) * 2, minutes=4) == ("", 0)


def test_no_machine_is_blamed_while_nobody_could_hear_its_agent() -> None:
    running = Shown(phase="running", message="success, running image")
    since = NOW + timedelta(minutes=10)
    assert ends_after(rented(), running, since=since) == ("host.boot", 15)


@pytest.mark.parametrize("phase", ["running", "starting", "lost"])
def test_what_the_market_says_of_a_machine_whose_agent_is_there_ends_nothing(phase: str) -> None:
    assert ends_after(rented(ready_at=NOW), Shown(phase=phase)) == ("", 0)


@pytest.mark.parametrize(
    ("bid", "preempted", "code"),
    [(0, False, "host.ended"), (0, True, "host.ended"), (90_000, True, "host.outbid")],
)
def test_the_end_of_a_machine_that_ran(bid: int, preempted: bool, code: str) -> None:
    shown = Shown(phase="ended", preempted=preempted)
    assert ends_after(rented(ready_at=NOW, bid=bid), shown) == (code, 0)


def test_words_that_no_database_keeps_are_left_out() -> None:
    shown = Shown(phase="ended", message="a\x00b\ud800\nc " + "x" * 9999)
    verdict = boot.verdict(rented(), shown, NOW)
    assert verdict.reason is not None
    for kept in (verdict.note, verdict.reason.message):
        assert kept.isprintable()
        assert len(kept) < 1000


# --- lies -------------------------------------------------------------------------------------

HONEST = {
    "gpu_name": "NVIDIA GeForce RTX 4090",
    "gpus": 1,
    "vram_mb": 24_564,
    "driver": "550.54.15",
    "cuda": 12.4,
    "disk_free_gb": 36.0,
}


@pytest.mark.parametrize("machine", [HONEST, {}, {"gpus": 1}, {"driver": "550"}, {"instance": "7"}])
def test_a_machine_that_keeps_its_offer_or_says_nothing_is_no_liar(machine: Any) -> None:
    assert boot.lie(rented(), GpuNeeds(), machine) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gpu_name": "NVIDIA GeForce RTX 3060"}, "its GPU is a NVIDIA GeForce RTX 3060 and no RT"),
        ({"gpus": 0}, "it has no GPU that answers"),
        ({"vram_mb": 12_288}, "its GPU has 12.3 GB and not 24.564"),
        ({"disk_free_gb": 5.0}, "5.0 GB of disk are free and not 40"),
        ({"cuda": 11.8}, "its driver serves CUDA 11.8 (driver 550.54.15) and not 12.4"),
    ],
)
def test_each_lie_is_named(wrong: dict[str, Any], words: str) -> None:
    reason = boot.lie(rented(), GpuNeeds(), {**HONEST, **wrong})
    assert reason is not None
    assert (reason.code, reason.retryable) == ("host.lied", True)
    assert words in reason.message


def test_all_lies_are_named_at_once() -> None:
    machine = {**HONEST, "vram_mb": 8_000, "disk_free_gb": 1.0, "cuda": 11.0}
    reason = boot.lie(rented(), GpuNeeds(), machine)
    assert reason is not None
    assert reason.message.count(";") == 2


@pytest.mark.parametrize(
    ("offered", "found"),
    [
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("A100 SXM4", "NVIDIA A100-SXM4-80GB"),
        ("A100 PCIE", "NVIDIA A100-PCIE-40GB"),
        ("H100 SXM", "NVIDIA H100 80GB HBM3"),
        ("H100 PCIE", "NVIDIA H100 PCIe"),
        ("H100 NVL", "NVIDIA H100 NVL"),
        ("RTX 6000Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("RTX A6000", "NVIDIA RTX A6000"),
        ("Q RTX 8000", "Quadro RTX 8000"),
        ("Tesla V100", "Tesla V100-SXM2-16GB"),
        ("L40S", "NVIDIA L40S"),
        ("RTX 3060 Ti", "NVIDIA GeForce RTX 3060 Ti"),
        ("RTX 4070S Ti", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("GH200 SXM", "NVIDIA GH200 480GB"),
        ("Some New Thing", "NVIDIA B900"),
    ],
)
def test_the_market_and_the_driver_name_the_same_gpu_differently(offered: str, found: str) -> None:
    assert boot.same_gpu(offered, found)


@pytest.mark.parametrize(
    ("offered", "found"),
    [
        ("RTX 4090", "NVIDIA GeForce RTX 3090"),
        ("RTX 3060 Ti", "NVIDIA GeForce RTX 3060"),
        ("RTX 6000Ada", "NVIDIA RTX A6000"),
        ("H100 SXM", "NVIDIA A100-SXM4-80GB"),
        ("A100 SXM4", "Tesla V100-SXM2-16GB"),
        ("RTX 4090", "llvmpipe"),
    ],
)
def test_another_gpu_is_another_gpu(offered: str, found: str) -> None:
    assert not boot.same_gpu(offered, found)
