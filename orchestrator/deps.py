"""What the HTTP edge is given: everything outside it, as one frozen value."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from gpu_agent import wire
from infra.models import FoundBase
from infra.provider import Provider
from infra.settings import Settings
from state.job import JobRequest
from state.store import Store


class Upload(Protocol):
    """A PUT to make, and the headers that must come with it."""

    @property
    def url(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


class Storage(Protocol):
    """What the edge asks of the object store: URLs and sizes, never bytes."""

    def presign_put(self, key: str, *, bytes: int, expires_s: int) -> Upload:
        """One PUT of exactly `bytes`."""

    def presign_get(self, key: str, *, expires_s: int) -> str:
        """A URL for GETs of `key`."""

    def head(self, key: str) -> int | None:
        """Its size in bytes; None when it is not there."""


class Bundle(Protocol):
    """The agent as one file."""

    @property
    def bytes(self) -> bytes: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Deps:
    """Handed to `create_app` by the composition root.

    Attributes:
        clock: aware UTC now.
        wake: `wake("allocate", job_id)` rings a doorbell; called after commit only, its failure
            is logged and costs nothing but latency.
        resolve_base: the short-lived downloads of a job's base model: its own file, then parts.
        ready_checks: by part; None is well, a text says what is wrong.
        pause: waits so many seconds; long polls use it.
        market: opens the door to the GPU market; raises SettingsError where none is set.
        look_up_base: what a link to a base model leads to; raises BaseError.
        metrics_dir: where the processes of one server share their counters; None for one process.
    """

    store: Store
    storage: Storage
    clock: Callable[[], datetime]
    wake: Callable[[str, str], None] = field(repr=False)
    bundle: Bundle = field(repr=False)
    resolve_base: Callable[[JobRequest], Sequence[wire.Download]]
    settings: Settings
    ready_checks: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)
    pause: Callable[[float], None] = time.sleep
    market: Callable[[], Provider] | None = None
    look_up_base: Callable[[str], FoundBase] | None = None
    metrics_dir: Path | None = None
