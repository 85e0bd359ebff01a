"""What this machine is."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from gpu_agent.halt import Fault, Halt
from gpu_agent.methods.requirements import installed

log = logging.getLogger(__name__)

SMI = "nvidia-smi"
SANDBOX_DISK = "STOKER_SANDBOX_DISK_GB"
ABOUT = "name,memory.total,driver_version"
NOW = "utilization.gpu,memory.used,temperature.gpu"
#: How long the first look may take, and how long the GPU has before it counts as failed: without
#: its persistence daemon a driver takes many seconds to wake (seconds).
GLANCE_S = 10.0
ANSWER_S = 60.0
#: Between looks at what it does (seconds).
LOOK_S = 60.0


def machine(home: Path, smi: str = SMI, *, seconds: float = GLANCE_S) -> dict[str, Any]:
    """What hello says, so that a host that is not what it was rented as is found out before the
    big downloads: gpu_name, gpus, vram_mb (of one), driver, cuda, disk_free_gb, instance.

    Never raises, and never waits longer than `seconds` for one answer; what is not known is left
    out. Without a GPU `gpus` is 0.
    """
    about: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        about["disk_free_gb"] = _disk_free_gb(home)
    if number := os.environ.get("CONTAINER_ID"):
        about["instance"] = number
    program = shutil.which(smi)
    if program is None:
        return {**about, "gpus": 0}
    try:
        rows = _query(program, ABOUT, seconds)
    except subprocess.TimeoutExpired:
        return about
    except (subprocess.SubprocessError, OSError):
        return {**about, "gpus": 0}
    about["gpus"] = len(rows)
    if rows and len(rows[0]) == 3:
        name, memory, driver = rows[0]
        about |= {"gpu_name": name, "driver": driver}
        if memory.isascii() and memory.isdigit():
            about["vram_mb"] = int(memory)
    if cuda := _cuda(program, seconds):
        about["cuda"] = cuda
    return about


def probe(home: Path, smi: str = SMI) -> dict[str, Any]:
    """What `gpu.ready` says: all of `machine`, and device (`cuda` or `cpu`), gpu, vram_mib, cpus,
    torch, python.

    Raises:
        Fault: `gpu.failed` when there is a driver but its GPU does not answer.
    """
    about = {
        "device": "cpu",
        "gpu": None,
        "cpus": os.cpu_count(),
        "torch": installed("torch"),
        "python": platform.python_version(),
        **machine(home, smi, seconds=ANSWER_S),
    }
    if shutil.which(smi) is None:
        return about
    if not about.get("gpus") or "vram_mb" not in about:
        raise Fault("gpu.failed", f"{smi} names no working GPU", retryable=True)
    return {**about, "device": "cuda", "gpu": about["gpu_name"], "vram_mib": about["vram_mb"]}


class Gauge:
    """Looks at the first GPU once a minute, on a thread of its own until the work ends."""

    def __init__(self, halt: Halt, smi: str = SMI) -> None:
        self._halt, self._smi = halt, smi
        #: util (%), mem_mb, temp (°C), as last seen; None when nobody could say.
        self.read: dict[str, int | None] | None = None

    def start(self) -> None:
        if program := shutil.which(self._smi):
            threading.Thread(target=self._run, args=(program,), name="gauge", daemon=True).start()

    def _run(self, program: str) -> None:
        while not self._halt.reason:
            try:
                values = _query(program, NOW, GLANCE_S)[0]
                self.read = dict(zip(("util", "mem_mb", "temp"), map(_whole, values), strict=True))
            except (subprocess.SubprocessError, OSError, IndexError, ValueError) as error:
                # whether anything goes on here all the same, `moved` says
                self.read = None
                log.warning("the GPU does not answer: %s", type(error).__name__)
            self._halt.wait(LOOK_S)


def _query(program: str, fields: str, seconds: float) -> list[list[str]]:
    """One row per GPU. Raises: SubprocessError, OSError."""
    asked = (program, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    lines = _said(asked, seconds).splitlines()
    return [[part.strip() for part in line.split(",")] for line in lines if "," in line]


def _cuda(program: str, seconds: float) -> str | None:
    """The newest CUDA that the driver can serve, e.g. `12.8`; only the table tells it."""
    try:
        found = re.search(
            r"CUDA[A-Za-z ]* Version\s*: *([0-9]+\.[0-9]+)", _said((program,), seconds)
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return found[1] if found else None


def _said(argv: tuple[str, ...], seconds: float) -> str:
    return subprocess.run(
        argv, capture_output=True, text=True, errors="replace", timeout=seconds, check=True
    ).stdout


def _whole(text: str) -> int | None:
    """`[N/A]` is what some GPUs answer."""
    return int(text) if text.isascii() and text.isdigit() else None


def _disk_free_gb(home: Path) -> float:
    """GB (10^9 bytes) that are free where our files go; in the sandbox, what it says: the disk
    of whoever runs it is not the one that was rented."""
    if os.environ.get("STOKER_SANDBOX") == "1" and (told := os.environ.get(SANDBOX_DISK)):
        return float(told)
    return round(shutil.disk_usage(home).free / 1e9, 1)
