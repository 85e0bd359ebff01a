"""Uploaded weights are read back before a job is completed."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest

from infra.storage import Storage
from state.errors import NotFound, StorageError


def weights(numbers: list[float]) -> bytes:
    body = struct.pack(f"<{len(numbers)}f", *numbers)
    header = json.dumps(
        {"lora": {"dtype": "F32", "shape": [len(numbers)], "data_offsets": [0, len(body)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + body


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_weights_that_are_what_was_announced_pass(storage: Storage, folder: str) -> None:
    body = weights([0.5, -2.0] * 600_000)
    storage.put_bytes(folder + "w", body)
    found = storage.verify_safetensors(folder + "w", bytes=len(body), sha256=sha256(body).upper())
    assert found.tensors["lora"].shape == (1_200_000,)


def test_other_bytes_than_announced_are_refused(storage: Storage, folder: str) -> None:
    body, other = weights([1.0, 2.0]), weights([1.0, 2.5])
    storage.put_bytes(folder + "w", other)
    with pytest.raises(StorageError) as caught:
        storage.verify_safetensors(folder + "w", bytes=len(body), sha256=sha256(body))
    assert caught.value.code == "weights_checksum"
    with pytest.raises(StorageError) as caught:
        storage.verify_safetensors(folder + "w", bytes=len(body) + 1, sha256=sha256(body))
    assert caught.value.code == "weights_size"


def test_pickle_and_runaway_numbers_are_refused(storage: Storage, folder: str) -> None:
    for body, code in (
        (b"\x80\x04" + b"pickle" * 50, "weights_format"),
        (weights([1.0, float("nan")]), "weights_not_finite"),
    ):
        storage.put_bytes(folder + "w", body)
        with pytest.raises(StorageError) as caught:
            storage.verify_safetensors(folder + "w", bytes=len(body), sha256=sha256(body))
        assert caught.value.code == code


def test_weights_that_were_never_uploaded_are_not_found(storage: Storage, folder: str) -> None:
    with pytest.raises(NotFound):
        storage.verify_safetensors(folder + "none", bytes=1, sha256="0" * 64)
    storage.put_bytes(folder + "w", b"x")
    with pytest.raises(StorageError, match="no SHA-256"):
        storage.verify(folder + "w", bytes=1, sha256="garbage")


def test_any_other_file_is_compared_by_size_and_checksum(storage: Storage, folder: str) -> None:
    storage.put_bytes(folder + "loss.csv", b"1,2,3")
    storage.verify(folder + "loss.csv", bytes=5, sha256=sha256(b"1,2,3"))
    with pytest.raises(StorageError) as caught:
        storage.verify(folder + "loss.csv", bytes=5, sha256=sha256(b"1,2,4"))
    assert caught.value.code == "weights_checksum"
