"""A corpus of hostile and of merely odd zips, for both readers: server and agent.

Each is refused in words or read rightly, by either; nothing is written outside, nothing else is
raised, and no more comes out than the limits say, whatever the headers claim.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import io
import lzma
import re
import stat
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from state.events import DatasetStatus

STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14


@contextlib.contextmanager
def measured() -> Iterator[list[int]]:
    """The most bytes that Python held inside the block, in the list's only place afterwards."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def entry(
    name: bytes,
    body: bytes,
    *,
    method: int = STORED,
    packed: bytes | None = None,
    mode: int = 0,
    flags: int = 0,
    crc: int | None = None,
    says: int | None = None,
    local: bytes | None = None,
    at: int | None = None,
    extra: bytes = b"",
    version: int = 20,
) -> dict[str, Any]:
    """One file of `archive`. `says` is the size that it claims, `local` its name in its own header,
    `at` an offset of somebody else's data."""
    return {
        "name": name, "method": method, "packed": body if packed is None else packed,
        "size": len(body) if says is None else says, "mode": mode, "flags": flags,
        "crc": zlib.crc32(body) if crc is None else crc,
        "local": name if local is None else local, "at": at, "extra": extra,
        "version": version,
    }  # fmt: skip


def good(photo: bytes) -> dict[str, Any]:
    return entry(b"good.jpg", photo)


def archive(
    *entries: dict[str, Any],
    head: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
    directory_bytes: int | None = None,
    before_end: Callable[[int, int, int], bytes] = lambda start, length, count: b"",
) -> bytes:
    """A zip byte by byte, so that it may lie."""
    out, directory = bytearray(head), bytearray()
    for item in entries:
        offset = len(out) if item["at"] is None else item["at"]
        fields = (
            item["version"],
            item["flags"],
            item["method"],
            0,
            33,
            item["crc"],
            len(item["packed"]),
        )
        if item["at"] is None:
            out += struct.pack("<4s5H3I2H", b"PK\3\4", *fields, item["size"], len(item["local"]), 0)
            out += item["local"] + item["packed"]
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0x314, *fields, item["size"], len(item["name"]),
            len(item["extra"]), 0, 0, 0, item["mode"] << 16, offset,
        )  # fmt: skip
        directory += item["name"] + item["extra"]
    number = len(entries) if count is None else count
    length = len(directory) if directory_bytes is None else directory_bytes
    start = len(out)
    out += directory + before_end(start, length, number)
    few = min(number, 0xFFFF)
    return bytes(out) + struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(length, 0xFFFFFFFF), start, len(comment)
    ) + comment  # fmt: skip


def zip64(start: int, length: int, count: int) -> bytes:
    """The records of the large format, which stand before the usual end."""
    record = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start
    )  # fmt: skip
    return record + struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)


def deflated(body: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(body) + packer.flush()


def lzma_packed(body: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16}]
    raw = lzma.compress(body, lzma.FORMAT_RAW, filters=filters)
    return struct.pack("<BBHBI", 9, 4, 5, 93, 1 << 16) + raw


@cache
def bomb(method: int) -> dict[str, Any]:
    """Nothing, and much of it: more than deflate may become, or than a reader should hold."""
    pack = {DEFLATED: deflated, BZIP2: bz2.compress, LZMA: lzma_packed}[method]
    body = bytes((110 if method == DEFLATED else 32) << 20)
    return entry(b"bomb.jpg", body, method=method, packed=pack(body))


def overlapping() -> bytes:
    """Two hundred files that are one and the same 4 MiB."""
    body = bytes(4 << 20)
    packed = deflated(body)
    names = [b"%d.jpg" % number for number in range(200)]
    return archive(
        *(
            entry(name, body, method=DEFLATED, packed=packed, at=0 if number else None)
            for number, name in enumerate(names)
        )
    )


LINK, DEVICE, PIPE = stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666, stat.S_IFIFO | 0o666

