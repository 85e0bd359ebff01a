"""The sandbox's machines: local processes, each with a directory and an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from infra.sandbox import supervise

#: A supervisor kills and tidies within moments; it is given this long (seconds) before it is
#: killed itself.
END_WITHIN_S = 20.0


class Machines(Protocol):
    """What the market needs of whatever runs its machines."""

    def start(
        self, name: str, *, env: Mapping[str, str], onstart: str, args: Sequence[str], stays: bool
    ) -> None:
        """Run `args`, or else `onstart` by bash; `stays` says that the container outlives it."""

    def exit_code(self, name: str) -> int | None:
        """None while the container runs."""

    def stop(self, name: str) -> None:
        """SIGTERM, then SIGKILL; the directory stays. Does not wait."""

    def destroy(self, name: str) -> None:
        """Kill everything, remove the directory; returns when both are done."""

    def log(self, name: str) -> str:
        """What the container printed so far."""

    def directory(self, name: str) -> Path:
        """The container's file system, as far as it has one."""


class LocalMachines:
    """Machines below `root`. All of them die with this process, also when it gets SIGKILL."""

    def __init__(self, root: Path, *, keep_logs: bool = False) -> None:
        self._root, self._keep_logs = root, keep_logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        shutil.rmtree(root / "machines", ignore_errors=True)
        for part in ("machines", "logs"):
            (root / part).mkdir(parents=True, exist_ok=True)

    def directory(self, name: str) -> Path:
        return self._root / "machines" / name

    def start(
        self, name: str, *, env: Mapping[str, str], onstart: str, args: Sequence[str], stays: bool
    ) -> None:
        self._end(name)
        home = self.directory(name)
        (home / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        script = home / "onstart.sh"
        script.write_text(onstart)
        command = list(args) or ["bash", str(script)]
        mode = "stay" if stays else "leave"
        with self._log_path(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-I", "-S", supervise.__file__, mode, str(home), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=home,
                env=_environment(home, env),
                start_new_session=True,
            )

    def exit_code(self, name: str) -> int | None:
        process = self._running.get(name)
        return 0 if process is None else process.poll()

    def stop(self, name: str) -> None:
        process = self._running.get(name)
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(b"T")
                process.stdin.flush()

    def destroy(self, name: str) -> None:
        self._end(name)
        shutil.rmtree(self.directory(name), ignore_errors=True)
        if not self._keep_logs:
            self._log_path(name).unlink(missing_ok=True)

    def log(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._log_path(name).read_text(errors="replace")
        return ""

    def _log_path(self, name: str) -> Path:
        return self._root / "logs" / f"{name}.log"

    def _end(self, name: str) -> None:
        process = self._running.pop(name, None)
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(home: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the sandbox's own environment, but the Python that has the training packages:
    it stands in for the stock CUDA PyTorch image."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    # One core stays with whoever rents: a machine of our own is no other machine.
    threads = max(1, (os.cpu_count() or 2) - 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        **env,
        "PATH": path,
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
    }
