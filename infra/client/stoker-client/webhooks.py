"""Verify what Stoker sends to a webhook."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ._wire import SignatureError
from ._wire import verify as _verify

__all__ = ["SignatureError", "verify"]


def verify(
    body: bytes,
    headers: Mapping[str, str],
    secrets: str | Sequence[str],
    *,
    now: float | None = None,
) -> dict[str, Any]:
    """The event in a delivery that Stoker signed: `type`, `timestamp` and `data`.

    Args:
        body: the raw bytes, as they came.
        headers: of the request, names in whatever case.
        secrets: `whsec_…`; several while one is being replaced.
        now: seconds since the epoch; by default the clock's.

    Raises:
        SignatureError: it is not, whatever came instead. Answer 401.
    """
    names = {str(name).lower(): str(value) for name, value in headers.items()}
    known = [secrets] if isinstance(secrets, str) else list(secrets)
    _verify(body, names, secrets=known, now=time.time() if now is None else now)
    event: dict[str, Any] = json.loads(body)
    return event