#: By name: how it is made of one good photograph.
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "absolute": lambda photo: archive(good(photo), entry(b"/etc/evil.jpg", photo)),
    "parent": lambda photo: archive(good(photo), entry(b"../../evil.jpg", photo)),
    "parent deep inside": lambda photo: archive(
        good(photo), entry(b"a/b/../../../evil.jpg", photo)
    ),
    "parent by backslash": lambda photo: archive(good(photo), entry(b"..\\..\\evil.jpg", photo)),
    "a drive": lambda photo: archive(good(photo), entry(b"C:/evil.jpg", photo)),
    "no name": lambda photo: archive(good(photo), entry(b"", photo)),
    "a name of one dot": lambda photo: archive(good(photo), entry(b".", photo)),
    "a name of one slash": lambda photo: archive(good(photo), entry(b"/", photo)),
    "symlink": lambda photo: archive(good(photo), entry(b"a.jpg", b"/etc/passwd", mode=LINK)),
    "symlink and a file through it": lambda photo: archive(
        entry(b"dir", b"/tmp", mode=LINK), entry(b"dir/evil.jpg", photo)
    ),
    "device": lambda photo: archive(good(photo), entry(b"device.jpg", b"", mode=DEVICE)),
    "named pipe": lambda photo: archive(good(photo), entry(b"pipe.jpg", b"", mode=PIPE)),
    "two of one name": lambda photo: archive(good(photo), entry(b"good.jpg", photo + b"x")),
    "encrypted": lambda photo: archive(entry(b"good.jpg", photo, flags=1)),
    "bomb by deflate": lambda photo: archive(good(photo), bomb(DEFLATED)),
    "bomb by bzip2": lambda photo: archive(good(photo), bomb(BZIP2)),
    "bomb by lzma": lambda photo: archive(good(photo), bomb(LZMA)),
    "overlapping bombs": lambda photo: overlapping(),
    "a size that is too small": lambda photo: archive(
        entry(b"good.jpg", photo, method=DEFLATED, packed=deflated(photo), says=9)
    ),
    "another checksum": lambda photo: archive(entry(b"good.jpg", photo, crc=1)),
    "another name in its own header": lambda photo: archive(
        entry(b"good.jpg", photo, local=b"evil.jpg")
    ),
    "offset beyond the end": lambda photo: archive(entry(b"good.jpg", photo, at=1 << 30)),
    "offset into the directory": lambda photo: archive(
        good(photo), entry(b"b.jpg", photo, at=40 + len(photo))
    ),
    "too many": lambda photo: archive(*(entry(b"%d.jpg" % n, b"") for n in range(10_001))),
    "count that lies": lambda photo: archive(
        *(entry(b"%d.jpg" % number, b"") for number in range(10_001)), count=1
    ),
    "method that nobody knows": lambda photo: archive(entry(b"good.jpg", photo, method=99)),
    "deflate64": lambda photo: archive(entry(b"good.jpg", photo, method=9)),
    "made for a later zip": lambda photo: archive(entry(b"good.jpg", photo, version=99)),
    "deflate of garbage": lambda photo: archive(
        entry(b"good.jpg", photo, method=DEFLATED, packed=b"\xff" * 100)
    ),
    "directory longer than the file": lambda photo: archive(good(photo), directory_bytes=1 << 20),
    "directory as long as memory": lambda photo: archive(good(photo), directory_bytes=0xFFFFFFF0),
    "zip64 directory as long as memory": lambda photo: archive(
        good(photo), before_end=lambda start, length, count: zip64(start, 1 << 50, 1)
    ),
    "zip64 with a billion entries": lambda photo: archive(
        good(photo), before_end=lambda start, length, count: zip64(start, 46 * 10**9, 10**9)
    ),
    "zip64 extra field cut short": lambda photo: archive(
        entry(b"good.jpg", photo, says=0xFFFFFFFF, extra=struct.pack("<HH", 1, 200) + b"x")
    ),
    "zip64 extra field without a size": lambda photo: archive(
        entry(b"good.jpg", photo, says=0xFFFFFFFF, extra=struct.pack("<HH", 1, 0))
    ),
    "name that is no text": lambda photo: archive(entry(b"\xff\xfe.jpg", photo, flags=0x800)),
    "truncated": lambda photo: archive(good(photo))[:-30],
    "beginning missing": lambda photo: archive(good(photo))[60:],
    "nothing": lambda photo: b"PK",
    "only the end's mark": lambda photo: b"PK\5\6",
    "another kind of archive": lambda photo: b"Rar!\x1a\x07\x01\x00" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_server_refuses_a_hostile_zip_in_words(photo: bytes, build: Any, name: str) -> None:
    dataset = build(HOSTILE[name](photo))
    assert dataset.status is DatasetStatus.REFUSED
    assert len(dataset.report["message"]) > 10
    assert dataset.zip_key == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_the_agent_refuses_a_hostile_zip_and_keeps_nothing_of_it(
    photo: bytes, agent_unpacks: Any, name: str
) -> None:
    got = agent_unpacks(HOSTILE[name](photo), max_total=16 << 20)
    assert re.fullmatch(r"dataset\.(unsafe|corrupt|empty)", got.code), got
    assert got.files == {}


