"""Photographs in, a checked zip out; whatever is wrong is said by name, and nothing is lost."""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import zipfile
from typing import Any

import pytest
from PIL import Image

from state.events import Dataset, DatasetStatus
from state.job import JobRequest, Status
from state.memory import MemoryStore
from state.record import create_job
from tasks.dataset import DatasetBuilder, upload_key


def photo(side: int = 300, colour: str = "red", kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, kind)
    return out.getvalue()


def zipped(*entries: tuple[str, bytes], mode: int | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode is not None:
                info.external_attr = mode << 16
            archive.writestr(info, body)
    return out.getvalue()


class Shop:
    """One dataset and its builder."""

    def __init__(self, clock: Any, storage: Any) -> None:
        self.store, self.storage, self.clock = MemoryStore(), storage, clock

    def build(self, *files: tuple[str, bytes], sent: dict[str, bytes] | None = None) -> Dataset:
        announced = [
            {"name": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            for name, body in files
        ]
        with self.store.transaction() as tx:
            tx.add_dataset(
                Dataset(
                    id="ds_1",
                    owner="o",
                    created_at=self.clock(),
                    status=DatasetStatus.BUILDING,
                    files=tuple(announced),
                )
            )
            create_job(
                tx,
                JobRequest(dataset_id="ds_1", base="civitai:1"),
                owner="o",
                now=self.clock(),
                job_id="job_1",
            )
        for index, (name, body) in enumerate(files):
            body = (sent or {}).get(name, body)
            if body:
                self.storage.objects[upload_key("ds_1", index)] = body
        DatasetBuilder(store=self.store, storage=self.storage, clock=self.clock).build("ds_1")
        with self.store.transaction() as tx:
            return tx.dataset("ds_1")

    def names(self) -> list[str]:
        with zipfile.ZipFile(io.BytesIO(self.zip())) as archive:
            return archive.namelist()

    def zip(self) -> bytes:
        with self.store.transaction() as tx:
            return self.storage.objects[tx.dataset("ds_1").zip_key]

    def job_status(self) -> Status:
        with self.store.transaction() as tx:
            return tx.job("job_1").status


@pytest.fixture
def shop(clock: Any, storage: Any) -> Shop:
    return Shop(clock, storage)


def test_photographs_and_captions_become_a_zip_and_the_job_moves_on(shop: Shop) -> None:
    dataset = shop.build(("a.jpg", photo()), ("b.png", photo(kind="PNG")), ("a.txt", b"a dog"))
    assert dataset.status is DatasetStatus.READY
    assert shop.names() == ["00000.jpg", "00001.png", "00000.txt"]
    body = shop.zip()
    assert (dataset.zip_bytes, dataset.zip_sha256) == (
        len(body),
        hashlib.sha256(body).hexdigest(),
    )
    assert shop.job_status() is Status.PENDING_GPU
    assert list(shop.storage.objects) == [dataset.zip_key]


def test_a_zip_is_taken_apart_and_litter_is_left_out(shop: Shop) -> None:
    body = zipped(
        ("dogs/1.jpg", photo()),
        ("dogs/1.txt", b"one"),
        ("__MACOSX/dogs/._1.jpg", b"x"),
        ("dogs/.DS_Store", b"x"),
    )
    assert shop.build(("photos.zip", body)).status is DatasetStatus.READY
    assert shop.names() == ["00000.jpg", "00000.txt"]


def test_masks_and_images_of_the_class_come_along(shop: Shop) -> None:
    dataset = shop.build(
        ("a.mask.png", photo(kind="PNG")),
        ("a.jpg", photo()),
        ("regularization/b.jpg", photo(colour="blue")),
        ("regularization/b.txt", b"a dog"),
    )
    assert shop.names() == [
        "00000.jpg",
        "regularization/00001.jpg",
        "regularization/00001.txt",
        "00000.mask.png",
    ]
    assert [item["name"] for item in dataset.report["kept"]] == ["a.jpg"]
    assert [item["name"] for item in dataset.report["regularization"]] == ["regularization/b.jpg"]


def test_a_photograph_that_lies_on_its_side_has_the_size_it_is_looked_at(shop: Shop) -> None:
    """A mask is drawn over what a phone shows, not over what it stored."""
    turned, out = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.new("RGB", (400, 300)).save(out, "JPEG", exif=turned)
    mask = io.BytesIO()
    Image.new("L", (300, 400), 255).save(mask, "PNG")
    dataset = shop.build(("a.jpg", out.getvalue()), ("a.mask.png", mask.getvalue()))
    assert dataset.report["refused"] == []
    assert (dataset.report["kept"][0]["width"], dataset.report["kept"][0]["height"]) == (300, 400)


@pytest.mark.parametrize(("kind", "suffix"), [("MPO", ".jpg"), ("AVIF", ".avif")])
def test_what_phones_write_is_kept(shop: Shop, kind: str, suffix: str) -> None:
    dataset = shop.build(("a" + suffix, photo(kind=kind)))
    assert dataset.report["kept"][0]["as"] == "00000" + suffix


def test_images_of_the_class_alone_are_no_dataset(shop: Shop) -> None:
    dataset = shop.build(("regularization/b.jpg", photo()))
    assert dataset.status is DatasetStatus.REFUSED


def test_a_mask_that_fits_no_image_is_left_out_and_named(shop: Shop) -> None:
    dataset = shop.build(
        ("a.jpg", photo()),
        ("a.mask.png", photo(400, kind="PNG")),
        ("b.mask.png", photo(kind="PNG")),
        ("c.mask.png", b"not a picture"),
    )
    assert shop.names() == ["00000.jpg"]
    assert {item["name"] for item in dataset.report["refused"]} == {"a.mask.png", "c.mask.png"}
    assert [item["name"] for item in dataset.report["warned"]] == ["b.mask.png"]


def test_captions_may_come_in_one_list(shop: Shop) -> None:
    """As in Hugging Face's image folders; a file beside an image goes before it."""
    lines = (
        b'{"file_name": "a.jpg", "text": "a dog"}\n'
        b'{"file_name": "b.jpg", "text": "another"}\n'
        b"no JSON\n"
    )
    body = zipped(
        ("dogs/metadata.jsonl", lines),
        ("dogs/a.jpg", photo()),
        ("dogs/b.jpg", photo(colour="blue")),
        ("dogs/b.txt", b"my own"),
    )
    dataset = shop.build(("photos.zip", body))
    with zipfile.ZipFile(io.BytesIO(shop.zip())) as archive:
        assert (archive.read("00000.txt"), archive.read("00001.txt")) == (b"a dog", b"my own")
    (warned,) = dataset.report["warned"]
    assert "line 3" in warned["why"]


def test_a_text_file_named_jpg_is_refused_by_name_and_the_rest_is_kept(shop: Shop) -> None:
    dataset = shop.build(("good.jpg", photo()), ("bad.jpg", b"not a picture at all"))
    assert dataset.status is DatasetStatus.READY
    assert dataset.report["refused"] == [
        {"name": "bad.jpg", "why": "is no image, whatever its name says, or is damaged"}
    ]


def test_a_truncated_photograph_is_refused(shop: Shop) -> None:
    body = photo(600)
    dataset = shop.build(("cut.jpg", body[: len(body) // 2]))
    assert dataset.status is DatasetStatus.REFUSED
    assert "cut.jpg is no image" in dataset.report["message"]
    assert shop.job_status() is Status.FAILED


def test_a_truncated_upload_is_told_from_a_bad_photograph(shop: Shop) -> None:
    body = photo(600)
    dataset = shop.build(("cut.jpg", body), sent={"cut.jpg": body[:100]})
    assert "announced were" in dataset.report["refused"][0]["why"]


def test_another_file_than_announced_is_refused(shop: Shop) -> None:
    dataset = shop.build(("a.bmp", photo(kind="BMP")), sent={"a.bmp": photo(300, "blue", "BMP")})
    assert "another SHA-256" in dataset.report["refused"][0]["why"]


def test_an_announced_file_that_never_came_is_named(shop: Shop) -> None:
    dataset = shop.build(("a.jpg", photo()), ("b.jpg", photo(301)), sent={"b.jpg": b""})
    assert dataset.report["refused"] == [
        {"name": "b.jpg", "why": "was announced but never uploaded"}
    ]


def test_no_image_at_all_refuses_the_dataset_and_fails_its_job(shop: Shop) -> None:
    dataset = shop.build(("notes.txt", b"hello"))
    assert dataset.report["message"] == "the dataset has no image"
    assert shop.job_status() is Status.FAILED


def test_the_same_picture_twice_is_kept_once(shop: Shop) -> None:
    dataset = shop.build(("a.jpg", photo()), ("b.jpg", photo()))
    assert [item["name"] for item in dataset.report["kept"]] == ["a.jpg"]
    assert "same picture as a.jpg" in dataset.report["warned"][0]["why"]


def test_a_tiny_picture_is_refused_and_a_small_one_warned_of(shop: Shop) -> None:
    dataset = shop.build(("tiny.jpg", photo(20)), ("small.jpg", photo(100)))
    assert dataset.report["refused"][0]["name"] == "tiny.jpg"
    assert dataset.report["warned"][0]["name"] == "small.jpg"


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../b.jpg", "C:\\x.jpg"])
def test_a_zip_that_leads_outside_itself_is_refused(shop: Shop, name: str) -> None:
    dataset = shop.build(("photos.zip", zipped((name, photo()))))
    assert dataset.status is DatasetStatus.REFUSED
    assert "leads outside" in dataset.report["message"]


def test_a_zip_with_a_link_is_refused(shop: Shop) -> None:
    body = zipped(("link.jpg", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777)
    assert "link or special file" in shop.build(("photos.zip", body)).report["message"]


def test_a_zip_bomb_is_refused_by_what_comes_out_of_it(shop: Shop) -> None:
    body = zipped(("bomb.jpg", bytes(150 * 2**20)))
    assert len(body) < 2**20
    assert "unpacks to far more" in shop.build(("photos.zip", body)).report["message"]


def test_a_zip_that_lies_about_sizes_is_refused(shop: Shop) -> None:
    body = bytearray(zipped(("a.jpg", bytes(3 * 2**20))))
    at = body.index(b"PK\x01\x02")
    body[at + 24 : at + 28] = struct.pack("<I", 10)
    dataset = shop.build(("photos.zip", bytes(body)))
    assert dataset.status is DatasetStatus.REFUSED


@pytest.mark.parametrize("body", [b"PK\x03\x04garbage", zipped(("a.jpg", photo()))[:-30]])
def test_a_damaged_zip_is_refused(shop: Shop, body: bytes) -> None:
    assert "not a readable zip" in shop.build(("photos.zip", body)).report["message"]


def test_a_zip_with_a_name_twice_is_refused(shop: Shop) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        body = zipped(("a.jpg", photo()), ("a.jpg", photo(301)))
    assert "twice" in shop.build(("photos.zip", body)).report["message"]


def test_building_twice_makes_the_same_bytes(shop: Shop) -> None:
    first = shop.build(("a.jpg", photo()), ("b.jpg", photo(301)))
    other = Shop(shop.clock, type(shop.storage)())
    shop.clock.advance(1000)
    second = other.build(("a.jpg", photo()), ("b.jpg", photo(301)))
    assert first.zip_sha256 == second.zip_sha256


def test_two_builders_at_once_leave_one_whole_zip(shop: Shop) -> None:
    """The second reads while the first finishes and takes the uploads away."""
    taken = shop.storage.get_file
    calls = []

    def interrupted(key: str, path: Any) -> None:
        calls.append(key)
        if len(calls) == 2:
            builder = DatasetBuilder(store=shop.store, storage=shop.storage, clock=shop.clock)
            builder.build("ds_1")
        taken(key, path)

    shop.storage.get_file = interrupted
    dataset = shop.build(("a.jpg", photo()), ("b.jpg", photo(301)), ("c.jpg", photo(302)))
    assert len(dataset.report["kept"]) == 3
    assert list(shop.storage.objects) == [dataset.zip_key]
    assert hashlib.sha256(shop.zip()).hexdigest() == dataset.zip_sha256
