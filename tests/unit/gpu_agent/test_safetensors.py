"""A model is a whole safetensors file, or it is refused."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_agent.halt import Fault
from gpu_agent.pull import check_safetensors


def model(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


GOOD = model({"__metadata__": {"format": "pt"}, "b": tensor(4, 8), "a": tensor(0, 4)}, bytes(8))


def refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Fault) as caught:
        check_safetensors(path)
    assert (caught.value.code, caught.value.retryable) == ("model.unsafe", False)
    return caught.value.message


def test_a_whole_model_is_accepted(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    assert check_safetensors(path) == 2


def test_what_the_safetensors_library_writes_is_accepted(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    path = tmp_path / "model.safetensors"
    kinds = ["f2", "f4", "i8", "u1", "?"]
    tensors = {f"t{n}": np.zeros((n, 3), dtype=d) for n, d in enumerate(kinds)}
    numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert check_safetensors(path) == 5


def zipped_pickle():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return target.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_called_one(tmp_path, protocol):
    assert "pickle" in refused(tmp_path, pickle.dumps({"weights": [1.0] * 50}, protocol))


def test_a_zipped_pickle_is_called_one(tmp_path):
    assert "pickle" in refused(tmp_path, zipped_pickle())


def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path):
    header = json.dumps({"a": tensor(0, 4)}).encode()
    content = model(header.ljust(0x280), bytes(4))
    assert content.startswith(b"\x80\x02")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert check_safetensors(path) == 1


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, len(GOOD) - 1])
def test_a_truncated_model_is_refused(tmp_path, length):
    refused(tmp_path, GOOD[:length])


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"x",
        model({}, b""),
        model({"__metadata__": {}}, b""),
        model(b"[1, 2]", b""),
        model(b"{not json", b""),
        model(b"[" * 100_000, b""),
        model({"a": tensor(0, 4), "b": tensor(5, 8)}, bytes(8)),
        model({"a": tensor(0, 5), "b": tensor(4, 8)}, bytes(8)),
        model({"a": tensor(0, 8, shape=[3])}, bytes(8)),
        model({"a": tensor(0, 8, dtype="F32", shape=[8])}, bytes(8)),
        model({"a": tensor(-4, 4, shape=[8])}, bytes(4)),
        model({"a": tensor(0, 4, dtype="NEW", shape=[True, -4])}, bytes(4)),
        model({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
        model({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, bytes(4)),
        model({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, "4"]}}, bytes(4)),
        model({"a": {"dtype": [], "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        model({"a": None}, bytes(4)),
        struct.pack("<Q", 1 << 40) + bytes(100),
        struct.pack("<Q", 2**64 - 1) + bytes(100),
        b"<html>you must log in to download this model</html>",
    ],
)
def test_a_flawed_model_is_refused(tmp_path, content):
    refused(tmp_path, content)


@given(st.binary(max_size=300), st.integers(0, 40))
def test_any_garbage_is_one_fault(tmp_path_factory, garbage, length):
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    for content in (garbage, model(garbage[:length], garbage[length:])):
        path.write_bytes(content)
        with pytest.raises(Fault):
            check_safetensors(path)
