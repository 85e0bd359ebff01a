"""A program for the supervisor to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Program:
    """Attributes:
    stop: name of the signal by which it ends in good order.
    user: account to become first (only root can), or None.
    once: it is meant to end by itself.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    cwd: Path
    stop: str = "SIGTERM"
    user: str | None = None
    once: bool = False
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "argv": list(self.argv),
            "log": str(self.log),
            "cwd": str(self.cwd),
            "stop": self.stop,
            "user": self.user,
            "once": self.once,
            "env": dict(self.env),
        }
