"""The dead man's switch: this machine gives itself back when nobody else may be left to do it.

Two limits: the lease's end, absolute, and silence: so long without any answer from the server.
The same hands also end the instance after a job that is over. Beside this process stands the
start script: it ends the instance when the agent is gone, or let its own time pass (`Promise`).
A second line only: a hostile or dead host can defeat it, and then the server's sweep is the first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests

from gpu_agent.clock import Clock

log = logging.getLogger(__name__)

TIMEOUT = (10.0, 30.0)
#: Waits between tries to end the instance (seconds); the last one repeats for ever.
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
#: Seconds between looks at the clock.
TICK = 1.0
#: Seconds that the start script waits longer than we do.
HEAD_START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Instance:
    """This machine as its market knows it, and the key that can end this one instance alone."""

    id: str
    api_key: str = field(repr=False)
    market_url: str


class Promise:
    """Tells the start script how many seconds this machine may still take.

    It believes the last promise for so long; an agent that is frozen makes no more. The bytes are
    written over the old ones: a full disk has room for them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0

    def renew(self, seconds: float) -> None:
        self._count += 1
        line = f"{self._count:<9} {max(0, round(seconds)):<9}\n".encode()
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, line, 0)
            finally:
                os.close(descriptor)


class DeadMan:
    """Watches two limits on a thread of its own, and ends the instance.

    Args:
        instance: None where there is no market (a trial by hand), or its key is missing: then
            nothing is ended.
        promise: None where no start script watches.
        on_end: called once when a limit was passed, with `lease` or `silence`, so that the
            trainer is stopped; the instance is ended whether or not that works.
    """

    def __init__(
        self,
        instance: Instance | None,
        *,
        clock: Clock,
        on_end: Callable[[str], object],
        promise: Promise | None = None,
        silence_limit_s: float = 900.0,
        sleep: Callable[[float], None] = time.sleep,
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self._instance, self._clock, self._on_end = instance, clock, on_end
        self._promise, self._sleep, self._delays = promise, sleep, delays
        self._lease_ends_at = float("inf")
        self._silence_limit_s = silence_limit_s
        self._heard_at = clock.monotonic()
        self._ending = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="deadman", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def limit(self, *, lease_ends_at: float, silence_limit_s: float) -> None:
        """Take over the limits of the job's spec."""
        self._lease_ends_at, self._silence_limit_s = lease_ends_at, silence_limit_s

    def heard(self) -> None:
        """The server answered."""
        self._heard_at = self._clock.monotonic()

    def left(self) -> dict[str, float]:
        """Seconds to each limit, `lease` and `silence`."""
        silent = self._clock.monotonic() - self._heard_at
        return {
            "lease": self._lease_ends_at - self._clock.now(),
            "silence": self._silence_limit_s - silent,
        }

    def due(self) -> str | None:
        """The limit that was passed: `lease`, `silence` or none."""
        return next((limit for limit, seconds in self.left().items() if seconds <= 0), None)

    def destroy(self) -> bool:
        """End this instance, trying until it works; False when there is none to end."""
        with self._ending:
            if self._instance is None:
                log.warning("this machine cannot be given back: its number or key is not known")
                return False
            tries = 0
            while not self._ended:
                self._ended = self._destroy_once(self._instance)
                if not self._ended:
                    self._sleep(self._delays[min(tries, len(self._delays) - 1)])
                    tries += 1
            return True

    def _run(self) -> None:
        while not self._ended:
            if self._promise is not None:
                self._promise.renew(min(self.left().values()) + HEAD_START_S)
            if reason := self.due():
                log.error("this machine ends itself: %s", reason)
                self._on_end(reason)
                self.destroy()
                return
            self._sleep(TICK)

    def _destroy_once(self, instance: Instance) -> bool:
        status, said_no = self._call("DELETE", instance, {})
        if status in (200, 202, 204, 404, 410) and not (said_no and status != 404):
            log.info("the market took this instance back")
            return True
        log.warning("destroying this instance: answered with %d", status)
        if status not in (401, 403):
            return False
        # this key may not destroy: at least stop the meter of the GPU, the server does the rest
        status, said_no = self._call("PUT", instance, {"state": "stopped"})
        log.warning("stopping this instance instead: answered with %d", status)
        return 200 <= status < 300 and not said_no

    def _call(self, method: str, instance: Instance, body: dict[str, str]) -> tuple[int, bool]:
        """Status (0 without an answer), and whether the answer itself says that it failed."""
        try:
            with requests.Session() as session:
                session.trust_env = False
                answer = session.request(
                    method,
                    f"{instance.market_url.rstrip('/')}/api/v0/instances/{instance.id}/",
                    json=body,
                    headers={"authorization": f"Bearer {instance.api_key}"},
                    timeout=TIMEOUT,
                    allow_redirects=False,
                )
        except requests.RequestException as error:
            log.warning("%s instance: %s", method, type(error).__name__)
            return 0, False
        try:
            read = answer.json()
        except ValueError:
            return (0, False) if answer.status_code == 200 else (answer.status_code, False)
        return answer.status_code, isinstance(read, dict) and read.get("success") is False
