"""Configuration files: `./stoker.toml`, and the user's own, `~/.config/stoker/config.toml`.

    url = "https://stoker.example.com"     # which installation the command line asks
    api_key = "stk_live_…"

    [settings]                             # of an installation, as docs/settings.md names them
    STOKER_MAX_PER_DAY = 50

    [train]                                # what a command's options are unless said otherwise
    base = "civitai:128713"

What is nearer wins: an option, then the environment, `./stoker.toml`, the user's file, the
default. `STOKER_CONFIG` names the one file to read in place of both; empty, it names none.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state.events import Secret

#: In the directory that a command is called from.
PROJECT = Path("stoker.toml")
#: Larger files are no configuration.
MAX_BYTES = 256 * 1024


class SettingsError(Exception):
    """A setting is missing or cannot be used; the text says which, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What one file says.

    Attributes:
        settings: as the environment would say them: text by name.
        commands: by command (`train`, `hosts ls`): its options, as TOML has them.
        own: whether it is the user's, and not the directory's.
    """

    path: Path
    own: bool
    url: str = ""
    api_key: Secret = field(default=Secret(""), repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    commands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


def read(env: Mapping[str, str]) -> tuple[Config, ...]:
    """The files that there are, the nearest first.

    Raises:
        SettingsError: one cannot be read; the text names it, and never a value of it.
    """
    found = (_read(path, own=own) for path, own in _places(env))
    return tuple(config for config in found if config is not None)


def _places(env: Mapping[str, str]) -> Iterable[tuple[Path, bool]]:
    if "STOKER_CONFIG" in env:
        return [(Path(env["STOKER_CONFIG"]), True)] if env["STOKER_CONFIG"] else []
    home = env.get("XDG_CONFIG_HOME") or (f"{env['HOME']}/.config" if env.get("HOME") else "")
    own = [(Path(home) / "stoker" / "config.toml", True)] if home else []
    return [(PROJECT, False), *own]


def _read(path: Path, *, own: bool) -> Config | None:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise SettingsError(f"{path} is larger than {MAX_BYTES // 1024} kB; it is no configuration")
    try:
        value = tomllib.loads(text.decode())
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise SettingsError(f"{path} is nested too deeply") from None
    texts = {name: value.pop(name, "") for name in ("url", "api_key")}
    for name, said in texts.items():
        if not isinstance(said, str):
            raise SettingsError(f"{name} in {path} must be a text")
    tables = {name: said for name, said in value.items() if isinstance(said, dict)}
    if strange := sorted(set(value) - set(tables)):
        known = ("url", "api_key", "settings")
        raise SettingsError(f"{path} knows no {strange[0]!r}{suggestion(strange[0], known)}")
    settings = tables.pop("settings", {})
    return Config(
        path=path,
        own=own,
        url=texts["url"],
        api_key=Secret(texts["api_key"]),
        settings={name: _text(path, name, said) for name, said in settings.items()},
        commands=tables,
    )


def _text(path: Path, name: str, value: object) -> str:
    """A value as the environment would say it."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    raise SettingsError(f"{name} in {path} must be a text, a number, true or false")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where one of `known` is much like `name`, else nothing."""
    like = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), like, n=1, cutoff=0.6)
    return f"; did you mean {like[close[0]]!r}?" if close else ""
