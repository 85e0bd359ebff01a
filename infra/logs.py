"""Structured logs: one JSON object per line, job and attempt bound, no secret in any of them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

import structlog

STARS = "***"

#: Texts that are secrets wherever they stand; the group before them is kept.
_SECRET_TEXTS = re.compile(
    r"(whsec_)[A-Za-z0-9+/=_-]+"
    r"|(stk_(?:live|test)_)[A-Za-z0-9_-]+"
    r"|(\bhf_)[A-Za-z0-9]{8,}"
    # JSON, and the repr of a mapping
    r"|((?:token|secret|password|authorization|api_key)[\"']\s*:\s*[\"'])[^\"']+"
    r"|((?:Bearer|Basic)\s+)[^\s\"',]+"
    r"|((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|token|api_key|apikey|key"
    r"|secret|password)=)[^&\s\"']+"
    r"|([a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+(?=@)",
    re.IGNORECASE,
)
_SECRET_KEYS = re.compile(
    r"(^|_|-)(token|secret|secrets|password|authorization|api_key|signature|cookie)$",
    re.IGNORECASE,
)


def mask(text: str) -> str:
    """`text` with everything in it that looks like a secret replaced by stars."""
    return _SECRET_TEXTS.sub(lambda found: next(filter(None, found.groups()), "") + STARS, text)


def _masked(value: object, depth: int = 0) -> Any:
    if isinstance(value, (int, float, type(None))):
        return value
    if depth < 6 and isinstance(value, Mapping):
        return {
            mask(str(key)): STARS
            if isinstance(item, str) and _SECRET_KEYS.search(str(key))
            else _masked(item, depth + 1)
            for key, item in value.items()
        }
    if depth < 6 and isinstance(value, (list, tuple, set, frozenset)):
        return [_masked(item, depth + 1) for item in value]
    return mask(value if type(value) is str else str(value))


def mask_secrets(
    _logger: object, _method: str, event_dict: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor: nothing that looks like a secret passes it."""
    masked: MutableMapping[str, Any] = _masked(event_dict)
    return masked


def configure(stream: TextIO | None = None, level: str = "INFO") -> None:
    """Send structlog's lines and those of the standard library to `stream` as JSON.

    `stream` is standard error by default: standard output belongs to a command's data.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                mask_secrets,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def bound(**values: object) -> AbstractContextManager[Any]:
    """Every line logged inside the block carries `values`, e.g. `job` and `attempt`."""
    return structlog.contextvars.bound_contextvars(**values)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return log
