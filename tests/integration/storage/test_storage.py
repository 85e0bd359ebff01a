"""The storage adapter against a real S3."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path

import boto3
import pytest
import requests
from botocore.stub import Stubber

from infra.settings import Settings
from infra.storage import Storage, Upload
from state.errors import NotFound, StorageError
from state.events import Secret


def put(upload: Upload, body: bytes, url: str | None = None) -> requests.Response:
    return requests.put(url or upload.url, data=body, headers=dict(upload.headers), timeout=20)


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers=headers, timeout=20)


def test_presigned_put_and_get_carry_a_file_both_ways(storage: Storage, folder: str) -> None:
    body = bytes(range(256)) * 400
    answer = put(storage.presign_put(folder + "a b+ü.bin", bytes=len(body)), body)
    assert answer.status_code == 200
    assert storage.head(folder + "a b+ü.bin") == len(body)
    answer = get(storage.presign_get(folder + "a b+ü.bin", filename='weights "ü".bin'))
    assert answer.content == body
    assert "weights%20%22%C3%BC%22.bin" in answer.headers["Content-Disposition"]


def test_presigned_get_serves_ranges(storage: Storage, folder: str) -> None:
    storage.put_bytes(folder + "x", b"0123456789")
    answer = get(storage.presign_get(folder + "x"), Range="bytes=3-5")
    assert (answer.status_code, answer.content) == (206, b"345")
    assert storage.get_bytes(folder + "x", range=(8, 9)) == b"89"


def test_wrong_signature_is_refused(storage: Storage, folder: str) -> None:
    storage.put_bytes(folder + "x", b"old")
    upload = storage.presign_put(folder + "x", bytes=3)
    for url in (
        upload.url[:-1] + ("0" if upload.url[-1] != "0" else "1"),
        upload.url.split("?")[0],
    ):
        assert put(upload, b"new", url).status_code in (400, 403)
    url = storage.presign_get(folder + "x")
    assert get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403
    assert get(url.split("?")[0]).status_code in (400, 403)
    assert storage.get_bytes(folder + "x") == b"old"


def test_url_opens_no_other_key_and_no_other_method(storage: Storage, folder: str) -> None:
    storage.put_bytes(folder + "mine", b"mine")
    storage.put_bytes(folder + "yours", b"yours")
    url = storage.presign_get(folder + "mine")
    assert get(url.replace("mine?", "yours?")).status_code == 403
    assert requests.put(url, data=b"evil", timeout=20).status_code == 403
    assert requests.delete(url, timeout=20).status_code == 403
    upload = storage.presign_put(folder + "mine", bytes=4)
    assert put(upload, b"evil", upload.url.replace("mine?", "yours?")).status_code == 403
    assert get(upload.url).status_code == 403
    assert storage.get_bytes(folder + "yours") == b"yours"


def test_expired_urls_are_refused(storage: Storage, folder: str) -> None:
    storage.put_bytes(folder + "x", b"old")
    url = storage.presign_get(folder + "x", expires_s=1)
    upload = storage.presign_put(folder + "x", bytes=3, expires_s=1)
    time.sleep(2.1)  # the store's clock is its own, and counts whole seconds
    assert get(url).status_code == 403
    assert put(upload, b"new").status_code == 403
    assert storage.get_bytes(folder + "x") == b"old"


@pytest.mark.parametrize("body", [b"12345678901", b"1234", b""])
def test_upload_of_another_length_is_refused(storage: Storage, folder: str, body: bytes) -> None:
    upload = storage.presign_put(folder + "x", bytes=5)
    honest = dict(upload.headers) | {"Content-Length": str(len(body))}
    answer = requests.put(upload.url, data=body, headers=honest, timeout=20)
    assert answer.status_code == 403
    assert storage.head(folder + "x") is None


def test_truncated_upload_leaves_nothing(storage: Storage, folder: str) -> None:
    import socket
    from urllib.parse import urlsplit

    upload = storage.presign_put(folder + "x", bytes=1000)
    parts = urlsplit(upload.url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=20) as sock:
        lines = [f"PUT {parts.path}?{parts.query} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in upload.headers.items()]
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + b"x" * 500)
        sock.shutdown(socket.SHUT_WR)
        assert b" 200 " not in sock.recv(4096)[:20]
    assert storage.head(folder + "x") is None


def test_upload_of_other_content_than_the_checksum_is_refused(
    storage: Storage, folder: str
) -> None:
    upload = storage.presign_put(folder + "x", bytes=4, sha256=hashlib.sha256(b"good").hexdigest())
    assert put(upload, b"evil").status_code == 400
    assert storage.head(folder + "x") is None
    assert put(upload, b"good").status_code == 200


def test_second_upload_replaces_the_first_unless_forbidden(storage: Storage, folder: str) -> None:
    upload = storage.presign_put(folder + "x", bytes=3)
    assert put(upload, b"one").status_code == 200
    assert put(upload, b"two").status_code == 200
    assert storage.get_bytes(folder + "x") == b"two"
    once = storage.presign_put(folder + "x", bytes=3, overwrite=False)
    assert put(once, b"six").status_code == 412
    assert storage.get_bytes(folder + "x") == b"two"
    bare = {k: v for k, v in once.headers.items() if k != "If-None-Match"}
    assert requests.put(once.url, data=b"six", headers=bare, timeout=20).status_code == 403


def test_urls_live_an_hour_at_most(storage: Storage) -> None:
    assert "X-Amz-Expires=3600&" in storage.presign_get("x", expires_s=10**9)
    assert "X-Amz-Expires=1&" in storage.presign_get("x", expires_s=0)


def test_upload_larger_than_one_put_is_refused_at_once(storage: Storage) -> None:
    with pytest.raises(StorageError, match="one upload"):
        storage.presign_put("x", bytes=6 * 1024**3)


def test_missing_key_is_not_found(storage: Storage, folder: str, tmp_path: Path) -> None:
    assert storage.head(folder + "none") is None
    for ask in (
        lambda: storage.get_bytes(folder + "none"),
        lambda: storage.copy(folder + "none", folder + "other"),
        lambda: storage.get_file(folder + "none", tmp_path / "file"),
    ):
        with pytest.raises(NotFound):
            ask()
    assert list(tmp_path.iterdir()) == []
    storage.delete(folder + "none")
    assert get(storage.presign_get(folder + "none")).status_code == 404


def test_files_go_up_and_down_in_parts(storage: Storage, folder: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(hashlib.shake_128(b"x").digest(20_000_001))
    storage.put_file(folder + "big", source)
    storage.copy(folder + "big", folder + "copy")
    storage.get_file(folder + "copy", target)
    assert target.read_bytes() == source.read_bytes()


def test_listing_and_deleting_a_folder_touches_nothing_beside_it(
    storage: Storage, folder: str
) -> None:
    for name in ("a/1", "a/2", "a/deep/3", "ab/4"):
        storage.put_bytes(folder + name, b"12")
    assert [stored.key.removeprefix(folder) for stored in storage.list_prefix(folder + "a/")] == [
        "a/1",
        "a/2",
        "a/deep/3",
    ]
    assert storage.delete_prefix(folder + "a/") == 3
    assert storage.delete_prefix(folder + "a/") == 0
    assert [stored.key for stored in storage.list_prefix(folder)] == [folder + "ab/4"]
    for everything in ("", "/", "a"):
        with pytest.raises(StorageError):
            storage.delete_prefix(everything)


def test_check_leaves_nothing_behind(storage: Storage) -> None:
    storage.check()
    assert list(storage.list_prefix("checks/")) == []


def test_wrong_key_is_a_clear_error_without_secrets(s3_settings: Settings) -> None:
    canary = "canary-of-a-secret"
    wrong = Storage.connect(dataclasses.replace(s3_settings, s3_secret_key=Secret(canary)))
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as caught:
        wrong.put_bytes("x", b"x")
    assert canary not in repr(caught.value)
    assert not caught.value.retryable


def test_silent_store_is_a_storage_error(s3_settings: Settings) -> None:
    gone = Storage.connect(dataclasses.replace(s3_settings, s3_endpoint="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match="could not be asked") as caught:
        gone.head("x")
    assert caught.value.retryable


def test_missing_bucket_is_made_once(s3_settings: Settings) -> None:
    other = Storage.connect(dataclasses.replace(s3_settings, s3_bucket="second-bucket"))
    with pytest.raises(NotFound):
        other.put_bytes("x", b"x")
    other.ensure_bucket()
    other.ensure_bucket()
    other.check()


def test_a_page_of_another_origin_can_upload_and_fetch(storage: Storage, folder: str) -> None:
    """What a browser asks before, and wants to see in the answer to, each upload."""
    origin = "https://stoker.test"
    assert storage.fault_for_browsers(origin) is None
    upload = storage.presign_put(folder + "photo.jpg", bytes=5)
    before = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
    before["Access-Control-Request-Headers"] = "content-type"
    assert requests.options(upload.url, headers=before, timeout=20).status_code == 200
    sent = {**upload.headers, "Origin": origin}
    answer = requests.put(upload.url, data=b"photo", headers=sent, timeout=20)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] in ("*", origin)
    shown = get(storage.presign_get(folder + "photo.jpg"), Origin=origin)
    assert shown.headers["Access-Control-Allow-Origin"] in ("*", origin)


def test_a_store_without_cors_rules_of_ours_is_refused_clearly(storage: Storage) -> None:
    """Swift knows no rules for a bucket; a store that is not there is no exception either."""
    with pytest.raises(StorageError):
        storage.allow_browsers("https://stoker.test")
    away = Storage.connect(
        Settings(s3_endpoint="http://127.0.0.1:9", s3_access_key="a", s3_secret_key=Secret("b"))
    )
    assert "could not be asked" in (away.fault_for_browsers("https://stoker.test") or "")


def test_our_cors_rule_is_added_to_those_that_are_there() -> None:
    """Over S3's wire format, as AWS and R2 take it; an older rule of ours is replaced."""
    client = boto3.client("s3", aws_access_key_id="a", aws_secret_access_key="b")
    theirs = {"ID": "theirs", "AllowedOrigins": ["https://a.test"], "AllowedMethods": ["GET"]}
    ours = {
        "ID": "stoker-pages",
        "AllowedOrigins": ["https://stoker.test"],
        "AllowedMethods": ["GET", "PUT", "HEAD"],
        "AllowedHeaders": ["content-type"],
        "MaxAgeSeconds": 3600,
    }
    old = {**ours, "AllowedOrigins": ["https://old.test"]}
    with Stubber(client) as store:
        store.add_response("get_bucket_cors", {"CORSRules": [old, theirs]}, {"Bucket": "b"})
        wanted = {"Bucket": "b", "CORSConfiguration": {"CORSRules": [theirs, ours]}}
        store.add_response("put_bucket_cors", {}, wanted)
        Storage(client, "b").allow_browsers("https://stoker.test")
        store.add_client_error("get_bucket_cors", "NoSuchCORSConfiguration", "", 404)
        wanted = {"Bucket": "b", "CORSConfiguration": {"CORSRules": [ours]}}
        store.add_response("put_bucket_cors", {}, wanted)
        Storage(client, "b").allow_browsers("https://stoker.test")
        store.assert_no_pending_responses()
