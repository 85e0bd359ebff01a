"""From uploaded photographs to the dataset zip: check every image, keep the good, say why not.

Nothing of the customer's naming reaches a file system: entries get names of our own making.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image

from infra.storage import Storage
from state import policy, record
from state.errors import NotFound
from state.events import Dataset, DatasetStatus
from state.policy import Policy
from state.store import Store

#: MPO is what many phones call a JPEG with a second picture in it.
FORMATS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "TIFF": ".tif",
}
IMAGE_SUFFIXES = {*FORMATS.values(), ".jpeg", ".tiff"}
#: EXIF's tag for how a picture is turned, and its values that exchange width and height.
_ORIENTATION, _TURNED = 0x0112, frozenset({5, 6, 7, 8})
MAX_PIXELS = 100_000_000
MIN_SIDE = 64
SMALL_SIDE = 256
#: Limits of an uploaded zip, counted on the bytes that really come out.
MAX_ENTRIES = 10_000
MAX_BYTES = 5 * 2**30
MAX_RATIO = 100
MAX_CAPTION = 8_192
MAX_LIST = 32 << 20
MAX_DIRECTORY = 4 << 20
#: The trainer's names for an image's mask, and for the folder of images of the subject's class.
MASK = ".mask.png"
REGULARIZATION = "regularization"
#: Where Hugging Face's image folders have their captions.
LISTED = "metadata.jsonl"
_CHUNK = 1 << 20
#: The others are unpacked without a bound: 700 bytes of bzip2 become a gigabyte in one `read`.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: What `zipfile` and its decompressor raise on damaged or unsupported zips.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


class DatasetRefused(Exception):
    """The dataset as a whole cannot be used; the text is for the customer."""


def upload_key(dataset_id: str, index: int) -> str:
    """Where the customer PUTs the file number `index` of a dataset."""
    return f"datasets/{dataset_id}/uploads/{index:05d}"


def zip_key(dataset_id: str, sha256: str) -> str:
    """Named by its content: of two builders at once, neither can spoil the other's zip."""
    return f"datasets/{dataset_id}/{sha256}.zip"


@dataclass
class Sheet:
    """What became of each file."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    warned: list[dict[str, str]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    #: Kept, too: images of the subject's class, not of the subject.
    regularization: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, name: str, why: str) -> None:
        self.refused.append({"name": name, "why": why})

    def warn(self, name: str, why: str) -> None:
        self.warned.append({"name": name, "why": why})

    def to_dict(self, message: str = "") -> dict[str, Any]:
        report: dict[str, Any] = vars(self).copy()
        return {**report, "message": message} if message else report


@dataclass(frozen=True, kw_only=True)
class DatasetBuilder:
    store: Store
    storage: Storage
    clock: Callable[[], datetime]
    rules: Policy = policy.DEFAULT

    def build(self, dataset_id: str) -> list[str]:
        """Build the zip of a sealed dataset; ids of the jobs that it moved.

        Building twice, also at the same time, is harmless: the first to commit decides, and the
        uploads go only after that. Storage that cannot be reached raises, and the dataset stays
        due.
        """
        with self.store.transaction() as tx:
            try:
                dataset = tx.dataset(dataset_id)
            except NotFound:
                return []
        if dataset.status is not DatasetStatus.BUILDING:
            return []
        with tempfile.TemporaryDirectory(prefix="stoker-dataset-") as folder:
            built = self._built(dataset, Path(folder))
        now = self.clock()
        with self.store.transaction() as tx:
            stored = tx.dataset(dataset_id, lock=True)
            first = stored.status is DatasetStatus.BUILDING
            jobs = record.dataset_built(tx, built, now, self.rules) if first else []
        if not first:
            if built.zip_key and built.zip_key != stored.zip_key:
                self.storage.delete(built.zip_key)
            return []
        self.storage.delete_prefix(f"datasets/{dataset_id}/uploads/")
        return [job.id for job in jobs]

    def _built(self, dataset: Dataset, folder: Path) -> Dataset:
        sheet = Sheet()
        target = folder / "dataset.zip"
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
                packer = _Packer(out, sheet, folder)
                for name, stream in self._uploads(dataset, folder, sheet):
                    packer.add(name, stream)
                packer.finish()
            if not sheet.kept:
                raise DatasetRefused(_nothing_kept(sheet))
        except DatasetRefused as refusal:
            report = sheet.to_dict(str(refusal))
            return dataset.evolve(status=DatasetStatus.REFUSED, report=report)
        with target.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        key = zip_key(dataset.id, digest)
        self.storage.put_file(key, target, content_type="application/zip")
        return dataset.evolve(
            status=DatasetStatus.READY,
            report=sheet.to_dict(),
            zip_key=key,
            zip_bytes=target.stat().st_size,
            zip_sha256=digest,
        )

    def _uploads(
        self, dataset: Dataset, folder: Path, sheet: Sheet
    ) -> Iterator[tuple[str, IO[bytes]]]:
        """Every file of the dataset as (name, stream); a zip's entries one by one."""
        for index, announced in enumerate(dataset.files):
            name = str(announced.get("name", index))
            local = folder / "upload"
            try:
                self.storage.get_file(upload_key(dataset.id, index), local)
            except NotFound:
                sheet.refuse(name, "was announced but never uploaded")
                continue
            why = _differs(local, announced)
            if why:
                sheet.refuse(name, why)
            elif name.lower().endswith(".zip"):
                yield from _entries(local, name)
            else:
                with local.open("rb") as stream:
                    yield name, stream
            local.unlink(missing_ok=True)


