"""Files onto the machine: downloads that survive cut lines, zips and models that are looked at.

Nothing that arrives is trusted: lengths and SHA-256 are compared while streaming, a zip is
unpacked by counting what really comes out of it, and a model must be a whole safetensors file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import shutil
import stat
import struct
import threading
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import requests

from gpu_agent.halt import Fault, Halt
from gpu_agent.wire import Download

log = logging.getLogger(__name__)

CHUNK = 1 << 20
#: Read from the line at once; when it is cut, less than this is lost (bytes).
SIP = 1 << 16
#: Connecting, and waiting for each part of an answer (seconds).
TIMEOUT = (10.0, 30.0)
#: Waits between tries that brought no byte (seconds); after the last one it is a fault.
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0)
#: An address that expired, or that the storage does not know: another one may do.
STALE_URL = frozenset({401, 403, 404, 410})
#: How programs say, in small letters, that the disk is full.
NO_SPACE = "no space left on device"
#: Room that is left on the disk beside what we put there (bytes).
MARGIN = 256 << 20

#: How long the line is watched before it is judged, and what a wait for the next bytes counts at
#: most: a source that says nothing says nothing about the line either (seconds).
RATE_WINDOW_S = 20.0
LONGEST_WAIT_S = 1.0

Progress = Callable[[int, int], None]


def _unwatched(amount: int) -> None:
    """Nobody counts."""


class Line:
    """This machine's way to the world: how fast all downloads together are.

    Rates are in Mbit/s. Safe to use from several threads.

    Args:
        least: the downloads' first `RATE_WINDOW_S` must be at least as fast; 0 asks nothing.
        most: what is more is slowed down to this; 0 does not.
        moved: called with the number of bytes that came.
    """

    def __init__(
        self,
        *,
        least: float = 0.0,
        most: float = 0.0,
        moved: Callable[[int], None] = _unwatched,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._least, self._most, self._moved = least, most, moved
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._open = 0
        self._last = self._seconds = self._free_at = 0.0
        self._bytes = 0
        self._judged = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While a body is coming in."""
        with self._lock:
            if not self._open:
                self._last = self._monotonic()
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def took(self, count: int) -> float:
        """So many bytes came; how long the caller is to wait for the next ones.

        Raises:
            Fault: `host.slow`.
        """
        self._moved(count)
        with self._lock:
            now = self._monotonic()
            self._seconds += min(now - self._last, LONGEST_WAIT_S)
            self._last = now
            self._bytes += count
            rate = self._rate()
            if not self._judged and self._seconds >= RATE_WINDOW_S:
                self._judged = True
                if rate < self._least:
                    raise Fault(
                        "host.slow",
                        f"downloads come with {rate:.1f} Mbit/s, at least {self._least:g} are"
                        " wanted",
                        retryable=True,
                    )
            if not self._most:
                return 0.0
            self._free_at = max(now, self._free_at) + count * 8e-6 / self._most
            return self._free_at - now

    @property
    def mbps(self) -> float | None:
        """How fast it was so far; None before anything came."""
        with self._lock:
            return round(self._rate(), 1) if self._seconds else None

    def _rate(self) -> float:
        return self._bytes * 8e-6 / self._seconds if self._seconds else 0.0


class _Paced:
    """Calls `progress` at most once a second, and once at the end."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._last = progress, total, -math.inf

    def __call__(self, done: int, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._last >= 1.0:
            self._last = now
            self._progress(done, self._total or done)


def check_space(folder: Path, needed: int) -> None:
    """Raises: Fault `host.disk_full` when `needed` bytes (and a margin) do not fit.

    What an earlier run of the agent left in `folder` counts as room: it is taken up again.
    """
    here = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
    free = shutil.disk_usage(folder).free + here
    if free < needed + MARGIN:
        raise Fault(
            "host.disk_full",
            f"{needed / 1e9:.2f} GB are to be stored, {free / 1e9:.2f} GB are free",
            retryable=True,
        )


def disk_full() -> Fault:
    return Fault("host.disk_full", "no space is left on the disk", retryable=True)


@contextlib.contextmanager
def disk_faults() -> Iterator[None]:
    """A full disk as a `Fault`, wherever it is noticed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full() from None
        raise


# --- downloads --------------------------------------------------------------------------------


