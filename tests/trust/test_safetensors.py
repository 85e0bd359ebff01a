"""A corpus of files that are no safetensors, or lie about themselves, for both readers.

The server reads what a rented machine uploaded; the agent reads what a stranger published.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_agent.halt import Fault
from gpu_agent.pull import check_safetensors
from infra.safetensors import LARGEST_HEADER, read_weights
from state.errors import StorageError


def file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = {"a": tensor(0, 8, [2])}
BODY = struct.pack("<2f", 1.0, -2.0)


def zipped_pickle() -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": [1.0]}))
        return stream.getvalue()


def padded(number: str) -> bytes:
    return b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % number.encode()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "a pickle": lambda: pickle.dumps({"a": [1.0] * 20}),
    "a pickle that torch wrote": zipped_pickle,
    "a pickle behind a true length": lambda: file(pickle.dumps({"a": 1}), BODY),
    "an error page": lambda: b"<!doctype html><title>Sign in</title>" + b" " * 500,
    "header of no bytes": lambda: file(b"", BODY),
    "header longer than the file": lambda: file(ONE, BODY, length=1 << 20),
    "header as long as all memory": lambda: file(ONE, BODY, length=2**64 - 1),
    "header one byte too long": lambda: file(ONE, BODY, length=len(json.dumps(ONE)) + 1),
    "header one byte too short": lambda: file(ONE, BODY, length=len(json.dumps(ONE)) - 1),
    "header in UTF-16": lambda: file(json.dumps(ONE).encode("utf-16-le"), BODY),
    "header with a byte order mark": lambda: file(b"\xef\xbb\xbf" + json.dumps(ONE).encode(), BODY),
    "header that is a list": lambda: file([ONE], BODY),
    "nothing but metadata": lambda: file({"__metadata__": {"format": "pt"}}),
    "one name twice": lambda: file(
        json.dumps(ONE)[:-1].encode() + b"," + json.dumps(ONE)[1:].encode(), BODY
    ),
    "one key twice in a tensor": lambda: file(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', BODY
    ),
    "a hole before": lambda: file({"a": tensor(4, 8, [1])}, BODY),
    "a hole between": lambda: file({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, BODY + BODY),
    "an overlap": lambda: file({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, BODY + b"1234"),
    "two tensors in one place": lambda: file(
        {"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, BODY
    ),
    "trailing bytes": lambda: file(ONE, BODY + b"x"),
    "a byte missing": lambda: file(ONE, BODY[:-1]),
    "end before begin": lambda: file({"a": tensor(8, 0, [2])}, BODY),
    "offsets below nothing": lambda: file({"a": tensor(-8, 0, [2])}, BODY),
    "offsets that are fractions": lambda: file({"a": tensor(0.0, 8.0, [2])}, BODY),
    "offsets that are truths": lambda: file({"a": tensor(False, True, [1], "U8")}, b"1"),
    "offsets beyond 64 bits": lambda: file({"a": tensor(0, 2**70, [2**68])}, BODY),
    "three offsets": lambda: file(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, BODY
    ),
    "a shape that is too small": lambda: file({"a": tensor(0, 8, [1])}, BODY),
    "a shape of negative sides": lambda: file({"a": tensor(0, 8, [-1, -2])}, BODY),
    "a shape that is a text": lambda: file({"a": tensor(0, 8, "2")}, BODY),
    "a shape that is an object": lambda: file({"a": tensor(0, 4, {})}, b"1234"),
    "a shape of a thousand sides": lambda: file({"a": tensor(0, 8, [1] * 999 + [2])}, BODY),
    "a side of four thousand digits": lambda: file(padded("9" * 4000), BODY),
    "a side of a million digits": lambda: file(padded("9" * 10**6), BODY),
    "a type that is an object": lambda: file({"a": tensor(0, 8, [2], {})}, BODY),
    "a type of the wrong size": lambda: file({"a": tensor(0, 8, [2], "F16")}, BODY),
    "a tensor that is a number": lambda: file({"a": 7}, BODY),
    "numbers without end": lambda: file(padded("NaN"), BODY),
    "a deep header": lambda: file(b'{"a":' + b"[" * 200_000, BODY),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_the_server_takes_it_for_no_weights(name: str) -> None:
    content = HOSTILE[name]()
    with pytest.raises(StorageError) as caught:
        read_weights(io.BytesIO(content), len(content), lambda part: None)
    assert (caught.value.code, caught.value.retryable) == ("weights_format", False)
    assert len(str(caught.value)) < 400, "it is written on the job"


@pytest.mark.parametrize("name", HOSTILE)
def test_the_agent_takes_it_for_no_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name]())
    with pytest.raises(Fault) as caught:
        check_safetensors(path)
    assert (caught.value.code, caught.value.retryable) == ("model.unsafe", False)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_server_takes_no_weights_that_went_wild(value: str) -> None:
    content = file(ONE, struct.pack("<2f", 1.0, float(value)))
    with pytest.raises(StorageError) as caught:
        read_weights(io.BytesIO(content), len(content), lambda part: None)
    assert caught.value.code == "weights_not_finite"


def test_the_server_does_not_even_fetch_a_header_without_measure() -> None:
    """A rented machine's upload must not cost the worker's memory."""
    taken = []
    content = file(b" " * (LARGEST_HEADER + 1))
    with pytest.raises(StorageError):
        read_weights(io.BytesIO(content), len(content), lambda part: taken.append(len(part)))
    assert sum(taken) == 8


def test_what_is_true_is_read_by_both(tmp_path: Path) -> None:
    content = file({"__metadata__": {"format": "pt"}, **ONE, "empty": tensor(8, 8, [0, 3])}, BODY)
    assert set(read_weights(io.BytesIO(content), len(content), lambda part: None).tensors) == {
        "a",
        "empty",
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert check_safetensors(path) == 2