def _differs(local: Path, announced: Mapping[str, Any]) -> str:
    """How an upload differs from what was announced; empty when it does not."""
    size, wanted = local.stat().st_size, announced.get("bytes")
    if wanted is not None and size != wanted:
        return f"has {size} bytes, announced were {wanted}: the upload was cut or changed"
    if digest := announced.get("sha256"):
        with local.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != str(digest).lower():
                return "has another SHA-256 than announced"
    return ""


def _entries(path: Path, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The files in a customer's zip. Raises DatasetRefused for anything unsafe in it."""
    with _Upload(io.FileIO(path)) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _BROKEN as error:
            raise DatasetRefused(f"{name} is not a readable zip ({error})") from None
        infos = archive.infolist()
        if len(infos) > MAX_ENTRIES:
            raise DatasetRefused(f"{name} has {len(infos)} entries; at most {MAX_ENTRIES} are read")
        _check_names(name, infos)
        budget = min(MAX_BYTES, MAX_RATIO * max(path.stat().st_size, 1 << 20))
        for info in infos:
            if info.is_dir() or _is_litter(info.filename):
                continue
            with tempfile.TemporaryFile() as held:
                budget -= _copy(archive, info, held, budget, name)
                held.seek(0)
                yield info.filename, held


class _Upload(io.BufferedReader):
    """`ZipFile` reads a directory whole, and makes half a kilobyte of each line in it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile("its directory is absurdly long")
        return super().read(size)


def _check_names(name: str, infos: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for info in infos:
        entry = PurePosixPath(info.filename.replace("\\", "/"))
        if entry.is_absolute() or ".." in entry.parts or re.match(r"^[A-Za-z]:", info.filename):
            raise DatasetRefused(f"{name} holds {info.filename!r}, a path that leads outside it")
        if not entry.parts and not info.filename.endswith("/"):
            raise DatasetRefused(f"{name} holds {info.filename!r}, which is no name of a file")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DatasetRefused(f"{name} holds {info.filename!r}, a link or special file")
        if info.filename in seen:
            raise DatasetRefused(f"{name} holds {info.filename!r} twice")
        if info.flag_bits & 0x1:
            raise DatasetRefused(f"{name} is encrypted")
        if info.compress_type not in METHODS:
            raise DatasetRefused(f"{name} is not packed as zips usually are (by deflate, or not)")
        seen.add(info.filename)


def _copy(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, out: IO[bytes], budget: int, name: str
) -> int:
    """Unpack one entry into `out`, never more than `budget` bytes."""
    written = 0
    try:
        with archive.open(info) as source:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                if written > budget:
                    raise DatasetRefused(f"{name} unpacks to far more than a photo album: refused")
                out.write(chunk)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # our disk, not the customer's zip
        raise DatasetRefused(f"{name}: {info.filename!r} cannot be unpacked ({error})") from None
    return written


def _is_litter(filename: str) -> bool:
    """What macOS and file managers leave in zips."""
    parts = PurePosixPath(filename).parts
    return "__MACOSX" in parts or parts[-1].startswith(".") or parts[-1] == "Thumbs.db"


class _Packer:
    """Writes checked images, their captions and masks into a zip, under names of our own.

    Captions and masks may come before their image or without one, so they wait until the end.
    """

    def __init__(self, out: zipfile.ZipFile, sheet: Sheet, folder: Path) -> None:
        self._out, self._sheet, self._folder = out, sheet, folder
        self._images: dict[str, _Packed] = {}
        self._digests: dict[str, str] = {}
        self._captions: dict[str, tuple[str, str]] = {}
        self._listed: dict[str, str] = {}
        self._masks: dict[str, tuple[str, Path, tuple[int, int]]] = {}

    def add(self, name: str, stream: IO[bytes]) -> None:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".txt":
            text = stream.read(MAX_CAPTION + 1).decode("utf-8", "replace").strip()
            self._captions[str(path.with_suffix(""))] = (name, text[:MAX_CAPTION])
        elif path.name == LISTED:
            self._read_list(path, stream)
        elif path.name.lower().endswith(MASK):
            self._keep_mask(name, stream)
        else:
            self._add_image(path, stream)

    def finish(self) -> None:
        """Write what waited for its image, and say what had none."""
        for key, (name, text) in sorted(self._captions.items()):
            if key in self._images:
                self._out.writestr(_info(self._images[key].stem + ".txt"), text)
            else:
                self._sheet.warn(name, "is a caption without an image of the same name")
        for key, image in self._images.items():
            if key not in self._captions and image.name in self._listed:
                self._out.writestr(_info(image.stem + ".txt"), self._listed[image.name])
        for key, (name, held, size) in sorted(self._masks.items()):
            if key not in self._images:
                self._sheet.warn(name, "is a mask without an image of the same name")
            elif self._images[key].size != size:
                self._sheet.refuse(name, "has another width or height than its image")
            else:
                with held.open("rb") as stream:
                    _write(self._out, self._images[key].stem + MASK, stream)

    def _add_image(self, path: PurePosixPath, stream: IO[bytes]) -> None:
        image = _look_at(str(path), stream, self._sheet)
        if image is None:
            return
        digest = hashlib.sha256(stream.read()).hexdigest()
        stream.seek(0)
        if digest in self._digests:
            self._sheet.warn(
                str(path), f"is the same picture as {self._digests[digest]}; kept once"
            )
            return
        self._digests[digest] = str(path)
        of_class = REGULARIZATION in path.parts[:-1]
        stem = f"{REGULARIZATION}/" * of_class + f"{len(self._images):05d}"
        suffix, width, height = image
        self._images[str(path.with_suffix(""))] = _Packed(str(path), stem, (width, height))
        _write(self._out, stem + suffix, stream)
        kept = self._sheet.regularization if of_class else self._sheet.kept
        kept.append({"name": str(path), "as": stem + suffix, "width": width, "height": height})

    def _keep_mask(self, name: str, stream: IO[bytes]) -> None:
        image = _look_at(name, stream, self._sheet)
        if image is not None:
            held = self._folder / f"mask-{len(self._masks)}"
            held.write_bytes(stream.read())
            self._masks[name[: -len(MASK)]] = (name, held, image[1:])

    def _read_list(self, path: PurePosixPath, stream: IO[bytes]) -> None:
        """Captions as Hugging Face's image folders have them: a line of JSON per image."""
        for number, line in enumerate(stream.read(MAX_LIST).splitlines(), start=1):
            try:
                said = json.loads(line)
                image, text = said["file_name"], said["text"]
                self._listed[str(path.parent / image)] = str(text).strip()[:MAX_CAPTION]
            except (ValueError, KeyError, TypeError, RecursionError):
                why = f'line {number} is not {{"file_name": …, "text": …}}'
                self._sheet.warn(str(path), why)
                return


@dataclass(frozen=True)
class _Packed:
    """An image in the zip: what its customer called it, our name without suffix, its size."""

    name: str
    stem: str
    size: tuple[int, int]


def _look_at(name: str, stream: IO[bytes], sheet: Sheet) -> tuple[str, int, int] | None:
    """Decode an image fully; its suffix, width and height in pixels as it is looked at, or None
    when refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused below by size
            with Image.open(stream) as image:
                kind, (width, height) = image.format or "", image.size
                if kind not in FORMATS:
                    sheet.refuse(name, f"is {kind}; use JPEG, PNG, WebP, AVIF, BMP or TIFF")
                    return None
                if width * height > MAX_PIXELS:
                    sheet.refuse(name, f"has {width}x{height} pixels; at most 100 million")
                    return None
                image.load()
                if image.getexif().get(_ORIENTATION) in _TURNED:
                    width, height = height, width
    except Exception:  # noqa: BLE001 -- of damaged files, each decoder raises what it likes
        sheet.refuse(name, _why_no_image(name))
        return None
    finally:
        stream.seek(0)
    if min(width, height) < MIN_SIDE:
        sheet.refuse(name, f"is only {width}x{height} pixels; at least {MIN_SIDE} on each side")
        return None
    if min(width, height) < SMALL_SIDE:
        sheet.warn(name, f"is only {width}x{height} pixels; {SMALL_SIDE} and more train better")
    return FORMATS[kind], width, height


def _why_no_image(name: str) -> str:
    if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
        return "is no image, whatever its name says, or is damaged"
    return "is no image"


def _write(out: zipfile.ZipFile, name: str, stream: IO[bytes]) -> None:
    with out.open(_info(name), "w") as target:
        while chunk := stream.read(_CHUNK):
            target.write(chunk)


def _info(name: str) -> zipfile.ZipInfo:
    # A fixed time, so that equal images make equal zips.
    return zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))


def _nothing_kept(sheet: Sheet) -> str:
    if not sheet.refused:
        return "the dataset has no image"
    first = sheet.refused[0]
    more = f" (and {len(sheet.refused) - 1} more)" if len(sheet.refused) > 1 else ""
    return f"no usable image: {first['name']} {first['why']}{more}"
