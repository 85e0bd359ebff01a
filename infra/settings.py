"""The only reader of the environment, and the table of everything that it may say.

A setting is one line of `GROUPS`: its name, how it is read, what it means. `docs/settings.md` is
drawn from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from infra import config
from infra.config import SettingsError
from state.events import Secret
from state.money import Limits

__all__ = ["GROUPS", "LIMITS", "Setting", "Settings", "SettingsError", "server", "settings_page"]

#: What holds unless the environment says otherwise: no cap on money, but on storms.
LIMITS = Limits(runway=timedelta(hours=1), rentals_per_minute=30, rentals_per_hour=600, failures=10)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an installation is told from outside. An empty URL means: embedded on this machine.

    What each field means is said once, in `GROUPS`.
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
    test_url: str = ""
    bind: str = "127.0.0.1:8400"
    secret_keys: tuple[Secret, ...] = field(default=(), repr=False)
    vast_url: str = "https://console.vast.ai"
    vast_pace: float = 1.0
    vast_api_key: Secret = field(default=Secret(""), repr=False)
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
    rate_reads: int = 600
    rate_writes: int = 120
    rate_logins: int = 10
    metrics_bind: str = ""
    otlp_endpoint: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `env`; without one the process's own, and the configuration files behind it.

        Raises:
            SettingsError: a value cannot be read; the text names the variable.
        """
        env = _environment() if env is None else env
        values: dict[str, Any] = {}
        limits: dict[str, Any] = {}
        for setting in table():
            if setting.name in env:
                into = limits if setting.of_limits else values
                into[setting.attribute] = setting.kind.read(setting.name, env[setting.name])
        settings = replace(cls(), **values, limits=replace(LIMITS, **limits))
        return replace(settings, data_dir=settings.data_dir.absolute())

    def to_env(self) -> dict[str, str]:
        """The environment from which `from_env` reads these settings: for child processes."""
        return {setting.name: setting.kind.write(setting.of(self)) for setting in table()}


def _environment() -> Mapping[str, str]:
    """The process's own, before what the files say."""
    said: dict[str, str] = {}
    for file in reversed(config.read(os.environ)):
        known = [setting.name for setting in table()]
        for name in file.settings:
            if name not in known:
                like = config.suggestion(name, known)
                raise SettingsError(f"{file.path} names {name!r}, which is no setting{like}")
        said |= file.settings
    return {**said, **os.environ}


def server(env: Mapping[str, str] | None = None) -> tuple[str, Secret]:
    """Which installation the command line asks, and with which key; empty where nobody said.

    A key in the user's file goes to no other server than the one beside it or one named by the
    environment: a `stoker.toml` that came with somebody's files must not have it sent elsewhere.

    Raises:
        SettingsError: a configuration file cannot be read.
    """
    env = os.environ if env is None else env
    files = config.read(env)
    given = env.get("STOKER_URL", "")
    url = given or next((file.url for file in files if file.url), "")
    key = Secret(env.get("STOKER_API_KEY", ""))
    for file in files:
        ours = file.url == url or not file.own or bool(given and not file.url)
        if ours and not key.reveal():
            key = file.api_key
    return url, key


# --- how values are read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a setting's value is read from text (by its name, for the error), and written."""

    read: Callable[[str, str], Any]
    write: Callable[[Any], str] = str


def _number(least: float = 0.0, of: Callable[[float], Any] = float, per: float = 1.0) -> Kind:
    """Numbers up to a million; the field holds `of(number * per)`."""

    def read(name: str, text: str) -> Any:
        try:
            value = float(text)
        except ValueError:
            raise SettingsError(f"{name} must be a number, not {text!r}") from None
        if not least <= value <= 1_000_000:  # NaN is not between, either
            raise SettingsError(f"{name} must be from {least:g} to 1000000, not {text!r}")
        return of(value * per)

    return Kind(read, lambda value: str(value if per == 1.0 else value / per))


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("", "0", "1", "false", "true", "no", "yes"):
        raise SettingsError(f"{name} must be 1 or 0, not {text!r}")
    return text.lower() in ("1", "true", "yes")


def _deployment(name: str, text: str) -> str:
    # With a slash in it, one's prefix could be the beginning of another's.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise SettingsError(
            f"{name} must be letters, digits, '.', '_' and '-', at most 64, not {text!r}"
        )
    return text


