"""Writes safetensors files that are equal, byte for byte, when their content is.

The library keeps a file's notes in a hash map, so their order changes from write to write, and with
it the file's SHA-256. Here they are put in order.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save


def write(
    file: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write a file, which appears whole or not at all.

    Args:
        digests: further metadata: each name gets this beginning and, in hexadecimal digits, the
            SHA-256 of all that follows the header.
    """
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    digest = hashlib.sha256(body).hexdigest() if digests else ""
    said = {**metadata, **{name: start + digest for name, start in (digests or {}).items()}}
    header["__metadata__"] = dict(sorted(said.items()))
    ordered = json.dumps(header, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as opened:
        opened.write(struct.pack("<Q", len(ordered)))
        opened.write(ordered)
        opened.write(body)
    part.replace(file)