@pytest.mark.parametrize(
    "name",
    ["bomb by bzip2", "bomb by lzma", "bomb by deflate", "zip64 directory as long as memory",
     "directory as long as memory", "overlapping bombs"],
)  # fmt: skip
def test_neither_takes_memory_for_what_a_zip_claims(
    photo: bytes, build: Any, agent_unpacks: Any, name: str
) -> None:
    content = HOSTILE[name](photo)
    with measured() as peak:
        build(content)
        agent_unpacks(content, max_total=16 << 20)
    assert peak[0] < 24 << 20


def test_a_directory_of_a_million_entries_is_not_read(build: Any, agent_unpacks: Any) -> None:
    """Each would become an object of half a kilobyte before anybody could count them."""
    one = archive(entry(b"1.jpg", b""))
    start = one.index(b"PK\1\2")
    line = one[start : one.index(b"PK\5\6")]
    count = 300_000
    content = one[:start] + line * count + zip64(start, len(line) * count, count)
    content += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(line), start, 0)
    with measured() as peak:
        assert build(content).status is DatasetStatus.REFUSED
        assert agent_unpacks(content).code == "dataset.unsafe"
    assert peak[0] < len(content) + (8 << 20)


def by_the_library(photo: bytes) -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as big, big.open("good.jpg", "w", force_zip64=True) as to:
            to.write(photo)
        return stream.getvalue()


#: Nothing is wrong with these.
ODD: dict[str, Callable[[bytes], bytes]] = {
    "deflated": lambda photo: archive(
        entry(b"good.jpg", photo, method=DEFLATED, packed=deflated(photo))
    ),
    "a program before it": lambda photo: archive(good(photo), head=b"MZ" + b"\0" * 500),
    "a comment": lambda photo: archive(good(photo), comment=b"from my holidays"),
    "zip64 records": lambda photo: archive(good(photo), before_end=zip64),
    "zip64 fields": by_the_library,
    "a folder": lambda photo: archive(entry(b"dogs/", b"", mode=stat.S_IFDIR | 0o755), good(photo)),
    "executable": lambda photo: archive(entry(b"good.jpg", photo, mode=stat.S_IFREG | 0o777)),
    "a zip in it": lambda photo: archive(good(photo), entry(b"m.zip", archive(good(photo)))),
    "a name in another alphabet": lambda photo: archive(
        good(photo), entry("\u732b.txt".encode(), b"a cat", flags=0x800)
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_merely_odd_is_read_by_both(
    photo: bytes, build: Any, agent_unpacks: Any, name: str
) -> None:
    content = ODD[name](photo)
    dataset = build(content)
    assert [item["name"] for item in dataset.report["kept"]] == ["good.jpg"]
    got = agent_unpacks(content)
    assert got.code == ""
    assert got.files["images/good.jpg"] == photo


def test_a_folder_of_its_own_in_a_customers_zip_is_fine(photo: bytes, build: Any) -> None:
    """As `bsdtar` writes it; the agent never sees one, for the server writes zips of its own."""
    dataset = build(archive(entry(b"./", b"", mode=stat.S_IFDIR | 0o755), good(photo)))
    assert dataset.status is DatasetStatus.READY


def test_a_full_disk_of_ours_is_not_the_customers_fault(
    photo: bytes, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset stays due, and is built when there is room again."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", Full)
        with pytest.raises(OSError, match="No space"):
            build(archive(good(photo)))
    assert build(archive(good(photo))).status is DatasetStatus.READY
