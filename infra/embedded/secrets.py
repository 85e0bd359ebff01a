"""Passwords of the servers on this machine: made once, kept where only their owner can read."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


def _word() -> str:
    return secrets.token_urlsafe(24)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """`fernet_key` encrypts secrets in the database: without it they are lost."""

    database_password: str = field(default_factory=_word, repr=False)
    redis_password: str = field(default_factory=_word, repr=False)
    s3_access_key: str = "stoker:admin"
    s3_secret_key: str = field(default_factory=_word, repr=False)
    fernet_key: str = field(default_factory=_fernet_key, repr=False)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Those in `root`, made now where there are none."""
        path = root / "secrets.json"
        if path.exists():
            return cls(**json.loads(path.read_text()))
        made, fresh = cls(), root / "secrets.json.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(dataclasses.asdict(made), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
        return made
