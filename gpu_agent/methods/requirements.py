"""What a trainer imports: there already, or installed without touching the image's torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import IO

from gpu_agent.halt import Fault, Halt

log = logging.getLogger(__name__)

#: Never changed once the image has them: their builds belong to its CUDA.
KEPT = ("torch", "torchvision", "torchaudio", "triton")

_CLAUSE = re.compile(r"(>=|==|<)\s*([0-9.]+)")


def installed(name: str) -> str | None:
    """The version of a package in this Python, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(
    requirements: Sequence[str], version_of: Callable[[str], str | None] = installed
) -> list[str]:
    """Those that this Python does not satisfy."""
    return [item for item in requirements if not _satisfied(item, version_of)]


def _satisfied(requirement: str, version_of: Callable[[str], str | None]) -> bool:
    name = re.split(r"[<>=]", requirement, maxsplit=1)[0].strip()
    version = version_of(name)
    if version is None:
        return False
    have = _release(version)
    for sign, text in _CLAUSE.findall(requirement):
        want = _release(text)
        width = max(len(have), len(want))
        mine, other = (part + (0,) * (width - len(part)) for part in (have, want))
        if not {">=": mine >= other, "==": mine == other, "<": mine < other}[sign]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0)"""
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def constraints(version_of: Callable[[str], str | None] = installed) -> str:
    """The versions that were tried, and the image's own builds as they are."""
    tried = resources.files("gpu_agent").joinpath("constraints.txt").read_text()
    kept = [f"{name}=={version}" for name in KEPT if (version := version_of(name))]
    return "\n".join([tried, *kept, ""])


def install(
    requirements: Sequence[str],
    *,
    work: Path,
    halt: Halt,
    on_text: Callable[[str], None],
    moved: Callable[[int], None],
    python: Sequence[str] = (sys.executable,),
    version_of: Callable[[str], str | None] = installed,
) -> list[str]:
    """Install what is missing; what that was. `moved` is told of each line and of whatever pip
    computes: it unpacks large packages for minutes without a word.

    Raises:
        Fault: `install.failed` or `host.disk_full`.
        Halted: the work was told to end; pip was ended with it.
    """
    wanted = missing(requirements, version_of)
    if not wanted:
        return []
    log.info("installing %s", ", ".join(wanted))
    pinned = work / "constraints.txt"
    pinned.write_text(constraints(version_of))
    argv = [*python, "-m", "pip", "install", "-c", str(pinned), *wanted]
    for _ in range(2):
        code, last = _run(argv, halt, on_text, moved)
        if code == 0:
            importlib.invalidate_caches()
            return wanted
    if "no space left on device" in last.lower():
        raise Fault("host.disk_full", f"pip: {last}", retryable=True)
    raise Fault("install.failed", f"pip ended with {code}: {last}", retryable=True)


def _run(
    argv: Sequence[str], halt: Halt, on_text: Callable[[str], None], moved: Callable[[int], None]
) -> tuple[int, str]:
    """Exit code and last line."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            **os.environ,
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",  # the machine is ours and lives for one job
            "PIP_PROGRESS_BAR": "off",
        },
    )
    last = ""

    def read(stream: IO[str]) -> None:
        nonlocal last
        with stream:
            for line in stream:
                if line.strip():
                    last = line.strip()[:500]
                    moved(1)
                    on_text(f"pip: {last}")

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    ticks = 0
    while process.poll() is None:
        ticks, before = _cpu_ticks(process.pid), ticks
        if ticks > before:
            moved(1)
        if halt.wait(0.1):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            halt.check()
    reader.join(1.0)
    return process.returncode, last


def _cpu_ticks(pid: int) -> int:
    """What a process has computed so far, in the kernel's ticks; 0 where that is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime and stime, of proc(5)
    except (OSError, IndexError, ValueError):
        return 0
