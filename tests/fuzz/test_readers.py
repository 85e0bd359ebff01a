"""Whatever is handed to a reader, it reads it or raises the error that it says it raises.

`tests/wire/test_garbage.py` does this for reports, specs, recipes and signatures.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import socket
import struct
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gpu_agent.halt import Fault, Halt
from gpu_agent.pull import check_safetensors, unpack
from gpu_agent.wire import SignatureError
from infra import guard
from infra.models import BaseError, BaseResolver
from infra.safetensors import read_weights
from infra.sandbox.faults import read_faults
from infra.settings import Settings, SettingsError
from orchestrator.agent_api import FilesWanted, Hello
from orchestrator.api.problems import Refusal
from orchestrator.vast_hints import Hint, verify
from state import record
from state.errors import StorageError
from state.events import Dataset, DatasetStatus, OutgoingStatus
from state.job import JobRequest
from state.memory import MemoryStore
from tasks.dataset import DatasetBuilder
from tasks.relay import Answer, Relay

#: One may ask for many more: `STOKER_FUZZ=10000` takes minutes.
SETTINGS = settings(max_examples=int(os.environ.get("STOKER_FUZZ", "100")), deadline=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    """`content` with some bytes replaced; a place is counted from the end, where zips begin."""
    spoilt = bytearray(content)
    for back, value in changes:
        spoilt[-1 - back % len(spoilt)] = value
    return bytes(spoilt)


spots = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8)

# --- datasets: zips and photographs ---------------------------------------------------------------


def photo(kind: str) -> bytes:
    with io.BytesIO() as out:
        Image.linear_gradient("L").resize((70, 66)).convert("RGB").save(out, kind)
        return out.getvalue()


PHOTOS = {kind: photo(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")}


def zipped(method: int, *, large: bool) -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w", method) as archive:
            with archive.open("dogs/a.jpg", "w", force_zip64=large) as entry:
                entry.write(PHOTOS["JPEG"])
            archive.writestr("dogs/a.txt", "a dog")
        return stream.getvalue()


ZIPS = [zipped(method, large=large) for method in (0, 8) for large in (False, True)]


class Shelf:
    """Holds one upload."""

    def __init__(self, upload: bytes) -> None:
        self._upload = upload

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self._upload)

    def put_file(self, key: str, path: Path, *, content_type: str = "") -> None:
        assert zipfile.ZipFile(path).testzip() is None

    def delete(self, key: str) -> None:
        """Nothing is kept."""

    def delete_prefix(self, prefix: str) -> int:
        return 1


def built(name: str, upload: bytes) -> Dataset:
    """The dataset that the server makes of one upload."""
    store = MemoryStore()
    made = Dataset(
        id="ds_1",
        owner="o",
        created_at=noon(),
        status=DatasetStatus.BUILDING,
        files=({"name": name, "bytes": len(upload)},),
    )
    with store.transaction() as tx:
        tx.add_dataset(made)
    DatasetBuilder(store=store, storage=Shelf(upload), clock=noon).build("ds_1")
    with store.transaction() as tx:
        return tx.dataset("ds_1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def noon() -> datetime:
    return datetime(2026, 11, 22, 12, tzinfo=UTC)


@SETTINGS
@given(st.sampled_from(ZIPS), spots)
def test_any_zip_is_built_or_refused_by_the_server(content: bytes, spoilt: Any) -> None:
    dataset = built("photos.zip", changed(content, spoilt))
    assert dataset.status in (DatasetStatus.READY, DatasetStatus.REFUSED)
    json.dumps(dataset.report)


@SETTINGS
@given(st.sampled_from(ZIPS), spots)
def test_any_zip_is_unpacked_or_refused_by_the_agent(
    folder: Path, content: bytes, spoilt: Any
) -> None:
    path = folder / "dataset.zip"
    path.write_bytes(changed(content, spoilt))
    with contextlib.suppress(Fault):
        unpack(path, folder / "images", halt=Halt(), progress=lambda done, of: None)
    assert {item.name for item in folder.iterdir()} <= {"dataset.zip", "images", "images.part"}


@SETTINGS
@given(st.sampled_from(sorted(PHOTOS)), spots, st.integers(0, 5000))
def test_any_photograph_is_kept_or_refused(kind: str, spoilt: Any, cut: int) -> None:
    content = changed(PHOTOS[kind], spoilt)
    dataset = built(f"a.{kind.lower()}", content[: len(content) - cut] or b"x")
    assert dataset.status in (DatasetStatus.READY, DatasetStatus.REFUSED)


# --- models ---------------------------------------------------------------------------------------

tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "?"]) | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=1, max_size=3) | json_values,
    }
)


@SETTINGS
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), tensors | json_values),
    st.binary(max_size=64),
    st.integers(-2, 2),
)
def test_any_safetensors_file_is_read_or_refused_by_both(
    folder: Path, header: Any, body: bytes, off: int
) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) + off)) + text + body
    server = agent = True
    try:
        read_weights(io.BytesIO(content), len(content), lambda part: None)
    except StorageError as error:
        server = error.code == "weights_not_finite"
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        check_safetensors(path)
    except Fault:
        agent = False
    assert agent or not server, "what the server takes, an agent can resume from"


# --- answers of strangers' servers ----------------------------------------------------------------

heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 X\r\nLocation: ", b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.0 200\r\nContent-Length: ", b"HTTP/1.1 503 x\r\nRetry-After: ", b"",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n", b"HTTP/1.1 999999 \r\n",
    ]
)  # fmt: skip


@SETTINGS
@given(heads, st.binary(max_size=300) | st.text("0123456789abcdef\r\n:; -", max_size=80), heads)
def test_any_answer_to_a_webhook_is_an_answer_or_a_guard_error(
    head: bytes, middle: Any, tail: bytes
) -> None:
    here, there = socket.socketpair()
    with here, there, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", lambda *args, **named: here)
        there.sendall(head + (middle if isinstance(middle, bytes) else middle.encode()) + tail)
        there.shutdown(socket.SHUT_WR)
        with contextlib.suppress(guard.GuardError):
            answer = guard.guarded_request(
                "POST", "http://127.0.0.1/", body=b"{}", allow_private=True, timeout=5
            )
            assert len(answer.body) <= guard.LARGEST_ANSWER


#: What a server can send as a header: bytes, read as Latin-1.
header_text = st.text(st.characters(max_codepoint=255), max_size=40)


@SETTINGS
@given(
    st.integers(100, 999),
    header_text
    | st.sampled_from(
        ["\u00b2", "9" * 5000, "1e9", "Sun, 22 Nov 99999 12:10:00 GMT", "Sun, 22 Nov 0001 -9999"]
    ),
)
def test_any_answer_leaves_a_webhook_delivered_or_due_again(status: int, retry_after: str) -> None:
    store = MemoryStore()
    with store.transaction() as tx:
        tx.add_dataset(Dataset(id="ds_1", owner="o", created_at=noon(), status=DatasetStatus.READY))
        request = JobRequest(
            dataset_id="ds_1", base="civitai:1", webhook_url="https://customer.example/"
        )
        record.create_job(tx, request, owner="o", now=noon(), job_id="job_1")
    relay = Relay(
        store=store,
        post=lambda url, **named: Answer(status, {"retry-after": retry_after}),
        clock=noon,
        random=random.Random(1),
    )
    relay.relay("job_1")
    with store.transaction() as tx:
        (row,) = tx.list_outgoing("job_1")
    if row.status is OutgoingStatus.WAITING:
        assert 0 < (row.due_at - noon()).total_seconds() <= 86_400


records = st.dictionaries(
    st.sampled_from(
        ["files", "model", "name", "sizeKB", "hashes", "downloadUrl", "siblings", "sha"]
    ),
    json_values,
) | st.fixed_dictionaries({"files": st.lists(json_values, max_size=2)})


@SETTINGS
@given(
    st.sampled_from(["civitai:1", "hf:a/b", "hf:a/b@c/d.safetensors", "https://m.example/x?y"]),
    st.sampled_from(["sd1", "flux"]),
    st.lists(
        st.builds(
            guard.Response,
            status=st.sampled_from([200, 206, 301, 302, 307, 401, 404, 410, 429, 500, 599]),
            headers=st.dictionaries(
                st.sampled_from(["Location", "Content-Length", "Content-Range"]), header_text
            ),
            body=st.binary(max_size=40) | records.map(lambda value: json.dumps(value).encode()),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_answer_about_a_base_model_is_a_model_or_its_error(
    base: str, family: str, answers: Any
) -> None:
    told = iter([*answers, *answers[-1:] * 20])
    resolver = BaseResolver(
        None,
        civitai_url="https://civitai.example",
        huggingface_url="https://hub.example",
        http=lambda *args, **named: next(told),
    )
    with contextlib.suppress(BaseError):
        assert all(part.bytes >= 0 for part in resolver.resolve(base, family))


# --- requests -------------------------------------------------------------------------------------


@SETTINGS
@given(
    st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(
            ["token", "nonce", "version", "put", "get", "event_id", "notif_type", "data", "name"]
        ),
        json_values,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_body_is_a_request_or_refused(body: bytes) -> None:
    for read in (Hello.from_bytes, FilesWanted.from_bytes, Hint.from_bytes):
        with contextlib.suppress(Refusal):
            read(body)


@SETTINGS
@given(st.binary(max_size=40), header_text, header_text | header_text.map("sha256=".__add__))
def test_no_garbage_is_a_notification_of_vast(body: bytes, stamp: str, signature: str) -> None:
    with pytest.raises(SignatureError):
        verify(body, stamp, signature, secret="s", now=1_795_348_999.0)
    with pytest.raises(SignatureError):
        verify(body, "1795348999", signature, secret="s", now=1_795_348_999.0)


# --- files and variables of the operator's --------------------------------------------------------

fault_keys = (
    "op", "kind", "after", "nth", "times", "status", "body", "seconds", "chance", "machine", "at",
    "after_s", "text", "shape",
)  # fmt: skip
fault_items = st.dictionaries(
    st.sampled_from(fault_keys) | st.text(max_size=4),
    st.sampled_from(["create", "*", "list", "drop", "delay", "status", "html", "outbid", "offline"])
    | json_values,
    max_size=6,
)


@SETTINGS
@given(st.text(max_size=40) | st.lists(fault_items, max_size=2).map(json.dumps))
def test_any_faults_file_is_a_plan_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        read_faults(text)


@SETTINGS
@given(
    st.dictionaries(
        st.sampled_from(sorted(Settings().to_env())),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
        | st.sampled_from(["nan", "inf", "-inf", "-1", "1e400", "0", "1", "1_0", "\u0663"]),
        max_size=4,
    )
)
def test_any_environment_is_settings_or_their_error(env: dict[str, str]) -> None:
    with contextlib.suppress(SettingsError):
        read = Settings.from_env(env)
        assert Settings.from_env(read.to_env()) == read
        assert "/" not in read.deployment, "another installation's prefix would begin with ours"
        for number in (read.vast_pace, read.lease_hours, read.retention_days):
            assert math.isfinite(number)
            assert number >= 0
        assert read.limits.per_hour >= 0, "a limit below nothing would be none"
