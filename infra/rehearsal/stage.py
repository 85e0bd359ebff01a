"""Where machines of rehearsals are played: each a thread of the process that rented it.

When that process ends, its machines end with it; the list says so, and their jobs go on elsewhere
by the usual rules.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

import requests
import structlog

from infra.rehearsal.machine import Answer, Cue, Machine
from infra.rehearsal.market import Market
from state.errors import ProviderError, StoreUnavailable
from state.store import Store

#: Connecting, and waiting for each part of an answer (seconds).
TIMEOUT = (5.0, 30.0)
#: So often a machine looks whether it still exists.
LOOK_S = 3.0
_log = structlog.get_logger()


class HttpLine:
    """See `infra.rehearsal.machine.Line`. For one thread."""

    def __init__(self) -> None:
        self._session = requests.Session()
        self._session.trust_env = False

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        return self._ask("POST", url, body, headers)

    def get(self, url: str) -> Answer:
        return self._ask("GET", url, None, {})

    def put(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        return self._ask("PUT", url, body, headers)

    def _ask(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        try:
            answer = self._session.request(
                method,
                url,
                data=body,
                headers=dict(headers),
                timeout=TIMEOUT,
                allow_redirects=False,
            )
            return Answer(answer.status_code, answer.content)
        except requests.RequestException:
            return Answer(0)


class Stage:
    """Starts machines. `market` is what `Market.play` needs this for, and the other way round."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self.market = Market(store=store, clock=clock, play=self._start)
        self._clock = clock

    def _start(self, cue: Cue) -> None:
        name = f"rehearsal {cue.instance}"
        threading.Thread(target=self._run, args=(cue,), name=name, daemon=True).start()

    def _run(self, cue: Cue) -> None:
        machine = Machine(cue, HttpLine(), self._clock)
        looked = time.monotonic()
        try:
            for pretended in machine.play():
                until = time.monotonic() + pretended / cue.part.time_scale
                while (left := until - time.monotonic()) > 0:
                    time.sleep(min(left, max(0.0, looked + LOOK_S - time.monotonic())))
                    if time.monotonic() - looked >= LOOK_S:
                        looked = time.monotonic()
                        if not self._is_wanted(cue.instance):
                            return
            self.market.destroy(cue.instance)  # as the agent of a real machine does
        except (ProviderError, StoreUnavailable) as error:
            _log.warning("a rehearsal's machine was not destroyed", error=str(error))
        except Exception:  # noqa: BLE001 -- whatever it is, the silence tells its job
            _log.exception("a rehearsal's machine failed by itself", label=cue.label)

    def _is_wanted(self, instance: str) -> bool:
        try:
            return self.market.is_wanted(instance)
        except (ProviderError, StoreUnavailable):
            return True  # nobody knows; it is asked again
