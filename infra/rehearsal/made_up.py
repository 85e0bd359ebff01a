"""The files of a training that never was: small, and good enough to be opened."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib

#: Width and height of a sample.
PIXELS = 96


def weights(chance: random.Random, *, finite: bool = True) -> bytes:
    """A safetensors file of one small layer, like no other; or one with a number that is none."""
    down = [chance.gauss(0, 0.02) for _ in range(32)]
    up = [chance.gauss(0, 0.02) for _ in range(32)]
    if not finite:
        up[7] = math.nan
    tensors = {"lora_unet_test.lora_down.weight": ([4, 8], down)}
    tensors["lora_unet_test.lora_up.weight"] = ([8, 4], up)
    header: dict[str, object] = {"__metadata__": {"format": "pt", "stoker": "made in test mode"}}
    body = b""
    for name, (shape, values) in tensors.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        offsets = [len(body), len(body) + len(packed)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        body += packed
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body


def picture(share: float, seed: int) -> bytes:
    """A PNG: noise out of which a disc comes the clearer the nearer `share` is to 1."""
    chance = random.Random(seed)
    tint = [chance.randint(60, 230) for _ in range(3)]
    rows = bytearray()
    for y in range(PIXELS):
        rows.append(0)  # this row is filtered by nothing
        for x in range(PIXELS):
            inside = math.hypot(x - PIXELS / 2, y - PIXELS / 2) < PIXELS / 3
            noise = chance.randint(0, 255)
            for channel in tint:
                clear = channel if inside else 255 - channel // 3
                rows.append(int(share * clear + (1 - share) * noise))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", PIXELS, PIXELS, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(rows), 1)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
