"""Reads a safetensors file that somebody else made, believing nothing. Needs no numpy.

A file is 8 bytes of header length (little-endian), a JSON object naming each tensor's dtype,
shape and place, and the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from state.errors import StorageError

#: bytes, enough for some 60,000 tensors; the format allows 100 MB, but a header made for that takes
#: 25 times its length of our memory
LARGEST_HEADER = 8_000_000
_PIECE = 1 << 20

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def _table(mask: int) -> bytes:
    """For `bytes.translate`: 1 for each byte in which all bits of `mask` are set, else 0."""
    return bytes(int(value & mask == mask) for value in range(256))


#: By dtype: (place of a byte within a number, its bits), together all of the exponent's bits.
#: A number is infinite or not a number exactly when all of them are set.
_EXPONENT: Mapping[str, tuple[tuple[int, bytes], ...]] = {
    "F64": ((7, _table(0x7F)), (6, _table(0xF0))),
    "F32": ((3, _table(0x7F)), (2, _table(0x80))),
    "BF16": ((1, _table(0x7F)), (0, _table(0x80))),
    "F16": ((1, _table(0x7C)),),
    "F8_E5M2": ((0, _table(0x7C)),),
    # has no infinity, and one not-a-number
    "F8_E4M3": ((0, _table(0x7F)),),
}


class Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes (all for -1); none only at the end."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file says of itself."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Place:
    name: str
    tensor: Tensor
    begin: int
    end: int


def _bad(message: str, code: str = "weights_format") -> StorageError:
    return StorageError(message, code=code, retryable=False)


def read_weights(stream: Readable, size: int, seen: Callable[[bytes], object]) -> Weights:
    """Read `stream` of `size` bytes to its end; `seen` is handed every byte, in order.

    Raises:
        StorageError: `weights_format` (no safetensors file, or one that lies about itself) or
            `weights_not_finite`.
    """

    def take(count: int) -> bytes:
        parts, missing = [], count
        while missing:
            part = stream.read(missing)
            if not part:
                raise _bad(f"the file ends {missing} bytes too early")
            seen(part)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    if size < 8:
        raise _bad(f"a file of {size} bytes is no safetensors file")
    length = int.from_bytes(take(8), "little")
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise _bad(f"its header would have {length} bytes, which cannot be")
    places, metadata = _parse(take(length), size - 8 - length)
    for place in places:
        left = place.end - place.begin
        while left:
            piece = take(min(left, _PIECE))
            left -= len(piece)
            if not finite(piece, place.tensor.dtype):
                raise _bad(f"{place.name} holds a number that is not finite", "weights_not_finite")
    return Weights(tensors={place.name: place.tensor for place in places}, metadata=metadata)


def finite(numbers: bytes, dtype: str) -> bool:
    """Whether each of `numbers` (little-endian, whole ones) is. Integers always are."""
    places = _EXPONENT.get(dtype)
    if places is None:
        return True
    full = -1
    for place, table in places:
        marks = numbers[place :: _SIZES[dtype]].translate(table)
        full &= int.from_bytes(marks, "little")
        if not full:
            return True
    return False


def _parse(header: bytes, body: int) -> tuple[list[_Place], dict[str, str]]:
    try:
        rows = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _bad("its header is no JSON object with unique names") from None
    if not isinstance(rows, dict):
        raise _bad("its header is no JSON object")
    metadata = rows.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _bad("its metadata is not text by name")
    places = sorted(
        (_place(name, row) for name, row in rows.items()), key=lambda p: (p.begin, p.end)
    )
    if not places:
        raise _bad("it holds no tensor")
    at = 0
    for place in places:
        if place.begin != at:
            raise _bad(f"{place.name} does not begin where the tensor before it ends")
        at = place.end
    if at != body:
        raise _bad(f"its tensors end at byte {at}, the file at {body}")
    return places, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _place(name: str, row: Any) -> _Place:
    if not isinstance(row, dict):
        raise _bad(f"{name[:200]} is not described")
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _bad(f"{name[:200]} has the unknown type {str(dtype)[:40]!r}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise _bad(f"{name[:200]} has no readable shape and place")
    begin, end = offsets
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise _bad(f"{name[:200]} has {end - begin} bytes, which is not what its shape needs")
    return _Place(name[:200], Tensor(dtype=dtype, shape=tuple(shape)), begin, end)


def _whole(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
