"""Stands in for a container's first process. Standard library only, run as a script.

    python supervise.py stay|leave GRACE_SECONDS DIRECTORY COMMAND...

Standard input is a pipe whose other end only the sandbox holds: when it ends, for whatever
reason (destroyed, sandbox closed, sandbox killed), every process below this one is killed and
DIRECTORY is removed. A byte `T` on it means stop: SIGTERM to all, SIGKILL after the grace; `K`
means SIGKILL at once; the directory stays. With `leave` the container ends with its command; with
`stay` (Vast's ssh run types, whose first process is their own) it goes on without it.

On Linux this process adopts orphans (a "subreaper"), so nothing below it can get away by leaving
its session or process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_WITHIN_S = 10.0
LINUX = sys.platform == "linux"


def prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command: list[str]) -> int:
    """Start `command` in a session of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)  # noqa: S606 -- a container's command, given as a list
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    os._exit(127)


def descendants() -> list[int]:
    """Process ids of everything below this process; empty where there is no /proc."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if LINUX else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat") as stat:
                parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
    below = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in below and pid not in below}
        if not more:
            return sorted(below - {os.getpid()})
        below |= more


def signal_all(main: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(main, number)
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> tuple[dict[int, int], bool]:
    """Collect children that have ended: process id to exit code; and whether none is left."""
    ended: dict[int, int] = {}
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return ended, False
            ended[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return ended, True


def kill_all(main: int) -> None:
    """Kill until nothing is left below this process, however fast it forks."""
    give_up_at = time.monotonic() + KILL_WITHIN_S
    while not reap()[1] and time.monotonic() < give_up_at:
        signal_all(main, signal.SIGKILL)
        time.sleep(0.005)


def run(stays: bool, grace_s: float, directory: str, command: list[str]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    main, code, kill_at = start(command), 0, None
    while True:
        wait = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        ready, _, _ = select.select([0, wake], [], [], wait)
        told = os.read(wake, 4096) if wake in ready else b""
        order = os.read(0, 1) if 0 in ready else None
        if order == b"" or signal.SIGTERM in told:
            kill_all(main)
            remove(directory)
            return 137
        if order == b"T" and kill_at is None:
            signal_all(main, signal.SIGTERM)
            kill_at = time.monotonic() + grace_s
        if order == b"K":
            kill_all(main)
            return 137
        ended, childless = reap()
        code = ended.get(main, code)
        stopping = kill_at is not None and (childless or time.monotonic() >= kill_at)
        if stopping or (main in ended and not stays):
            kill_all(main)
            return code if code >= 0 else 128 - code


def remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1] == "stay", float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
