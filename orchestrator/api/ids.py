"""Ids that carry a prefix and sort by time: `job_01k9…`, 26 characters after the prefix."""

from __future__ import annotations

import re
import secrets
from datetime import datetime

#: Crockford's base 32: no i, l, o, u.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PLAUSIBLE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def new_id(prefix: str, now: datetime) -> str:
    """48 bits of milliseconds, then 80 random bits, as 26 letters."""
    number = (int(now.timestamp() * 1000) << 80) | secrets.randbits(80)
    letters = [_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(letters)}"


def plausible(text: str) -> bool:
    """Whether `text` can be an id at all; what cannot be is asked of no database."""
    return _PLAUSIBLE.fullmatch(text) is not None
