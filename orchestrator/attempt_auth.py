"""Is this request signed by the attempt that it speaks for?"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime

from gpu_agent import wire
from orchestrator.api.ids import plausible
from state.errors import NotFound
from state.store import Store

#: Secrets kept per process; the oldest used goes first.
CACHED = 20_000


class AttemptAuth:
    """Verifies what agents send.

    The database is asked once per attempt and process, and again when a signature does not match:
    an attempt that lost its first machine gets another secret. That an attempt is over is not
    decided here: its agent must still be told to stop.
    """

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store, self._clock = store, clock
        self._secrets: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._guard = threading.Lock()

    def verify(self, job: str, attempt: int, body: bytes, headers: Mapping[str, str]) -> str:
        """The `webhook-id` of a body signed by `attempt` of `job`.

        Raises:
            wire.SignatureError: anything else; an unknown attempt is told from a bad signature
                by nobody outside.
        """
        return self.verify_known(job, attempt, body, headers) or self._verify_asked(
            job, attempt, body, headers
        )

    def verify_known(
        self, job: str, attempt: int, body: bytes, headers: Mapping[str, str]
    ) -> str | None:
        """As `verify`, without asking anybody; None when only the database can tell."""
        known = self._known((job, attempt))
        if known is None:
            return None
        try:
            return wire.verify(body, headers, secrets=[known], now=self._clock().timestamp())
        except wire.SignatureError:
            return None  # perhaps the secret is another one by now

    def _verify_asked(self, job: str, attempt: int, body: bytes, headers: Mapping[str, str]) -> str:
        fresh = self._asked((job, attempt))
        if fresh is None:
            raise wire.SignatureError("no signature matches")
        return wire.verify(body, headers, secrets=[fresh], now=self._clock().timestamp())

    def _known(self, key: tuple[str, int]) -> str | None:
        with self._guard:
            secret = self._secrets.get(key)
            if secret is not None:
                self._secrets.move_to_end(key)
            return secret

    def _asked(self, key: tuple[str, int]) -> str | None:
        if not plausible(key[0]) or key[1] >= 2**31:
            return None
        try:
            with self._store.transaction() as tx:
                secret = tx.attempt(*key).secret
        except NotFound:
            return None
        if secret is None:  # its agent has not said hello
            return None
        with self._guard:
            self._secrets[key] = secret.reveal()
            while len(self._secrets) > CACHED:
                self._secrets.popitem(last=False)
        return secret.reveal()
