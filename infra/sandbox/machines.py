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
from infra.sandbox.hosts import Truth

#: A supervisor kills and tidies within moments; it is given this long (seconds) before it is
#: killed itself.
END_WITHIN_S = 20.0
STOP_GRACE_S = 10.0

PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
#: Prints what `truth` says, for as much of nvidia-smi's query language as programs use.
NVIDIA_SMI = """\
#!/bin/sh
fields= header=1 units=1
for argument; do
  case "$argument" in
    --query-gpu=*) fields=${{argument#*=}} ;;
    --format=*)
      case "$argument" in *noheader*) header= ;; esac
      case "$argument" in *nounits*) units= ;; esac ;;
  esac
done
if [ -z "$fields" ]; then
  i=0
  while [ $i -lt {count} ]; do
    echo "GPU $i: {name} (UUID: GPU-00000000-0000-0000-0000-00000000000$i)"
    i=$((i + 1))
  done
  exit 0
fi
[ -z "$header" ] || echo "$fields" | sed 's/,/, /g'
i=0
while [ $i -lt {count} ]; do
  line=
  for field in $(echo "$fields" | tr ',' ' '); do
    unit=
    case "$field" in
      name|gpu_name) value='{name}' ;;
      memory.total) value={memory} unit=' MiB' ;;
      memory.free) value={memory} unit=' MiB' ;;
      memory.used) value=0 unit=' MiB' ;;
      driver_version) value={driver} ;;
      compute_cap) value={capability} ;;
      count) value={count} ;;
      index) value=$i ;;
      uuid|gpu_uuid) value=GPU-00000000-0000-0000-0000-00000000000$i ;;
      utilization.gpu) value=0 unit=' %' ;;
      temperature.gpu) value=41 ;;
      *) echo "Field \\"$field\\" is not a valid field to query."; exit 2 ;;
    esac
    [ -n "$units" ] || unit=
    line="$line${{line:+, }}$value$unit"
  done
  echo "$line"
  i=$((i + 1))
done
"""
#: Python's own hook at its start: what programs in Python see of a host that is not as offered.
SKEWED_CLOCK = """\
import time
_ahead = {ahead!r}
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _ahead
time.time_ns = lambda: _time_ns() + int(_ahead * 1_000_000_000)
"""
SMALL_DISK = """\
import os
_statvfs = os.statvfs
def _small(path):
    real = _statvfs(path)
    most = int({disk_gb!r} * 1_000_000_000) // real.f_frsize
    blocks = (min(blocks, most) for blocks in (real.f_blocks, real.f_bfree, real.f_bavail))
    return os.statvfs_result((real.f_bsize, real.f_frsize, *blocks, *real[5:10]))
os.statvfs = _small
"""


class Machines(Protocol):
    """What the market needs of whatever runs its machines."""

    def start(
        self,
        name: str,
        *,
        env: Mapping[str, str],
        onstart: str,
        args: Sequence[str],
        stays: bool,
        truth: Truth,
    ) -> None:
        """Run `args`, or else `onstart` by bash; `stays` says that the container outlives it, and
        `truth` what it finds there."""

    def exit_code(self, name: str) -> int | None:
        """None while the container runs."""

    def stop(self, name: str) -> None:
        """SIGTERM, then SIGKILL; the directory stays. Does not wait."""

    def kill(self, name: str) -> None:
        """SIGKILL; the directory stays. Does not wait."""

    def destroy(self, name: str) -> None:
        """Kill everything, remove the directory; returns when both are done."""

    def log(self, name: str) -> str:
        """What the container printed so far."""

    def directory(self, name: str) -> Path:
        """The container's file system, as far as it has one."""


class LocalMachines:
    """Machines below `root`. All of them die with this process, also when it gets SIGKILL.

    Args:
        grace_s: real seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self, root: Path, *, keep_logs: bool = False, grace_s: float = STOP_GRACE_S
    ) -> None:
        self._root, self._keep_logs, self._grace_s = root, keep_logs, grace_s
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        shutil.rmtree(root / "machines", ignore_errors=True)
        for part in ("machines", "logs"):
            (root / part).mkdir(parents=True, exist_ok=True)

    def directory(self, name: str) -> Path:
        return self._root / "machines" / name

    def start(
        self,
        name: str,
        *,
        env: Mapping[str, str],
        onstart: str,
        args: Sequence[str],
        stays: bool,
        truth: Truth,
    ) -> None:
        self._end(name)
        home = self.directory(name)
        (home / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        script = home / "onstart.sh"
        script.write_text(onstart)
        command = list(args) or ["bash", str(script)]
        mode = "stay" if stays else "leave"
        supervisor = (sys.executable, "-I", "-S", supervise.__file__)
        with self._log_path(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*supervisor, mode, str(self._grace_s), str(home), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=home,
                env={**_environment(home, env), **_disguise(home, truth)},
                start_new_session=True,
            )

    def exit_code(self, name: str) -> int | None:
        process = self._running.get(name)
        return 0 if process is None else process.poll()

    def stop(self, name: str) -> None:
        self._order(name, b"T")

    def kill(self, name: str) -> None:
        self._order(name, b"K")

    def destroy(self, name: str) -> None:
        self._end(name)
        shutil.rmtree(self.directory(name), ignore_errors=True)
        if not self._keep_logs:
            self._log_path(name).unlink(missing_ok=True)

    def log(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._log_path(name).read_text(errors="replace")
        return ""

    def _order(self, name: str, order: bytes) -> None:
        process = self._running.get(name)
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(order)
                process.stdin.flush()

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
    # One core stays with whoever rents: a machine of our own is no other machine.
    threads = max(1, (os.cpu_count() or 2) - 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        **env,
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
    }


def _disguise(home: Path, truth: Truth) -> dict[str, str]:
    """Make the machine look like what it is to be; the environment that this takes."""
    programs, hooks = home / ".sandbox" / "bin", home / ".sandbox" / "python"
    programs.mkdir(parents=True, exist_ok=True)
    smi = programs / "nvidia-smi"
    smi.write_text(
        NVIDIA_SMI.format(
            name=truth.driver_name.replace("'", ""),
            memory=truth.gpu_ram,
            driver=truth.driver_version,
            capability=f"{truth.compute_cap / 100:.1f}",
            count=truth.num_gpus,
        )
    )
    smi.chmod(0o755)
    env = {"PATH": f"{programs}{os.pathsep}{PATH}"}
    hook = SKEWED_CLOCK.format(ahead=truth.clock_skew_s) if truth.clock_skew_s else ""
    hook += SMALL_DISK.format(disk_gb=truth.disk_gb) if truth.lies_of_disk else ""
    if hook:
        hooks.mkdir(parents=True, exist_ok=True)
        (hooks / "sitecustomize.py").write_text(hook)
        env["PYTHONPATH"] = str(hooks)
    return env
