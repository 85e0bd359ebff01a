"""The composition root: where settings become stores, adapters and clocks.

Nothing is built before it is used, and nothing at import time.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, cached_property

from gpu_agent import wire
from infra.agent_bundle import Bundle, build_bundle, onstart_script
from infra.crypto import SecretBox
from infra.models import BaseResolver
from infra.provider import Provider
from infra.rehearsal import Market, Stage
from infra.settings import Settings, SettingsError
from infra.storage import Storage
from infra.store import SqlStore
from infra.vast import VastProvider
from state.job import JobRequest
from state.store import Store

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Services:
    """Everything that a process of this installation may need, made once, at first use."""

    def __init__(self, settings: Settings, clock: Clock = utc_now) -> None:
        self.settings, self.clock = settings, clock

    @cached_property
    def store(self) -> Store:
        url, keys = self.settings.database_url, self.settings.secret_keys
        if not url.reveal():
            raise SettingsError("DATABASE_URL is not set; `stoker up` starts a PostgreSQL itself")
        if not keys:
            raise SettingsError("STOKER_SECRET_KEYS is not set; `stoker keys secret` makes one")
        return SqlStore(url.reveal(), SecretBox(keys))

    @cached_property
    def storage(self) -> Storage:
        return Storage.connect(self.settings)

    @cached_property
    def provider(self) -> Provider:
        key = self.settings.vast_api_key
        if not key.reveal():
            raise SettingsError("VAST_API_KEY is not set; Vast.ai shows it under Account")
        pace = self.settings.vast_pace
        return VastProvider(key.reveal(), self.settings.vast_url, spacing=pace)

    @cached_property
    def rehearsals(self) -> Market:
        """The market of machines that only pretend, for what test keys order."""
        return Stage(self.store, self.clock).market

    @cached_property
    def bundle(self) -> Bundle:
        return build_bundle()

    @cached_property
    def onstart(self) -> str:
        return onstart_script(self.settings.public_url, self.bundle.sha256)

    @cached_property
    def bases(self) -> BaseResolver:
        return BaseResolver.from_settings(self.settings, self.storage)

    def close(self) -> None:
        """Give back the connections that were opened."""
        if (store := self.__dict__.pop("store", None)) is not None:
            store.close()

    def resolve_base(self, request: JobRequest) -> tuple[wire.Download, ...]:
        return self.bases.resolve(request.base, request.base_family)


@cache
def services() -> Services:
    """This process's own."""
    return Services(Settings.from_env())
