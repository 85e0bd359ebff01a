"""The only reader of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from state.events import Secret
from state.money import Limits


class SettingsError(Exception):
    """A setting is missing or cannot be used; the text says which, and what to do."""


#: What holds unless the environment says otherwise: no cap on money, but on storms.
LIMITS = Limits(runway=timedelta(hours=1), rentals_per_minute=30, rentals_per_hour=600, failures=10)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an installation is told from outside. An empty URL means: embedded on this machine.

    Attributes:
        deployment: prefix of every label at the provider; unique among installations that share
            an account, because the sweep destroys unowned instances of its own prefix.
        data_dir: where embedded servers keep their files.
        public_url: how rented machines reach this installation.
        secret_keys: Fernet keys for secrets at rest, newest first.
        private_webhooks: whether customers' webhooks may go to private addresses (demo, tests).
        limits: what may be spent, held and rented; see `state.money.Limits`.
        image_bytes: what a machine pulls before our script runs, and is billed for: the layers
            of `agent_image`, as the registry stores them.
    """

    deployment: str = "stoker"
    data_dir: Path = Path(".stoker")
    database_url: Secret = field(default=Secret(""), repr=False)
    redis_url: Secret = field(default=Secret(""), repr=False)
    s3_endpoint: str = ""
    s3_bucket: str = "stoker"
    s3_region: str = "us-east-1"
    s3_access_key: str = field(default="", repr=False)
    s3_secret_key: Secret = field(default=Secret(""), repr=False)
    public_url: str = "http://127.0.0.1:8400"
    bind: str = "127.0.0.1:8400"
    secret_keys: tuple[Secret, ...] = field(default=(), repr=False)
    vast_url: str = "https://console.vast.ai"
    #: Share of Vast's documented spacing between calls to keep; only a sandbox bears less than 1.
    vast_pace: float = 1.0
    vast_api_key: Secret = field(default=Secret(""), repr=False)
    #: What Vast.ai signs its notifications with; without one they are not listened to.
    vast_webhook_secret: Secret = field(default=Secret(""), repr=False)
    civitai_url: str = "https://civitai.com"
    civitai_api_key: Secret = field(default=Secret(""), repr=False)
    huggingface_url: str = "https://huggingface.co"
    huggingface_token: Secret = field(default=Secret(""), repr=False)
    agent_image: str = "pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime"
    lease_hours: float = 12.0
    kill_switch: bool = False
    private_webhooks: bool = False
    private_bases: bool = False
    limits: Limits = LIMITS
    image_bytes: int = 4_000_000_000
    retention_days: float = 30.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            SettingsError: a value cannot be read; the text names the variable.
        """
        env = os.environ if env is None else env
        defaults = cls()

        def number(name: str, default: float, *, least: float = 0) -> float:
            try:
                value = float(env.get(name, default))
            except ValueError:
                raise SettingsError(f"{name} must be a number, not {env[name]!r}") from None
            if not least <= value <= 1_000_000:  # NaN is not between, either
                raise SettingsError(f"{name} must be from {least:g} to 1000000, not {env[name]!r}")
            return value

        def flag(name: str) -> bool:
            value = env.get(name, "").lower()
            if value not in ("", "0", "1", "false", "true", "no", "yes"):
                raise SettingsError(f"{name} must be 1 or 0, not {env[name]!r}")
            return value in ("1", "true", "yes")

        def count(name: str, default: int) -> int:
            return round(number(name, default))

        def dollars(name: str) -> int:
            return round(number(name, 0) * 1_000_000)

        deployment = env.get("STOKER_DEPLOYMENT", defaults.deployment)
        # With a slash in it, one's prefix could be the beginning of another's.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", deployment):
            raise SettingsError(
                "STOKER_DEPLOYMENT must be letters, digits, '.', '_' and '-', at most 64, "
                f"not {deployment!r}"
            )
        return cls(
            deployment=deployment,
            data_dir=Path(env.get("STOKER_DATA", defaults.data_dir)).absolute(),
            database_url=Secret(env.get("DATABASE_URL", "")),
            redis_url=Secret(env.get("REDIS_URL", "")),
            s3_endpoint=env.get("S3_ENDPOINT", ""),
            s3_bucket=env.get("S3_BUCKET", defaults.s3_bucket),
            s3_region=env.get("AWS_REGION", defaults.s3_region),
            s3_access_key=env.get("AWS_ACCESS_KEY_ID", ""),
            s3_secret_key=Secret(env.get("AWS_SECRET_ACCESS_KEY", "")),
            public_url=env.get("STOKER_PUBLIC_URL", defaults.public_url).rstrip("/"),
            bind=env.get("STOKER_BIND", defaults.bind),
            secret_keys=tuple(
                Secret(item) for item in env.get("STOKER_SECRET_KEYS", "").split(",") if item
            ),
            vast_url=env.get("VAST_URL", defaults.vast_url).rstrip("/"),
            vast_pace=number("STOKER_VAST_PACE", defaults.vast_pace),
            vast_api_key=Secret(env.get("VAST_API_KEY", "")),
            vast_webhook_secret=Secret(env.get("STOKER_VAST_WEBHOOK_SECRET", "")),
            civitai_url=env.get("CIVITAI_URL", defaults.civitai_url).rstrip("/"),
            civitai_api_key=Secret(env.get("CIVITAI_API_KEY", "")),
            huggingface_url=env.get("HF_ENDPOINT", defaults.huggingface_url).rstrip("/"),
            huggingface_token=Secret(env.get("HF_TOKEN", "")),
            agent_image=env.get("STOKER_AGENT_IMAGE", defaults.agent_image),
            lease_hours=number("STOKER_LEASE_HOURS", defaults.lease_hours, least=0.1),
            kill_switch=flag("STOKER_KILL_SWITCH"),
            private_webhooks=flag("STOKER_PRIVATE_WEBHOOKS"),
            private_bases=flag("STOKER_PRIVATE_BASES"),
            limits=Limits(
                per_hour=dollars("STOKER_MAX_PER_HOUR"),
                per_day=dollars("STOKER_MAX_PER_DAY"),
                total=dollars("STOKER_MAX_TOTAL"),
                machines=count("STOKER_MAX_MACHINES", 0),
                rate=dollars("STOKER_MAX_RATE"),
                runway=timedelta(
                    hours=number("STOKER_MIN_RUNWAY_HOURS", LIMITS.runway / timedelta(hours=1))
                ),
                rentals_per_minute=count(
                    "STOKER_MAX_RENTALS_PER_MINUTE", LIMITS.rentals_per_minute
                ),
                rentals_per_hour=count("STOKER_MAX_RENTALS_PER_HOUR", LIMITS.rentals_per_hour),
                failures=count("STOKER_MAX_FAILURES", LIMITS.failures),
            ),
            image_bytes=round(number("STOKER_IMAGE_GB", defaults.image_bytes / 1e9) * 1e9),
            retention_days=number("STOKER_RETENTION_DAYS", defaults.retention_days),
        )

    def to_env(self) -> dict[str, str]:
        """The environment from which `from_env` reads these settings: for child processes."""

        def flag(value: bool) -> str:
            return "1" if value else "0"

        limits = self.limits
        return {
            "STOKER_DEPLOYMENT": self.deployment,
            "STOKER_DATA": str(self.data_dir),
            "DATABASE_URL": self.database_url.reveal(),
            "REDIS_URL": self.redis_url.reveal(),
            "S3_ENDPOINT": self.s3_endpoint,
            "S3_BUCKET": self.s3_bucket,
            "AWS_REGION": self.s3_region,
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key.reveal(),
            "STOKER_PUBLIC_URL": self.public_url,
            "STOKER_BIND": self.bind,
            "STOKER_SECRET_KEYS": ",".join(key.reveal() for key in self.secret_keys),
            "VAST_URL": self.vast_url,
            "STOKER_VAST_PACE": str(self.vast_pace),
            "VAST_API_KEY": self.vast_api_key.reveal(),
            "STOKER_VAST_WEBHOOK_SECRET": self.vast_webhook_secret.reveal(),
            "CIVITAI_URL": self.civitai_url,
            "CIVITAI_API_KEY": self.civitai_api_key.reveal(),
            "HF_ENDPOINT": self.huggingface_url,
            "HF_TOKEN": self.huggingface_token.reveal(),
            "STOKER_AGENT_IMAGE": self.agent_image,
            "STOKER_LEASE_HOURS": str(self.lease_hours),
            "STOKER_KILL_SWITCH": flag(self.kill_switch),
            "STOKER_PRIVATE_WEBHOOKS": flag(self.private_webhooks),
            "STOKER_PRIVATE_BASES": flag(self.private_bases),
            "STOKER_MAX_PER_HOUR": str(limits.per_hour / 1_000_000),
            "STOKER_MAX_PER_DAY": str(limits.per_day / 1_000_000),
            "STOKER_MAX_TOTAL": str(limits.total / 1_000_000),
            "STOKER_MAX_MACHINES": str(limits.machines),
            "STOKER_MAX_RATE": str(limits.rate / 1_000_000),
            "STOKER_MIN_RUNWAY_HOURS": str(limits.runway / timedelta(hours=1)),
            "STOKER_MAX_RENTALS_PER_MINUTE": str(limits.rentals_per_minute),
            "STOKER_MAX_RENTALS_PER_HOUR": str(limits.rentals_per_hour),
            "STOKER_MAX_FAILURES": str(limits.failures),
            "STOKER_IMAGE_GB": str(self.image_bytes / 1e9),
            "STOKER_RETENTION_DAYS": str(self.retention_days),
        }
