"""The only reader of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from state.events import Secret


class SettingsError(Exception):
    """A setting is missing or cannot be used; the text says which, and what to do."""


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
        per_hour_limit, per_day_limit: micro-USD that may be spent; 0 means no limit.
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
    per_hour_limit: int = 0
    per_day_limit: int = 0
    retention_days: float = 30.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            SettingsError: a value cannot be read; the text names the variable.
        """
        env = os.environ if env is None else env
        defaults = cls()

        def number(name: str, default: float) -> float:
            try:
                value = float(env.get(name, default))
            except ValueError:
                raise SettingsError(f"{name} must be a number, not {env[name]!r}") from None
            if not 0 <= value <= 1_000_000:  # NaN is not between, either
                raise SettingsError(f"{name} must be from 0 to 1000000, not {env[name]!r}")
            return value

        def flag(name: str) -> bool:
            value = env.get(name, "").lower()
            if value not in ("", "0", "1", "false", "true", "no", "yes"):
                raise SettingsError(f"{name} must be 1 or 0, not {env[name]!r}")
            return value in ("1", "true", "yes")

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
            lease_hours=number("STOKER_LEASE_HOURS", defaults.lease_hours),
            kill_switch=flag("STOKER_KILL_SWITCH"),
            private_webhooks=flag("STOKER_PRIVATE_WEBHOOKS"),
            private_bases=flag("STOKER_PRIVATE_BASES"),
            per_hour_limit=dollars("STOKER_MAX_PER_HOUR"),
            per_day_limit=dollars("STOKER_MAX_PER_DAY"),
            retention_days=number("STOKER_RETENTION_DAYS", defaults.retention_days),
        )

    def to_env(self) -> dict[str, str]:
        """The environment from which `from_env` reads these settings: for child processes."""

        def flag(value: bool) -> str:
            return "1" if value else "0"

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
            "STOKER_MAX_PER_HOUR": str(self.per_hour_limit / 1_000_000),
            "STOKER_MAX_PER_DAY": str(self.per_day_limit / 1_000_000),
            "STOKER_RETENTION_DAYS": str(self.retention_days),
        }