def pull(
    download: Download,
    path: Path,
    *,
    fresh: Callable[[], Download],
    halt: Halt,
    progress: Progress,
    mismatch: str,
    line: Line | None = None,
    moved: Callable[[int], None] = _unwatched,
    delays: Sequence[float] = DELAYS,
) -> Path:
    """Fetch `download` to `path`, going on where an earlier try was cut off.

    Args:
        fresh: asks for a new address when the present one has expired.
        progress: is told bytes so far and in all.
        mismatch: the fault's code when length or SHA-256 stay wrong.
        line: what all downloads share.
        moved: called with the number of bytes that were here already and were read again.

    Raises:
        Fault: `mismatch`, `download.failed`, `host.slow` or `host.disk_full`.
        Halted: the work was told to end.
    """
    fetch = _Fetch(
        download,
        path,
        fresh=fresh,
        halt=halt,
        progress=progress,
        line=line or Line(),
        moved=moved,
        delays=delays,
    )
    with disk_faults():
        for _ in range(2):  # a file that is wrong once may have been garbled on the way
            if fetch.whole():
                return path
            wrong = fetch.wrong
            log.warning("%s: %s", download.name, wrong)
    raise Fault(mismatch, f"{download.name}: {wrong}", retryable=False)


class _Fetch:
    """One file on its way. The part that is here is hashed as it grows."""

    def __init__(
        self,
        download: Download,
        path: Path,
        *,
        fresh: Callable[[], Download],
        halt: Halt,
        progress: Progress,
        line: Line,
        moved: Callable[[int], None],
        delays: Sequence[float],
    ) -> None:
        self._wanted, self._path, self._halt = download, path, halt
        self._line, self._moved = line, moved
        self._part = path.with_name(path.name + ".part")
        self._fresh, self._delays = fresh, delays
        self._tell = _Paced(progress, download.bytes)
        self._url = download.url
        self._session = requests.Session()
        self._session.trust_env = False
        self._hash = hashlib.sha256()
        self._size = 0
        self.wrong = ""

    def whole(self) -> bool:
        """Fetch to the end; False (and nothing kept) when it is not what was promised."""
        if self._path.exists():
            self._path.replace(self._part)  # of an earlier run of the agent: checked like new
        self._take_up()
        try:
            if not self._complete():
                self._stream_until_complete()
            self._tell(self._size, final=True)
            self.wrong = self._fault()
        except _Wrong as wrong:
            self.wrong = str(wrong)
        if self.wrong:
            self._part.unlink()
            return False
        self._part.replace(self._path)
        return True

    def _take_up(self) -> None:
        self._hash, self._size = hashlib.sha256(), 0
        self._part.touch()
        with self._part.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                self._halt.check()
                self._grow(chunk)
                self._moved(len(chunk))

    def _grow(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._size += len(chunk)

    def _complete(self) -> bool:
        return 0 < self._wanted.bytes <= self._size

    def _fault(self) -> str:
        wanted = self._wanted
        if wanted.bytes and self._size != wanted.bytes:
            return f"{self._size} bytes arrived where {wanted.bytes} were promised"
        if wanted.sha256 and self._hash.hexdigest() != wanted.sha256:
            return f"its SHA-256 is {self._hash.hexdigest()}, not {wanted.sha256}"
        return ""

    def _stream_until_complete(self) -> None:
        idle = furthest = 0
        while True:
            try:
                if self._stream():
                    return
                why = "the line was cut"
            except requests.RequestException as error:
                why = type(error).__name__  # its text holds the signed address
            except _Refusal as refusal:
                why = f"answered with {refusal.status}"
                if refusal.status in STALE_URL:
                    self._url = self._fresh().url
            idle = 0 if self._size > furthest else idle + 1
            furthest = max(furthest, self._size)
            log.info("%s at %d bytes: %s", self._wanted.name, self._size, why)
            if idle > len(self._delays):
                raise Fault("download.failed", f"{self._wanted.name}: {why}", retryable=True)
            self._halt.sleep(self._delays[max(idle - 1, 0)])

    def _stream(self) -> bool:
        """One request, from where we are; whether its body came to its end."""
        headers = {"accept-encoding": "identity"}
        if self._size:
            headers["range"] = f"bytes={self._size}-"
        with self._session.get(self._url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            self._aim(answer)
            with self._part.open("ab") as part, self._line.used():
                self._copy(answer, part)
        return self._complete() or not self._wanted.bytes

    def _aim(self, answer: requests.Response) -> None:
        """See where the body begins: at our end, or (range not understood) at the start.

        Raises: _Refusal, _Wrong.
        """
        status = answer.status_code
        total = _total(answer)
        if total is not None and self._wanted.bytes not in (0, total):
            raise _Wrong(f"{total} bytes are there where {self._wanted.bytes} were promised")
        if status == 206 and _range_start(answer) == self._size:
            return
        if status in (200, 206, 416):
            self._restart()
        if status != 200:
            raise _Refusal(status)

    def _restart(self) -> None:
        with self._part.open("wb"):
            self._hash, self._size = hashlib.sha256(), 0

    def _copy(self, answer: requests.Response, part: BinaryIO) -> None:
        for chunk in answer.iter_content(SIP):
            self._halt.check()
            part.write(chunk)
            self._grow(chunk)
            self._tell(self._size)
            if (pause := self._line.took(len(chunk))) > 0:
                self._halt.sleep(pause)
            if 0 < self._wanted.bytes < self._size:
                return  # longer than promised: no need to see how much longer


class _Refusal(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Wrong(Exception):
    """What is offered cannot be what was promised."""


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _range_start(answer: requests.Response) -> int | None:
    unit, _, rest = answer.headers.get("content-range", "").partition(" ")
    return _number(rest.partition("-")[0]) if unit == "bytes" else None


def _total(answer: requests.Response) -> int | None:
    """The length of the whole file, as far as the answer says it."""
    if answer.status_code in (206, 416):
        return _number(answer.headers.get("content-range", "").partition("/")[2])
    if answer.status_code == 200 and "content-encoding" not in answer.headers:
        return _number(answer.headers.get("content-length", ""))
    return None


# --- the dataset's zip ------------------------------------------------------------------------

MAX_ENTRIES = 10_000
MAX_TOTAL = 5 << 30
MAX_RATIO = 100
#: Entries smaller than this may be packed as tightly as they like (bytes).
RATIO_FROM = 1 << 20
MAX_DIRECTORY = 4 << 20
#: The others are unpacked without a bound: 700 bytes of bzip2 become a gigabyte in one `read`.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def _unsafe(message: str) -> Fault:
    return Fault("dataset.unsafe", message, retryable=False)


def _corrupt(message: str) -> Fault:
    return Fault("dataset.corrupt", message, retryable=False)


#: What `zipfile` raises for a file that is damaged or uses what it does not know.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
)


def unpack(
    path: Path,
    target: Path,
    *,
    halt: Halt,
    progress: Progress,
    moved: Callable[[int], None] = _unwatched,
    max_total: int = MAX_TOTAL,
) -> int:
    """Unpack the dataset to the new folder `target`; the number of its images.

    Names, kinds and number of entries are looked at before the first byte is written; sizes are
    counted on what really comes out. `target` appears only when all of it is there.

    Args:
        moved: called with the number of bytes that came out.

    Raises:
        Fault: `dataset.corrupt`, `dataset.unsafe`, `dataset.empty` or `host.disk_full`.
        Halted: the work was told to end.
    """
    growing = target.with_name(target.name + ".part")
    shutil.rmtree(growing, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        with disk_faults(), _Zip(io.FileIO(path)) as stream, zipfile.ZipFile(stream) as archive:
            entries = _checked(archive.infolist(), max_total)
            _extract(archive, entries, growing, halt, progress, moved, max_total)
    except _UNREADABLE as error:
        raise _corrupt(f"the dataset's zip cannot be read: {error}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to before the file's start, by its directory
            raise
        raise _corrupt("the directory of the dataset's zip leads nowhere") from None
    growing.replace(target)
    return sum(name.suffix.lower() in IMAGE_SUFFIXES for name in entries)


class _Zip(io.BufferedReader):
    """`ZipFile` reads a directory whole, and makes half a kilobyte of each line in it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise _unsafe("the directory of the dataset's zip is absurdly long")
        return super().read(size)


def _checked(
    entries: Sequence[zipfile.ZipInfo], max_total: int
) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files to unpack by their path within the dataset."""
    if len(entries) > MAX_ENTRIES:
        raise _unsafe(f"the dataset's zip has {len(entries)} entries; {MAX_ENTRIES} may be")
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    folders: set[str] = set()
    for entry in entries:
        name = _safe_name(entry)
        folders.update(_same(parent) for parent in name.parents if parent.name)
        if entry.is_dir():
            folders.add(_same(name))
            continue
        if _same(name) in seen:
            raise _unsafe(f"{entry.filename!r} is in the dataset's zip twice")
        seen.add(_same(name))
        files[name] = entry
    if clash := seen & folders:
        raise _unsafe(f"{min(clash)!r} is both a file and a folder in the dataset's zip")
    if sum(entry.file_size for entry in files.values()) > max_total:
        raise _unsafe(f"the dataset unpacks to more than {max_total} bytes")
    if not any(name.suffix.lower() in IMAGE_SUFFIXES for name in files):
        raise Fault("dataset.empty", "there is no image in the dataset's zip", retryable=False)
    return files


def _same(name: PurePosixPath) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def _safe_name(entry: zipfile.ZipInfo) -> PurePosixPath:
    raw = entry.orig_filename
    parts = raw.replace("\\", "/").rstrip("/").split("/")
    if (
        not raw
        or any(
            part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts
        )
        or ":" in parts[0]
        or not raw.isprintable()
    ):
        raise _unsafe(f"{raw[:200]!r} is no path to unpack to")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _unsafe(f"{raw[:200]!r} is a link or a device")
    if entry.flag_bits & 0x1:
        raise _corrupt(f"{raw[:200]!r} is encrypted")
    if entry.compress_type not in METHODS:
        raise _unsafe(f"{raw[:200]!r} is packed in a way that we do not unpack")
    return PurePosixPath(*parts)


def _extract(
    archive: zipfile.ZipFile,
    entries: dict[PurePosixPath, zipfile.ZipInfo],
    folder: Path,
    halt: Halt,
    progress: Progress,
    moved: Callable[[int], None],
    max_total: int,
) -> None:
    tell = _Paced(progress, len(entries))
    total = 0
    for number, (name, entry) in enumerate(entries.items()):
        tell(number)
        goal = folder / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with archive.open(entry) as source, goal.open("xb") as sink:
            while chunk := source.read(CHUNK):
                halt.check()
                size += len(chunk)
                total += len(chunk)
                if total > max_total:
                    raise _unsafe(f"the dataset unpacks to more than {max_total} bytes")
                if size > max(RATIO_FROM, MAX_RATIO * entry.compress_size):
                    raise _unsafe(f"{entry.filename!r} unpacks to over {MAX_RATIO} times its size")
                sink.write(chunk)
                moved(len(chunk))
    tell(len(entries), final=True)


# --- models -----------------------------------------------------------------------------------

MAX_HEADER = 100_000_000
#: Bytes of one element; a dtype that is not here has its shape unchecked.
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def check_safetensors(path: Path) -> int:
    """Look at a model's header; the number of its tensors.

    Raises:
        Fault: `model.unsafe` for a pickle, for anything else that is no safetensors file, and
            for one that is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        (length,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _no_model(head, "its header does not fit into it")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        end = _contiguous(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _no_model(head, "its header cannot be read") from None
    if end != size - 8 - length:
        raise _no_model(b"", f"its tensors end at byte {8 + length + end} of {size}")
    return len(header) - ("__metadata__" in header)


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _no_model(head: bytes, why: str) -> Fault:
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        why = "it is a pickle, which could run any program; only safetensors are taken"
    return Fault(
        "model.unsafe", f"the base model is no whole safetensors file: {why}", retryable=False
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _contiguous(header: dict[str, Any]) -> int:
    """Where the last tensor ends. Raises ValueError (or a lookup's error) for any flaw."""
    spans = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        (begin, end), shape = tensor["data_offsets"], tensor["shape"]
        item = ITEM_BYTES.get(tensor["dtype"])
        # Looked at before they are multiplied: of digits without end, that takes time without end.
        if not isinstance(shape, list) or len(shape) > 16:
            raise ValueError(name)
        if not all(_is_size(number) for number in (begin, end, *shape)):
            raise ValueError(name)
        if end < begin or (item is not None and end - begin != math.prod(shape) * item):
            raise ValueError(name)
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError("a hole or an overlap")
        at = end
    if not spans:
        raise ValueError("no tensors")
    return at
