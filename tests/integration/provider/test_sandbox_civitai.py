"""Civitai as a downloader meets it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient

from infra.models import BaseError, BaseResolver
from infra.sandbox.civitai import URL_LIFE_S, Shelf, civitai_blueprint
from infra.sandbox.server import running_sandbox

KEY = "civitai-key"
CONTENT = bytes(range(256)) * 500


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    (tmp_path / "tiny.safetensors").write_bytes(CONTENT)
    (tmp_path / "index.json").write_text(json.dumps({"128713": "tiny.safetensors", "9": "gone"}))
    return tmp_path


@pytest.fixture
def url(shelf: Path) -> Iterator[str]:
    with running_sandbox(base_model_dir=shelf, civitai_key=KEY) as sandbox:
        yield sandbox.url


def get(url: str, **options: Any) -> requests.Response:
    return requests.get(url, timeout=10, **options)


def test_a_version_says_what_its_file_is(url: str) -> None:
    record = get(f"{url}/api/v1/model-versions/128713").json()
    (file,) = record["files"]
    assert (record["id"], record["baseModel"]) == (128713, "SD 1.5")
    assert file["primary"]
    assert file["type"] == "Model"
    assert file["sizeKB"] * 1024 == len(CONTENT)
    assert file["metadata"]["format"] == "SafeTensor"
    assert file["hashes"]["SHA256"] == hashlib.sha256(CONTENT).hexdigest().upper()
    assert file["downloadUrl"] == f"{url}/api/download/models/128713"


@pytest.mark.parametrize("way", ["bearer", "token"])
def test_a_key_opens_a_signed_address_that_needs_none(url: str, way: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"} if way == "bearer" else {}
    query = {"token": KEY} if way == "token" else {}
    answer = get(
        f"{url}/api/download/models/128713", headers=headers, params=query, allow_redirects=False
    )
    assert answer.status_code == 307
    place = answer.headers["Location"]
    assert KEY not in place
    assert get(place).content == CONTENT
    part = get(place, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
    assert part.headers["Content-Range"] == f"bytes 1000-1999/{len(CONTENT)}"
    assert get(place, headers={"Range": f"bytes={len(CONTENT)}-"}).status_code == 416


def test_without_a_key_nothing_is_downloaded(url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        answer = get(f"{url}/api/download/models/128713", headers=headers, allow_redirects=False)
        assert answer.status_code == 401


def test_what_is_not_there_is_404(url: str) -> None:
    for version in ("5", "9"):
        assert get(f"{url}/api/v1/model-versions/{version}").status_code == 404
        address = f"{url}/api/download/models/{version}"
        assert get(address, params={"token": KEY}).status_code == 404


def test_a_garbled_address_is_403(url: str) -> None:
    address = f"{url}/api/download/models/128713"
    place = get(address, params={"token": KEY}, allow_redirects=False).headers["Location"]
    garbled = (
        place[:-1] + ("0" if place[-1] != "0" else "1"),
        place.replace("expires=", "expires=9"),
        place.partition("?")[0],
    )
    assert [get(item).status_code for item in garbled] == [403, 403, 403]


@pytest.fixture
def aging(shelf: Path) -> tuple[FlaskClient, list[float]]:
    now = [1_800_000_000.0]
    app = Flask("test")
    app.register_blueprint(civitai_blueprint(Shelf(shelf), KEY, clock=lambda: now[0]))
    return app.test_client(), now


def test_an_address_expires(aging: tuple[FlaskClient, list[float]]) -> None:
    client, now = aging
    place = client.get(f"/api/download/models/128713?token={KEY}").headers["Location"]
    with client.get(place) as answer:
        assert answer.status_code == 200
    now[0] += URL_LIFE_S + 1
    assert client.get(place).status_code == 403


def test_a_shelf_without_an_index_is_empty(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.file(1) is None
    (tmp_path / "index.json").write_text("nonsense")
    assert shelf.file(1) is None


def test_an_index_cannot_point_out_of_its_directory(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("x")
    (inside / "index.json").write_text(json.dumps({"1": "../secret"}))
    assert Shelf(inside).file(1) is None


def test_a_pasted_link_to_a_model_leads_to_its_newest_version(url: str) -> None:
    resolver = BaseResolver(None, civitai_url=url, huggingface_url="https://huggingface.co")
    found = resolver.look_up(f"{url}/models/12871/tiny")
    assert (found.base, found.name, found.family) == ("civitai:128713", "tiny", "sd1")
    assert (found.bytes, found.fault) == (len(CONTENT), "")
    with pytest.raises(BaseError, match="does not exist"):
        resolver.look_up(f"{url}/models/4")
