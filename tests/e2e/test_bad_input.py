"""What customers send that is no good: each is refused where it is first seen, with a reason that
says what to do, and no machine stays rented for it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from orchestrator.cli.console import CliError

pytestmark = pytest.mark.slow


def _put_on_shelf(stoker: Any, version: int, name: str, body: bytes) -> Path:
    """A model at the Civitai sandbox."""
    folder = stoker.stage.tiny.parent
    path = folder / name
    path.write_bytes(body)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, str(version): name}))
    return path


# --- base models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_models(stoker: Any) -> dict[str, str]:
    """Job ids; all ordered at once, so that their machines run at the same time."""
    whole = stoker.stage.tiny.read_bytes()
    url = stoker.services.settings.civitai_url

    altered = _put_on_shelf(stoker, 11, "altered.safetensors", whole)
    # Civitai has looked at it once; then somebody swaps the file.
    requests.get(f"{url}/api/v1/model-versions/11", timeout=10).raise_for_status()
    times = altered.stat()
    altered.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(altered, ns=(times.st_atime_ns, times.st_mtime_ns))

    _put_on_shelf(stoker, 12, "model.ckpt", b"PK\x03\x04" + b"\0" * 1000)
    _put_on_shelf(stoker, 13, "disguised.safetensors", b"\x80\x02}q\x00." + b"\0" * 1000)
    _put_on_shelf(stoker, 14, "cut.safetensors", whole[: len(whole) // 2])
    orders = {"altered": 11, "pickle": 12, "disguised": 13, "cut": 14, "missing": 99}
    return {name: stoker.order(base=f"civitai:{version}") for name, version in orders.items()}


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        pytest.param("altered", "model.checksum", "SHA-256", id="other bytes than listed"),
        pytest.param("pickle", "model.pickle", "pickle", id="a pickle"),
        pytest.param("disguised", "model.unsafe", "pickle", id="a pickle in disguise"),
        pytest.param("cut", "model.unsafe", "tensors end", id="cut in two"),
        pytest.param("missing", "model.not_found", "does not exist", id="no such version"),
    ],
)
def test_a_bad_base_model_fails_the_job_and_gives_the_machine_back(
    stoker: Any, bad_models: dict[str, str], name: str, code: str, words: str
) -> None:
    job = stoker.ended(bad_models[name])

    assert job["status"] == "failed"
    assert job["reason"]["code"] == code, job["reason"]
    assert words in job["reason"]["message"]
    assert not job["reason"]["retryable"]
    assert job["attempt"] == 1, "another machine would not help"
    stoker.given_back(bad_models[name])


# --- jobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "pointer"),
    [
        ({"lerning_rate": 1e-4}, "/recipe/lerning_rate"),
        ({"rank": 0}, "/recipe/rank"),
        ({"steps": -1}, "/recipe/steps"),
        ({"learning_rate": "fast"}, "/recipe/learning_rate"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_with_a_pointer(
    stoker: Any, recipe: dict[str, Any], pointer: str
) -> None:
    answer = _post(stoker, "/v1/jobs", {"dataset_id": stoker.dataset, "base": "civitai:1",
                                        "recipe": recipe})  # fmt: skip
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert pointer in [fault["pointer"] for fault in answer.json()["errors"]]


def test_a_job_for_an_unknown_dataset_is_refused(stoker: Any) -> None:
    unknown = "ds_" + "0" * 26
    answer = _post(stoker, "/v1/jobs", {"dataset_id": unknown, "base": "civitai:1"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "unknown_dataset"
    assert answer.json()["errors"][0]["pointer"] == "/dataset_id"


def test_a_gpu_that_nobody_offers_is_waited_for_and_the_job_says_so(
    stoker: Any, until: Callable[..., Any]
) -> None:
    job_id = stoker.order(gpu={"gpu_names": ["RTX 9090"], "min_vram_gb": 200.0})

    def explained() -> str:
        return str(stoker.show(job_id)["progress"].get("gpu_search", ""))

    words = until(explained, "an explanation")
    job = stoker.show(job_id)
    assert job["status"] == "pendingGpu"
    assert "no offer meets the needs" in words
    assert "RTX 9090" in words
    assert "200 GB" in words
    assert stoker.leases(job_id) == []
    stoker.client.post(f"/v1/jobs/{job_id}/cancel")
    assert stoker.ended(job_id)["status"] == "cancelled"


def _post(stoker: Any, path: str, body: Any) -> requests.Response:
    headers = dict(stoker.client._session.headers)
    return requests.post(stoker.client.url + path, json=body, headers=headers, timeout=30)


# --- datasets ---------------------------------------------------------------------------------


def _zip(entries: list[tuple[str, bytes]]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in entries:
            archive.writestr(name, body)
    return held.getvalue()


def _climbing() -> bytes:
    return _zip([("../../evil.png", b"x")])


def _link() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        info = zipfile.ZipInfo("secret.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return held.getvalue()


def _bomb() -> bytes:
    return _zip([("bomb.png", b"\0" * 150_000_000)])


def _text() -> bytes:
    return _zip([("holiday.jpg", b"Dear diary")])


def _cut() -> bytes:
    return _zip([("a.png", os.urandom(5000))])[:2000]


@pytest.fixture(scope="module")
def bad_zips(stoker: Any) -> dict[str, tuple[str, str]]:
    """Dataset and job ids; all built at the same time."""
    made: dict[str, tuple[str, str]] = {}
    for make in (_climbing, _link, _bomb, _text, _cut):
        body = make()
        dataset = stoker.client.post(
            "/v1/datasets",
            {"zip": {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}},
        )
        job_id = stoker.order(dataset_id=dataset["id"])
        (upload,) = dataset["uploads"]
        requests.put(upload["url"], data=body, headers=upload["headers"], timeout=60)
        stoker.client.post(f"/v1/datasets/{dataset['id']}/seal")
        made[make.__name__] = (dataset["id"], job_id)
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(_climbing, "leads outside", id="a path out of it"),
        pytest.param(_link, "link", id="a link"),
        pytest.param(_bomb, "far more", id="a bomb"),
        pytest.param(_text, "is no image", id="text named .jpg"),
        pytest.param(_cut, "not a readable zip", id="cut in two"),
    ],
)
def test_a_bad_zip_is_refused_with_a_message_and_fails_the_job_that_waits(
    stoker: Any, bad_zips: dict[str, tuple[str, str]], make: Callable[[], bytes], words: str
) -> None:
    dataset_id, job_id = bad_zips[make.__name__]

    job = stoker.ended(job_id)

    assert job["status"] == "failed"
    assert job["reason"]["code"] == "dataset.refused"
    assert words in job["reason"]["message"]
    dataset = stoker.client.get(f"/v1/datasets/{dataset_id}")
    assert dataset["status"] == "refused"
    assert words in dataset["report"]["message"]
    assert stoker.leases(job_id) == [], "nothing was rented for it"
    with pytest.raises(CliError, match="no usable image"):
        stoker.order(dataset_id=dataset_id)


def test_a_photograph_that_arrived_cut_is_left_out_and_named(
    stoker: Any, photos: Path, until: Callable[..., Any], tmp_path: Path
) -> None:
    """Two photographs are announced; the second upload is cut off half way."""
    good, other = sorted(photos.glob("*.png"))[:2]
    cut = tmp_path / "cut.png"
    shutil.copy(other, cut)
    listed = [
        {"name": path.name, "bytes": path.stat().st_size,
         "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (good, cut)
    ]  # fmt: skip
    dataset = stoker.client.post("/v1/datasets", {"files": listed})
    first, second = dataset["uploads"]
    stoker.client.put_file(first, good)
    half = cut.read_bytes()[: cut.stat().st_size // 2]
    headers = {**second["headers"], "Content-Length": str(len(half))}
    requests.put(second["url"], data=half, headers=headers, timeout=60)
    stoker.client.post(f"/v1/datasets/{dataset['id']}/seal")

    def built() -> Any:
        now = stoker.client.get(f"/v1/datasets/{dataset['id']}")
        return now if now["status"] != "building" else None

    report = until(built, "the dataset is built")["report"]
    assert [item["name"] for item in report["kept"]] == [good.name]
    assert [item["name"] for item in report["refused"]] == ["cut.png"]
