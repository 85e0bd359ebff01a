"""Reading a safetensors file that somebody else made."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from typing import Any

import pytest

from infra.safetensors import Weights, finite, read_weights
from state.errors import StorageError


def build(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def read(file: bytes, size: int | None = None) -> Weights:
    return read_weights(io.BytesIO(file), len(file) if size is None else size, lambda part: None)


GOOD = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
}
BODY = struct.pack("<2f", 1.5, -3e38) + struct.pack("<4e", 0.0, -1.0, 65504.0, 1e-7)


def test_good_file_is_read_to_its_last_byte() -> None:
    file, digest = build(GOOD, BODY), hashlib.sha256()
    weights = read_weights(io.BytesIO(file), len(file), digest.update)
    assert digest.digest() == hashlib.sha256(file).digest()
    assert weights.metadata == {"format": "pt"}
    assert weights.tensors["b"].shape == (2, 2)
    assert weights.tensors["a"].dtype == "F32"


def test_file_of_the_reference_library_is_read() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    numpy = pytest.importorskip("numpy")
    file = safetensors.save(
        {
            "x": numpy.arange(12, dtype="float32").reshape(3, 4),
            "scalar": numpy.array(2.0, dtype="float16"),
        },
        metadata={"ss_network_dim": "8"},
    )
    weights = read(file)
    assert weights.tensors["x"].shape == (3, 4)
    assert weights.tensors["scalar"].shape == ()


def row(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04" + b"x" * 100,
        build(GOOD, BODY[:-1]),
        build(GOOD, BODY + b"x"),
        build(GOOD, BODY, length=2**63),
        build(GOOD, BODY, length=0),
        build(b"[1]"),
        build(b"{}"),
        build(b'{"a":'),
        build(b"\xff\xfe{}"),
        build(b"[" * 5000),
        build(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234"),
        build({"a": row(0, 4, [1]), "b": row(2, 6, [1])}, b"123456"),
        build({"a": row(0, 4, [1]), "b": row(8, 12, [1])}, b"x" * 12),
        build({"a": row(4, 8, [1])}, b"x" * 8),
        build({"a": row(0, 4, [2])}, b"1234"),
        build({"a": row(0, 4, [1], "FLOAT")}, b"1234"),
        build({"a": row(0, 4, [1], ["F32"])}, b"1234"),
        build({"a": row(0, 4, [-1])}, b"1234"),
        build({"a": row(0, 4, [True])}, b"1234"),
        build({"a": row(0, 4, [1.0])}, b"1234"),
        build({"a": row(4, 0, [1])}, b"1234"),
        build({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
        build({"a": row(0, 4, [1] * 17)}, b"1234"),
        build({"a": row(0, 0, [2**62] * 16)}),
        build({"a": "text"}),
        build({"__metadata__": {"a": 1}, "b": row(0, 4, [1])}, b"1234"),
    ],
)
def test_file_that_lies_about_itself_is_refused(file: bytes) -> None:
    with pytest.raises(StorageError) as caught:
        read(file)
    assert caught.value.code == "weights_format"
    assert not caught.value.retryable


def test_answer_that_breaks_off_is_refused() -> None:
    file = build(GOOD, BODY)
    for length in range(len(file)):
        with pytest.raises(StorageError):
            read(file[:length], size=len(file))


def pack(dtype: str, value: float) -> bytes:
    match dtype:
        case "F32" | "F64" | "F16":
            return struct.pack({"F32": "<f", "F64": "<d", "F16": "<e"}[dtype], value)
        case _:
            return struct.pack("<f", value)[2:]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_infinite_and_undefined_numbers_are_found_anywhere(dtype: str) -> None:
    large = {"F64": 1.7e308, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.3e38}[dtype]
    good = [pack(dtype, value) for value in (0.0, -0.0, 1.0, -1e-5, large, -large, 1e-7)]
    assert finite(b"".join(good) * 100, dtype)
    for value in (float("inf"), -float("inf"), float("nan")):
        for at in range(len(good) + 1):
            numbers = b"".join([*good[:at], pack(dtype, value), *good[at:]])
            assert not finite(numbers, dtype)


def test_every_half_precision_number_is_judged_rightly() -> None:
    for word in range(1 << 16):
        numbers = struct.pack("<H", word)
        (half,) = struct.unpack("<e", numbers)
        (brain,) = struct.unpack("<f", b"\0\0" + numbers)
        assert finite(numbers, "F16") == (abs(half) < float("inf"))
        assert finite(numbers, "BF16") == (abs(brain) < float("inf"))


def test_integers_are_always_finite() -> None:
    assert finite(b"\xff" * 80, "I64")
    assert finite(b"\xff" * 80, "BOOL")


def test_weights_with_a_number_gone_wild_are_refused() -> None:
    body = struct.pack("<2f", 1.5, float("nan")) + BODY[8:]
    with pytest.raises(StorageError, match="a holds a number") as caught:
        read(build(GOOD, body))
    assert caught.value.code == "weights_not_finite"