TEXT = Kind(lambda _, text: text)
URL = Kind(lambda _, text: text.rstrip("/"))
PATH = Kind(lambda _, text: Path(text).absolute())
SECRET = Kind(lambda _, text: Secret(text), lambda value: value.reveal())
SECRETS = Kind(
    lambda _, text: tuple(Secret(item) for item in text.split(",") if item),
    lambda values: ",".join(value.reveal() for value in values),
)
FLAG = Kind(_flag, lambda value: "1" if value else "0")
NUMBER = _number()
COUNT = _number(of=round)
DOLLARS = _number(of=round, per=1_000_000)
HOURS = Kind(
    lambda name, text: timedelta(hours=NUMBER.read(name, text)),
    lambda value: str(value / timedelta(hours=1)),
)

# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One thing that an installation is told.

    Attributes:
        name: in the environment, and in the files' `[settings]`.
        field: of `Settings`; `limits.x` is a field of its limits.
        meaning: for `docs/settings.md`, in a line.
    """

    name: str
    field: str
    kind: Kind
    meaning: str

    @property
    def of_limits(self) -> bool:
        return self.field.startswith("limits.")

    @property
    def attribute(self) -> str:
        return self.field.removeprefix("limits.")

    def of(self, settings: Settings) -> Any:
        return getattr(settings.limits if self.of_limits else settings, self.attribute)


GROUPS: Mapping[str, tuple[Setting, ...]] = {
    "This installation": (
        Setting(
            "STOKER_DEPLOYMENT", "deployment", Kind(_deployment),
            "prefix of every label at the provider; unique among installations that share an "
            "account, because the sweep destroys unowned instances of its own prefix",
        ),
        Setting(
            "STOKER_PUBLIC_URL", "public_url", URL,
            "how rented machines and customers reach `stoker serve`; HTTPS, without a path",
        ),
        Setting(
            "STOKER_TEST_URL", "test_url", URL,
            "how test mode's machines, which run in the workers, reach this installation; where "
            "it is empty, as rented ones do",
        ),
        Setting("STOKER_BIND", "bind", TEXT, "where `stoker serve` listens"),
        Setting(
            "STOKER_DATA", "data_dir", PATH,
            "files of the servers that `stoker up` starts, their logs and metrics",
        ),
        Setting(
            "STOKER_SECRET_KEYS", "secret_keys", SECRETS,
            "Fernet keys for secrets at rest, newest first, with commas between; to rotate put a "
            "new one in front. `stoker keys secret` makes one",
        ),
        Setting(
            "STOKER_RETENTION_DAYS", "retention_days", NUMBER,
            "results, datasets and events are deleted after so many days",
        ),
        Setting(
            "STOKER_PRIVATE_WEBHOOKS", "private_webhooks", FLAG,
            "1 lets customers' webhooks go to private addresses and plain HTTP",
        ),
        Setting(
            "STOKER_PRIVATE_BASES", "private_bases", FLAG,
            "1 lets base models come from private addresses and plain HTTP",
        ),
        Setting(
            "STOKER_RATE_READS", "rate_reads", COUNT,
            "requests per minute and API key that read; 0 is no limit, here and below. Counted in "
            "Redis; while that does not answer nobody is limited",
        ),
        Setting(
            "STOKER_RATE_WRITES", "rate_writes", COUNT,
            "requests per minute and API key that change something",
        ),
        Setting(
            "STOKER_RATE_LOGINS", "rate_logins", COUNT,
            "failed logins to the pages per minute and address",
        ),
        Setting(
            "STOKER_METRICS_BIND", "metrics_bind", TEXT,
            "HOST:PORT where a worker shows its own metrics; empty: only beside those of the web",
        ),
        Setting(
            "OTEL_EXPORTER_OTLP_ENDPOINT", "otlp_endpoint", TEXT,
            "an OTLP collector for traces; other OTEL_* variables are the exporter's own",
        ),
    ),
    "Servers": (
        Setting(
            "DATABASE_URL", "database_url", SECRET,
            "`postgresql://…`; empty: `stoker up` starts one",
        ),
        Setting(
            "REDIS_URL", "redis_url", SECRET, "`redis://…`; empty: `stoker up` starts one"
        ),
        Setting(
            "S3_ENDPOINT", "s3_endpoint", TEXT,
            "of an S3 other than AWS, as customers and rented machines reach it; without it and "
            "without keys `stoker up` starts one",
        ),
        Setting("S3_BUCKET", "s3_bucket", TEXT, "the one bucket that everything lies in"),
        Setting("AWS_REGION", "s3_region", TEXT, "of the bucket"),
        Setting(
            "AWS_ACCESS_KEY_ID", "s3_access_key", TEXT,
            "without one boto3's own chain looks for it (an instance's role, …)",
        ),
        Setting("AWS_SECRET_ACCESS_KEY", "s3_secret_key", SECRET, "its secret"),
    ),
    "Vast.ai and models": (
        Setting("VAST_API_KEY", "vast_api_key", SECRET, "Vast.ai shows it under Account"),
        Setting("VAST_URL", "vast_url", URL, "a sandbox's instead, to rehearse"),
        Setting(
            "STOKER_VAST_PACE", "vast_pace", NUMBER,
            "share of Vast's documented spacing between calls to keep; only a sandbox bears less "
            "than 1",
        ),
        Setting(
            "STOKER_VAST_WEBHOOK_SECRET", "vast_webhook_secret", SECRET,
            "of a Vast.ai notification webhook to `<public URL>/vast/v1/notifications`; its word "
            "is a hint to look at once. Without one nothing is listened to",
        ),
        Setting("CIVITAI_API_KEY", "civitai_api_key", SECRET, "for models that ask for it"),
        Setting("CIVITAI_URL", "civitai_url", URL, "a mirror or a sandbox instead"),
        Setting("HF_TOKEN", "huggingface_token", SECRET, "for models that ask for it"),
        Setting("HF_ENDPOINT", "huggingface_url", URL, "a mirror instead"),
        Setting(
            "STOKER_AGENT_IMAGE", "agent_image", TEXT,
            "what rented machines run: any image with Python 3.11 and CUDA PyTorch",
        ),
        Setting(
            "STOKER_IMAGE_GB", "image_bytes", _number(of=round, per=1e9),
            "what that image's layers weigh in the registry: a machine pulls them before our "
            "script runs, and is billed for them as bandwidth",
        ),
        Setting(
            "STOKER_LEASE_HOURS", "lease_hours", _number(least=0.1),
            "a machine is held no longer than this",
        ),
    ),
    "Money": (
        Setting(
            "STOKER_KILL_SWITCH", "kill_switch", FLAG, "1 stops renting; releasing goes on"
        ),
        Setting(
            "STOKER_MAX_PER_HOUR", "limits.per_hour", DOLLARS,
            "dollars that all machines may cost within this clock hour, and within the next; 0 is "
            "no limit, here and below",
        ),
        Setting(
            "STOKER_MAX_PER_DAY", "limits.per_day", DOLLARS, "the same for the day of UTC"
        ),
        Setting(
            "STOKER_MAX_TOTAL", "limits.total", DOLLARS,
            "dollars spent ever and set aside; no time resets it",
        ),
        Setting(
            "STOKER_MAX_MACHINES", "limits.machines", COUNT, "machines held at the same time"
        ),
        Setting(
            "STOKER_MAX_RATE", "limits.rate", DOLLARS, "dollars per hour of all machines together"
        ),
        Setting(
            "STOKER_MIN_RUNWAY_HOURS", "limits.runway", HOURS,
            "the account's credit must pay all machines for so many hours",
        ),
        Setting(
            "STOKER_MAX_RENTALS_PER_MINUTE", "limits.rentals_per_minute", COUNT,
            "instances created within a minute",
        ),
        Setting(
            "STOKER_MAX_RENTALS_PER_HOUR", "limits.rentals_per_hour", COUNT,
            "instances created within an hour",
        ),
        Setting(
            "STOKER_MAX_FAILURES", "limits.failures", COUNT,
            "machines in a row that never became ready; then renting pauses, and tries one",
        ),
    ),
}  # fmt: skip


def table() -> Iterator[Setting]:
    for group in GROUPS.values():
        yield from group


def settings_page() -> str:
    """The whole of `docs/settings.md`."""
    lines = [HEAD]
    plain = replace(Settings(), limits=LIMITS)
    for title, group in GROUPS.items():
        lines += [f"\n## {title}\n", "| name | default | meaning |", "|---|---|---|"]
        for setting in group:
            value = setting.kind.write(setting.of(plain))
            shown = f"`{value.removesuffix('.0')}`" if value else ""
            lines.append(f"| `{setting.name}` | {shown} | {setting.meaning} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Settings

Drawn from `infra/settings.py` by `stoker docs settings`; do not edit.

An installation is told these by its environment, or by the same names in `[settings]` of a
configuration file. What is nearer wins: an option of the command, the environment, `./stoker.toml`,
`~/.config/stoker/config.toml`, the default. `STOKER_CONFIG` names the one file to read in place of
both; empty, it names none. A name that is no setting is an error.

```toml
url = "https://stoker.example.com"   # which installation commands ask: STOKER_URL
api_key = "stk_live_…"               # and with which key: STOKER_API_KEY

[settings]
STOKER_MAX_PER_DAY = 50

[train]                              # options of a command, by their long names
base = "civitai:128713"
max-cost = 2
```

A key in the user's own file is sent to no other server than the one beside it, unless the
environment names that server: a `stoker.toml` that came with somebody's files cannot have it.
An option can also be said by the environment: `STOKER_<COMMAND>_<OPTION>`, as `STOKER_TRAIN_BASE`.\
"""
