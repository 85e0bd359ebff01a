"""What the libraries find when they are imported: no chatter, no telemetry, nothing unneeded."""

from __future__ import annotations

import os
import sys

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


#: What the libraries import where it happens to be installed, and the trainer never uses. And
#: torchvision from PyPI, beside a torch of another build, makes them fail.
_UNNEEDED = ("boto3", "botocore", "pandas", "scipy", "sklearn", "tensorflow", "torchvision")


def leave_out() -> None:
    """Let this process not find packages that cost its start a second and bring it nothing."""
    for name in _UNNEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's way to say so
