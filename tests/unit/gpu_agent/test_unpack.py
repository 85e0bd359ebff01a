"""Zips that want to do harm, and zips that were harmed."""

from __future__ import annotations

import contextlib
import io
import stat
import struct
import warnings
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.pull import MAX_ENTRIES, unpack


def packed(*entries, method=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, content)."""
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names are what we want
        with zipfile.ZipFile(target, "w", method) as archive:
            for name, content in entries:
                archive.writestr(name, content)
    return target.getvalue()


@pytest.fixture
def open_zip(tmp_path):
    def run(content, **limits):
        path = tmp_path / "dataset.zip"
        path.write_bytes(content)
        told = []
        images = unpack(
            path,
            tmp_path / "images",
            halt=limits.pop("halt", Halt()),
            progress=lambda *now: told.append(now),
            **limits,
        )
        run.told = told
        return images

    run.folder = tmp_path / "images"
    return run


def refused(open_zip, content, **limits):
    with pytest.raises(Fault) as caught:
        open_zip(content, **limits)
    assert not open_zip.folder.exists()
    assert not caught.value.retryable
    return caught.value.code


def test_a_good_zip_is_unpacked_with_its_folders_and_captions(open_zip):
    assert open_zip(packed(("a.jpg", b"A"), ("dogs/b.PNG", b"B"), ("a.txt", b"a dog"))) == 2
    assert (open_zip.folder / "dogs" / "b.PNG").read_bytes() == b"B"
    assert open_zip.told[-1] == (3, 3)


def test_unpacking_again_replaces_what_was_there(open_zip):
    open_zip(packed(("a.jpg", b"A"), ("old.jpg", b"O")))
    open_zip(packed(("a.jpg", b"new")))
    assert [item.read_bytes() for item in open_zip.folder.iterdir()] == [b"new"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        "a/../../evil.jpg",
        "/etc/evil.jpg",
        "//server/evil.jpg",
        "\\evil.jpg",
        "..\\evil.jpg",
        "C:\\evil.jpg",
        "c:evil.jpg",
        "a//evil.jpg",
        "./evil.jpg",
        "a/\x07evil.jpg",
        "evil.jpg\x00.txt",
        "x" * 300 + ".jpg",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(open_zip, tmp_path, name):
    placeholder = "?" * len(name.encode())
    content = packed((placeholder, b"x"), ("good.jpg", b"g"))
    content = content.replace(placeholder.encode(), name.encode())
    assert refused(open_zip, content) == "dataset.unsafe"
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK]
)
def test_links_and_devices_are_refused(open_zip, kind):
    entry = zipfile.ZipInfo("link.jpg")
    entry.external_attr = (kind | 0o777) << 16
    assert refused(open_zip, packed((entry, b"/etc/passwd"))) == "dataset.unsafe"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg", "A.JPG"),
        ("\u00e9.jpg", "e\u0301.jpg"),
        ("a.jpg", "a.jpg/b.jpg"),
    ],
)
def test_two_entries_for_one_place_are_refused(open_zip, one, other):
    assert refused(open_zip, packed((one, b"1"), (other, b"2"))) == "dataset.unsafe"


def test_a_bomb_is_stopped_by_its_ratio(open_zip):
    assert refused(open_zip, packed(("a.jpg", bytes(20 << 20)))) == "dataset.unsafe"


def test_a_zip_that_unpacks_to_too_much_is_refused(open_zip):
    content = packed(("a.jpg", bytes(4000)), ("b.jpg", bytes(4000)))
    assert refused(open_zip, content, max_total=5000) == "dataset.unsafe"


def test_sizes_are_counted_on_what_really_comes_out(open_zip):
    content = bytearray(packed(("a.jpg", bytes(300_000))))
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    content[local + 22 : local + 26] = content[central + 24 : central + 28] = struct.pack("<I", 9)
    assert refused(open_zip, bytes(content), max_total=1000) in (
        "dataset.unsafe",
        "dataset.corrupt",
    )


def test_too_many_entries_are_refused(open_zip):
    content = packed(*((f"{number}.jpg", b"") for number in range(MAX_ENTRIES + 1)))
    assert refused(open_zip, content) == "dataset.unsafe"


def test_an_endless_directory_is_not_even_read(open_zip):
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 5, 5, 1 << 31, 0, 0)
    assert refused(open_zip, end) == "dataset.corrupt"


@pytest.mark.parametrize("entries", [[], [("notes.txt", b"no image")], [("folder/", b"")]])
def test_a_zip_without_images_is_empty(open_zip, entries):
    assert refused(open_zip, packed(*entries)) == "dataset.empty"


def test_a_flipped_bit_is_noticed(open_zip):
    content = bytearray(packed(("a.jpg", bytes(range(256)) * 40), method=zipfile.ZIP_STORED))
    content[500] ^= 1
    assert refused(open_zip, bytes(content)) == "dataset.corrupt"


def test_an_encrypted_zip_is_refused(open_zip):
    content = bytearray(packed(("a.jpg", b"A")))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert refused(open_zip, bytes(content)) == "dataset.corrupt"


def test_a_zip_cut_anywhere_is_refused(open_zip):
    content = packed(("a.jpg", b"A" * 50), ("b.jpg", b"B" * 50))
    for length in range(0, len(content), 7):
        assert refused(open_zip, content[:length]) in ("dataset.corrupt", "dataset.unsafe")


def test_unpacking_ends_when_the_work_does(open_zip):
    halt = Halt()
    halt.call("cancel")
    with pytest.raises(Halted):
        open_zip(packed(("a.jpg", b"A")), halt=halt)
    assert not open_zip.folder.exists()


GOOD = packed(("a.jpg", b"A" * 50), ("b.jpg", b"B" * 50))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6))
def test_any_garbage_is_unpacked_or_refused_but_never_crashes(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("zip")
    content = bytearray(GOOD)
    for at, value in changes:
        content[at] = value
    (folder / "dataset.zip").write_bytes(content)
    with contextlib.suppress(Fault):
        unpack(
            folder / "dataset.zip",
            folder / "images",
            halt=Halt(),
            progress=lambda done, total: None,
        )
    assert {item.name for item in folder.iterdir()} <= {"dataset.zip", "images", "images.part"}
