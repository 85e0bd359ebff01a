"""A trainer's process: its own group, orders in, lines out, and it never outlives the agent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpu_agent.methods import Launch, Method

log = logging.getLogger(__name__)

#: A longer line is cut into pieces (characters); points of a series need some room.
LONGEST_LINE = 1 << 20
#: Lines that may wait to be read; a trainer that babbles is held up, not the agent's memory.
BACKLOG = 256
#: What is kept of a line for the log (characters).
LOGGED = 2_000

# Asks Linux to kill this process when the agent's thread that started it dies, however it dies,
# then becomes the trainer. Not a preexec_fn: between fork and exec of a process with threads
# only async-signal-safe calls are allowed, and Python code is none.
_LEASHED = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Trainer:
    """A running trainer. Start it from a thread that lives as long as it is to live.

    Args:
        on_text: called with every line that is no event, and with every line on stderr.
    """

    def __init__(
        self, method: Method, launch: Launch, *, cwd: Path, on_text: Callable[[str], None]
    ) -> None:
        self._method, self._on_text = method, on_text
        self._events: queue.Queue[dict[str, Any]] = queue.Queue(BACKLOG)
        self._process = subprocess.Popen(
            _leash(launch.argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, **launch.env},
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=read, args=(stream,), daemon=True)
            for read, stream in (
                (self._read_stdout, self._process.stdout),
                (self._read_stderr, self._process.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None when there was none for so long."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    @property
    def exit_code(self) -> int | None:
        """Set once the process ended and all that it said was read; negative: by that signal."""
        code = self._process.poll()
        if code is None or not self._events.empty():
            return None
        # a grandchild may hold the pipes open for ever: what it says is not waited for
        for reader in self._readers:
            reader.join(1.0)
        return code if self._events.empty() else None

    def order(self, name: str) -> None:
        """Pass an order on; a trainer that is gone does not get it."""
        stdin = self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            if stdin is not None:
                stdin.write(json.dumps({"order": name}).encode() + b"\n")
                stdin.flush()

    def stop(self, grace_s: float) -> None:
        """End the whole group: SIGTERM, and SIGKILL when it does not go within `grace_s`."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and time.monotonic() < deadline:
            self.next(0.05)  # a full queue would hold up its last words
        self._signal(signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read_stdout(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            event = self._method.read(line)
            if event is None:
                self._on_text(line[:LOGGED])
            else:
                self._events.put(event)

    def _read_stderr(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            self._on_text(line[:LOGGED])


def _leash(argv: Any) -> list[str]:
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-c", _LEASHED, str(os.getpid()), *argv]


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines without their end; a carriage return, as progress bars use it, ends one too."""
    with stream:
        while piece := stream.readline(LONGEST_LINE):
            for line in piece.decode("utf-8", "replace").replace("\r", "\n").split("\n"):
                if line.strip():
                    yield line
