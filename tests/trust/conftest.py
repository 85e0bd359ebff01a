"""What strangers send us, handed to both sides of the house: the server and the agent."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gpu_agent.halt import Fault, Halt
from gpu_agent.pull import unpack
from state.events import Dataset, DatasetStatus
from state.memory import MemoryStore
from tasks.dataset import DatasetBuilder, upload_key


class Shelf:
    """The part of a storage that a builder uses, on a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self.objects[key])

    def put_file(self, key: str, path: Path, *, content_type: str = "") -> None:
        self.objects[key] = path.read_bytes()

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def delete_prefix(self, prefix: str) -> int:
        doomed = [key for key in self.objects if key.startswith(prefix)]
        for key in doomed:
            del self.objects[key]
        return len(doomed)


@pytest.fixture(scope="session")
def photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def build(clock: Any) -> Callable[..., Dataset]:
    """Has the server build a dataset of one uploaded file; the dataset as it is stored then."""

    def run(content: bytes, name: str = "photos.zip") -> Dataset:
        store, shelf = MemoryStore(), Shelf()
        digest = hashlib.sha256(content).hexdigest()
        made = Dataset(
            id="ds_1",
            owner="o",
            created_at=clock(),
            status=DatasetStatus.BUILDING,
            files=({"name": name, "bytes": len(content), "sha256": digest},),
        )
        with store.transaction() as tx:
            tx.add_dataset(made)
        shelf.objects[upload_key("ds_1", 0)] = content
        DatasetBuilder(store=store, storage=shelf, clock=clock).build("ds_1")
        with store.transaction() as tx:
            return tx.dataset("ds_1")

    return run


@dataclass(frozen=True)
class Unpacked:
    """`code` is the fault's, or empty; `files` is what lies on the disk afterwards."""

    code: str
    files: dict[str, bytes]


@pytest.fixture
def agent_unpacks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Unpacked]:
    """Has the agent unpack a zip, and looks at everything that it wrote around there."""

    def run(content: bytes, **limits: Any) -> Unpacked:
        place = tmp_path_factory.mktemp("agent") / "deep" / "work"
        place.mkdir(parents=True)
        archive = place / "dataset.zip"
        archive.write_bytes(content)
        code = ""
        try:
            unpack(archive, place / "images", halt=Halt(), progress=lambda done, of: None, **limits)
        except Fault as fault:
            code = fault.code if not fault.retryable else f"{fault.code}, retryable"
        archive.unlink()
        top = place.parent.parent
        left = [path for path in top.rglob("*") if path.is_file() or path.is_symlink()]
        kept = [path for path in left if "images.part" not in path.parts]
        return Unpacked(code, {str(path.relative_to(place)): path.read_bytes() for path in kept})

    return run
