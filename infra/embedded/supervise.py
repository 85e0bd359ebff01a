"""The process between Stoker and the servers it runs: nothing may outlive it, nor it Stoker.

Run as a file, standard library only (`python -P supervise.py`), so that it is small and cannot
fail on anything it imports. It reads one JSON object per line on stdin and writes one per line
on stdout:

    {"start": {"name", "argv", "log", "cwd", "env", "stop", "user", "once"}}
        -> {"name", "event": "started", "pid"}, later {"name", "event": "ended", "code"}
    {"stop": name}  ends one server

The end of stdin is the order to stop everything, and it is given by the kernel however Stoker
died. `stop` names the signal by which a server ends in good order; after `PATIENCE_S` comes
SIGKILL. Against a SIGKILL of this process itself the servers carry a parent-death signal (Linux).
A server that ends unasked is started again, after a second and until that succeeds, and whatever it
left of its process group is killed first.

Some servers refuse to be root. `user` then names the account to become; where that account may
not enter the directories on the way to the files (a home directory, say), it keeps the one
capability that lets it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

PATIENCE_S = 10.0
RESTART_AFTER_S = 1.0

_PR_SET_PDEATHSIG, _PR_SET_SECUREBITS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 28, 47, 2
#: Keeps capabilities over a change of user; and access(2), by which initdb looks for `postgres`,
#: counts them for others than root only with it.
_NO_SETUID_FIXUP = 1 << 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _become(libc: ctypes.CDLL, user: str) -> None:
    """Give up root for `user`, keeping the right to pass closed directories where there is one."""
    account = pwd.getpwnam(user)
    libc.prctl(_PR_SET_SECUREBITS, _NO_SETUID_FIXUP, 0, 0, 0)
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    bits = 1 << _CAP_DAC_OVERRIDE
    data = (_CapData * 2)(_CapData(bits, bits, bits), _CapData(0, 0, 0))
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.byref(header), data) == 0:
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def _before_exec(user: str | None, death_signal: int, parent: int) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if user:
        _become(libc, user)
    # After the change of user: that clears it.
    libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Child:
    """A server and the process that is it now."""

    spec: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    again_at: float | None = None
    #: It could be started before.
    ran: bool = False

    @property
    def stop_signal(self) -> int:
        return int(getattr(signal, self.spec.get("stop") or "SIGTERM"))


@dataclass
class Supervisor:
    children: dict[str, Child] = field(default_factory=dict)

    def obey(self, order: dict[str, Any]) -> None:
        if "start" in order:
            child = Child(order["start"])
            self.children[child.spec["name"]] = child
            self.launch(child)
        elif "stop" in order and order["stop"] in self.children:
            self.stop([self.children.pop(order["stop"])])

    def launch(self, child: Child) -> None:
        spec, parent = child.spec, os.getpid()
        child.again_at = None
        try:
            with open(spec["log"], "ab") as log:
                child.process = subprocess.Popen(
                    spec["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=spec.get("cwd"),
                    env={**os.environ, **spec.get("env", {})},
                    start_new_session=True,
                    preexec_fn=lambda: _before_exec(spec.get("user"), child.stop_signal, parent),
                )
        except (OSError, subprocess.SubprocessError) as exc:
            say(name=spec["name"], event="ended", code=127, error=str(exc))
            if child.ran:  # it will be possible again: a disk or a process table was full
                child.again_at = time.monotonic() + RESTART_AFTER_S
            else:
                self.children.pop(spec["name"], None)
            return
        child.ran = True
        say(name=spec["name"], event="started", pid=child.process.pid)

    def look(self) -> None:
        """Tell of processes that ended, and start again those that should be running."""
        now = time.monotonic()
        for name, child in list(self.children.items()):
            if child.process is not None and child.process.poll() is not None:
                say(name=name, event="ended", code=child.process.returncode)
                _end_group(child.process.pid)
                child.process = None
                if child.spec.get("once"):
                    del self.children[name]
                else:
                    child.again_at = now + RESTART_AFTER_S
            elif child.again_at is not None and now >= child.again_at:
                self.launch(child)

    def stop(self, children: list[Child]) -> None:
        """End `children` in good order; those that do not end in time, with all their own, hard."""
        running = [(child, child.process) for child in children if child.process is not None]
        for child, process in running:
            process.send_signal(child.stop_signal)
        deadline = time.monotonic() + PATIENCE_S
        for child, process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end_group(process.pid)
                process.wait()
            _end_group(process.pid)
            say(name=child.spec["name"], event="ended", code=process.returncode)


def _end_group(leader: int) -> None:
    """Kill what a process leaves behind: a web server's own workers would go on serving beside
    those of the next one, with the old code and the old connections."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def say(**line: Any) -> None:
    """Tell Stoker. It may be dead already; that is no news."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(line).encode() + b"\n")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    asked = {"stop": False}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.update(stop=True))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    supervisor, buffer = Supervisor(), b""
    while not asked["stop"]:
        ready, _, _ = select.select([0, woken], [], [], RESTART_AFTER_S)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        if 0 in ready:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                supervisor.obey(json.loads(line))
        supervisor.look()
    supervisor.stop(list(supervisor.children.values()))


if __name__ == "__main__":
    main()
