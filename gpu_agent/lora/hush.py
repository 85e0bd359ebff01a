"""Settings that the libraries read while they are imported: no chatter, no telemetry."""

from __future__ import annotations

import os

_SETTINGS = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def hush_libraries() -> None:
    """Call before torch, diffusers or transformers is imported; what is set already stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
