"""Writes safetensors files that are equal, byte for byte, when their content is.

The library keeps a file's notes in a hash map, so their order changes from write to write, and with
it the file's SHA-256. Here they are put in order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save


def write(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a file, which appears whole or not at all."""
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    ordered = json.dumps(header, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as opened:
        opened.write(struct.pack("<Q", len(ordered)))
        opened.write(ordered)
        opened.write(memoryview(raw)[8 + length :])
    part.replace(file)
