"""Base models' addresses become downloads, against a real HTTP server that behaves badly."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from infra.models import BaseError, BaseResolver
from infra.settings import Settings
from infra.storage import Storage, Stored
from state.events import Secret

SHA256 = "AB" * 32
MODEL = struct.pack("<Q", 60) + b"{" + b" " * 59 + b"0" * 100
#: status, headers, body
Answer = tuple[int, dict[str, str], bytes]


class Place:
    """A server whose answers are set by path; keeps the requests."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[dict[str, str]], Answer]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        place = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                place.asked.append((self.path, headers))
                found = place.answers.get(self.path, (404, {}, b"{}"))
                status, sent, body = found(headers) if callable(found) else found
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **sent}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def json(self, path: str, value: Any) -> None:
        self.answers[path] = (200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def redirect(self, path: str, target: str, status: int = 307) -> None:
        self.answers[path] = (status, {"Location": target}, b"")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.close()


def resolver(place: Place, **changes: Any) -> BaseResolver:
    given = {
        "civitai_url": place.url,
        "huggingface_url": place.url,
        "civitai_key": Secret("civitai-canary"),
        "huggingface_token": Secret("hub-canary"),
        "private": True,
    }
    return BaseResolver(None, **{**given, **changes})


def civitai_file(**changes: Any) -> dict[str, Any]:
    return {
        "name": "dreamy v1.safetensors",
        "type": "Model",
        "primary": True,
        "sizeKB": 2.5,
        "hashes": {"SHA256": SHA256},
        "downloadUrl": "https://civitai.example/api/download/models/7?type=Model",
        **changes,
    }


SIGNED = "https://cdn.example/dreamy.safetensors?X-Amz-Signature=abc"


def civitai(place: Place, *files: dict[str, Any], to: str = SIGNED) -> None:
    place.json("/api/v1/model-versions/7", {"files": list(files)})
    place.redirect("/api/download/models/7?type=Model", to)
    place.redirect("/api/download/models/7", to)


def test_civitai_version_becomes_a_signed_url_without_our_key(place: Place) -> None:
    civitai(place, civitai_file())
    (found,) = resolver(place).resolve("civitai:7", "sd1")
    assert found.url == SIGNED
    assert (found.name, found.bytes, found.sha256) == ("dreamy_v1.safetensors", 2560, "ab" * 32)
    assert [path for path, _ in place.asked] == [
        "/api/v1/model-versions/7",
        "/api/download/models/7?type=Model",
    ]
    assert all(headers["authorization"] == "Bearer civitai-canary" for _, headers in place.asked)
    assert "canary" not in repr(found) + found.url


def test_civitai_prefers_a_safetensors_file_to_a_primary_pickle(place: Place) -> None:
    pickle = civitai_file(name="dreamy.ckpt")
    civitai(place, pickle, civitai_file(primary=False, name="b.safetensors"))
    assert resolver(place).resolve("civitai:7")[0].name == "b.safetensors"
    civitai(place, pickle)
    with pytest.raises(BaseError) as caught:
        resolver(place).resolve("civitai:7")
    assert (caught.value.code, caught.value.retryable) == ("model.pickle", False)
    assert resolver(place).resolve("civitai:7", allow_pickle=True)[0].name == "dreamy.ckpt"


def test_key_goes_to_no_other_host_than_civitais(place: Place) -> None:
    other = Place()
    try:
        civitai(place, civitai_file(), to=other.url + "/file.safetensors")
        assert resolver(place).resolve("civitai:7")[0].url == other.url + "/file.safetensors"
        civitai(place, civitai_file(downloadUrl=other.url + "/api/download/models/9"))
        with pytest.raises(BaseError):
            resolver(place).resolve("civitai:7")
        assert other.asked == []
    finally:
        other.close()


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (401, "model.unauthorized", False),
        (403, "model.unauthorized", False),
        (404, "model.not_found", False),
        (410, "model.not_found", False),
        (429, "model.throttled", True),
        (500, "model.unreachable", True),
        (503, "model.unreachable", True),
        (400, "model.unreachable", False),
    ],
)
def test_refusals_say_whether_to_ask_again(
    place: Place, status: int, code: str, retryable: bool
) -> None:
    civitai(place, civitai_file())
    for path in ("/api/v1/model-versions/7", "/api/download/models/7?type=Model"):
        before = place.answers[path]
        place.answers[path] = (status, {}, b"no")
        with pytest.raises(BaseError) as caught:
            resolver(place).resolve("civitai:7")
        assert (caught.value.code, caught.value.retryable) == (code, retryable)
        assert "canary" not in str(caught.value)
        place.answers[path] = before


def test_missing_key_is_named(place: Place) -> None:
    civitai(place, civitai_file())
    place.answers["/api/download/models/7?type=Model"] = (401, {}, b"")
    with pytest.raises(BaseError, match=r"needs a key \(CIVITAI_API_KEY\)"):
        resolver(place, civitai_key=Secret("")).resolve("civitai:7")
    civitai(place, civitai_file(), to="/login?returnUrl=x")
    with pytest.raises(BaseError, match="CIVITAI_API_KEY"):
        resolver(place).resolve("civitai:7")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"files": ',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"files": null}',
        b'{"files": [1, null, {}]}',
        b'{"files": [{"name": "a.safetensors", "sizeKB": "big"}]}',
        b'{"files": [{"name": "a.safetensors", "sizeKB": -1}]}',
        b'{"files": [{"name": "a.safetensors", "sizeKB": NaN}]}',
        b'{"files": [{"name": "a.safetensors", "sizeKB": 1, "hashes": {"SHA256": "../.."}}]}',
    ],
)
def test_garbage_record_is_a_clear_error(place: Place, body: bytes) -> None:
    civitai(place)
    place.answers["/api/v1/model-versions/7"] = (200, {}, body)
    place.answers["/api/models/a/b/revision/main?blobs=true"] = (200, {}, body)
    for base in ("civitai:7", "hf:a/b"):
        with pytest.raises(BaseError):
            resolver(place).resolve(base)


def test_truncated_answer_is_retryable(place: Place) -> None:
    place.answers["/api/v1/model-versions/7"] = (200, {"Content-Length": "999"}, b'{"files"')
    with pytest.raises(BaseError) as caught:
        resolver(place).resolve("civitai:7")
    assert (caught.value.code, caught.value.retryable) == ("model.unreachable", True)


def test_silent_place_is_retryable() -> None:
    silent = BaseResolver(
        None, civitai_url="http://127.0.0.1:9", huggingface_url="http://127.0.0.1:9"
    )
    for base in ("civitai:7", "hf:a/b"):
        with pytest.raises(BaseError) as caught:
            silent.resolve(base)
        assert (caught.value.code, caught.value.retryable) == ("model.unreachable", True)


def hub(place: Place, *names: str, **file: Any) -> None:
    rows = [
        {"rfilename": name, "size": 500, "lfs": {"sha256": "cd" * 32, "size": 500}, **file}
        for name in names
    ]
    place.json("/api/models/a/b/revision/main?blobs=true", {"sha": "c0ffee", "siblings": rows})
    for name in names:
        place.redirect(f"/a/b/resolve/c0ffee/{name}", SIGNED, 302)


def test_hub_repository_with_one_model_needs_no_file_name(place: Place) -> None:
    hub(place, "README.md", "unet/model.safetensors", "sd15.safetensors")
    (found,) = resolver(place).resolve("hf:a/b")
    assert (found.url, found.name, found.bytes) == (SIGNED, "sd15.safetensors", 500)
    assert found.sha256 == "cd" * 32
    assert place.asked[-1][1]["authorization"] == "Bearer hub-canary"


def test_hub_file_and_revision_can_be_named(place: Place) -> None:
    hub(place, "unet/model.safetensors", "sd15.safetensors")
    assert resolver(place).resolve("hf:a/b/unet/model.safetensors")[0].name == "model.safetensors"
    place.answers["/api/models/a/b/revision/v2?blobs=true"] = place.answers[
        "/api/models/a/b/revision/main?blobs=true"
    ]
    assert resolver(place).resolve("hf:a/b@v2/sd15.safetensors")[0].name == "sd15.safetensors"


def test_hub_repository_without_one_clear_model_says_what_there_is(place: Place) -> None:
    hub(place, "one.safetensors", "two.safetensors", "old.ckpt")
    with pytest.raises(BaseError, match=r"say which file: one\.safetensors, two\.safetensors"):
        resolver(place).resolve("hf:a/b")
    with pytest.raises(BaseError, match="no such file"):
        resolver(place).resolve("hf:a/b/three.safetensors")
    with pytest.raises(BaseError, match="pickle"):
        resolver(place).resolve("hf:a/b/old.ckpt")


def test_hub_repository_that_was_renamed_is_followed(place: Place) -> None:
    hub(place, "x.safetensors")
    place.redirect("/a/b/resolve/c0ffee/x.safetensors", "/new/b/resolve/c0ffee/x.safetensors")
    place.redirect("/new/b/resolve/c0ffee/x.safetensors", SIGNED)
    assert resolver(place).resolve("hf:a/b")[0].url == SIGNED
    place.redirect("/new/b/resolve/c0ffee/x.safetensors", "/a/b/resolve/c0ffee/x.safetensors")
    with pytest.raises(BaseError, match="address to address"):
        resolver(place).resolve("hf:a/b")


def ranged(headers: dict[str, str]) -> Answer:
    first, last = headers["range"].removeprefix("bytes=").split("-")
    part = MODEL[int(first) : int(last) + 1]
    return 206, {"Content-Range": f"bytes {first}-{last}/{len(MODEL)}"}, part


def test_any_address_is_looked_at_before_it_is_handed_on(place: Place) -> None:
    place.answers["/m/my%20model.safetensors?sig=1"] = ranged
    address = place.url + "/m/my%20model.safetensors?sig=1"
    (found,) = resolver(place).resolve(address)
    assert (found.url, found.name) == (address, "my_model.safetensors")
    assert (found.bytes, found.sha256) == (len(MODEL), "")
    place.answers["/whole"] = (200, {}, MODEL)
    (found,) = resolver(place).resolve(f"{place.url}/whole#sha256={SHA256}")
    assert (found.url, found.bytes, found.sha256) == (
        place.url + "/whole",
        len(MODEL),
        SHA256.lower(),
    )
    assert all("authorization" not in headers for _, headers in place.asked)


def test_redirects_of_an_address_are_each_checked(place: Place) -> None:
    place.redirect("/a", "/b", 302)
    place.answers["/b"] = ranged
    assert resolver(place).resolve(place.url + "/a")[0].url == place.url + "/b"
    place.redirect("/b", "http://169.254.169.254/latest", 302)
    with pytest.raises(BaseError) as caught:
        resolver(place).resolve(place.url + "/a")
    assert caught.value.code == "model.bad_address"
    place.redirect("/b", "file:///etc/passwd")
    with pytest.raises(BaseError, match="nowhere"):
        resolver(place).resolve(place.url + "/a")


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"PK\x03\x04" + b"x" * 100, b"\x80\x02}q\x00" + b"x" * 100, b"<html>" * 9]
)
def test_address_of_something_else_is_refused(place: Place, body: bytes) -> None:
    place.answers["/x"] = (200, {}, body)
    with pytest.raises(BaseError) as caught:
        resolver(place).resolve(place.url + "/x")
    assert (caught.value.code, caught.value.retryable) == ("model.not_safetensors", False)


def test_private_address_is_refused_unless_the_operator_allows_it(place: Place) -> None:
    place.answers["/x"] = ranged
    with pytest.raises(BaseError) as caught:
        resolver(place, private=False).resolve(place.url + "/x?signature=canary")
    assert caught.value.code == "model.bad_address"
    assert "canary" not in str(caught.value)
    assert place.asked == []


@pytest.mark.parametrize(
    "base",
    ["", "civitai:", "civitai:x", "civitai:../1", "hf:", "hf:a", "hf:a/b/", "ftp://x", "s3:"],
)
def test_address_of_no_known_form_is_refused(place: Place, base: str) -> None:
    with pytest.raises(BaseError) as caught:
        resolver(place).resolve(base)
    assert caught.value.code == "model.bad_address"
    assert place.asked == []


def test_settings_hold_all_that_a_resolver_needs() -> None:
    made = BaseResolver.from_settings(Settings(civitai_api_key=Secret("canary")), None)
    assert "canary" not in repr(made)


# --- models of many files ---------------------------------------------------------------------


class Shelf:
    """Our own store, as far as base models need it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def head(self, key: str) -> int | None:
        return len(self.objects[key]) if key in self.objects else None

    def put_bytes(self, key: str, body: bytes) -> None:
        self.objects[key] = body

    def presign_get(self, key: str) -> str:
        return f"https://s3.example/{key}?signed"

    def list_prefix(self, prefix: str) -> list[Stored]:
        return [
            Stored(key=key, bytes=len(body)) for key, body in self.objects.items() if prefix in key
        ]


def repository(place: Place, repo: str, large: list[str], small: list[str]) -> None:
    rows = [
        {"rfilename": name, "size": 500, "lfs": {"size": 500, "sha256": SHA256}} for name in large
    ]
    rows += [{"rfilename": name, "size": 2} for name in small]
    place.json(f"/api/models/{repo}/revision/main?blobs=true", {"sha": "c0ffee", "siblings": rows})
    for name in large:
        place.redirect(f"/{repo}/resolve/c0ffee/{name}", f"https://cdn.example/{name}?s=1", 302)
    for name in small:
        place.answers[f"/{repo}/resolve/c0ffee/{name}"] = (200, {}, b"{}")


def shelved(place: Place, shelf: Shelf) -> BaseResolver:
    token = Secret("hub-canary")
    return BaseResolver(
        cast(Storage, shelf),
        civitai_url=place.url,
        huggingface_url=place.url,
        huggingface_token=token,
        private=True,
    )


def test_hub_repository_of_a_diffusers_model_comes_as_its_files(place: Place) -> None:
    """Half precision where there is one; small files by way of our store, without our token."""
    repository(
        place,
        "a/b",
        large=[
            "unet/model.safetensors",
            "unet/model.fp16.safetensors",
            "vae/model.safetensors",
            "vae/model.bin",
            "all-in-one.safetensors",
        ],
        small=["model_index.json", "unet/config.json", "tokenizer/merges.txt", "README.md"],
    )
    shelf = Shelf()
    found = {part.name: part for part in shelved(place, shelf).resolve("hf:a/b", "sdxl")}
    assert next(iter(found)) == "model_index.json"
    assert set(found) == {
        "model_index.json",
        "unet/config.json",
        "unet/model.safetensors",
        "vae/model.safetensors",
        "tokenizer/merges.txt",
    }
    assert "fp16" in found["unet/model.safetensors"].url
    assert found["unet/config.json"].url.startswith("https://s3.example/bases/hub/a/b/c0ffee/")
    assert "canary" not in repr([part.url for part in found.values()])


def test_small_files_of_a_repository_are_copied_once(place: Place) -> None:
    repository(place, "a/b", large=[], small=["model_index.json"])
    shelf = Shelf()
    for _ in range(2):
        shelved(place, shelf).resolve("hf:a/b", "sd1")
    assert [path for path, _ in place.asked].count("/a/b/resolve/c0ffee/model_index.json") == 1


def single(*names: str) -> bytes:
    header = json.dumps({name: {} for name in names}).encode()
    return struct.pack("<Q", len(header)) + header + b"0" * 100


FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(
    ("tensors", "folders"),
    [
        (("double_blocks.0.x",), {"vae", "text_encoder", "tokenizer"}),
        (("double_blocks.0.x", "vae.decoder.x"), {"text_encoder", "tokenizer"}),
        (("vae.decoder.x", "text_encoders.t5xxl.x"), {"tokenizer"}),
    ],
)
def test_what_a_single_file_lacks_comes_from_its_familys_repository(
    place: Place, tensors: tuple[str, ...], folders: set[str]
) -> None:
    repository(
        place,
        FLUX,
        large=[f"{name}/model.safetensors" for name in ("transformer", "vae", "text_encoder")],
        small=["model_index.json", "tokenizer/merges.txt"],
    )
    place.answers["/x"] = (200, {}, single(*tensors))
    file, *parts = shelved(place, Shelf()).resolve(place.url + "/x", "flux")
    assert file.url == place.url + "/x"
    assert {part.name.partition("/")[0] for part in parts} == folders


def test_a_whole_family_asks_no_repository_for_the_rest(place: Place) -> None:
    place.answers["/x"] = (200, {}, MODEL)
    assert len(shelved(place, Shelf()).resolve(place.url + "/x", "sdxl")) == 1


def test_a_folder_of_our_own_store_is_a_base(place: Place) -> None:
    shelf = Shelf()
    for name in ("model_index.json", "unet/config.json", "unet/model.safetensors", "notes.md"):
        shelf.objects[f"bases/mine/{name}"] = b"{}"
    found = shelved(place, shelf).resolve("s3:bases/mine/", "sd1")
    assert [part.name for part in found] == [
        "model_index.json",
        "unet/config.json",
        "unet/model.safetensors",
    ]
    with pytest.raises(BaseError, match=r"model_index\.json"):
        shelved(place, shelf).resolve("s3:bases/other/", "sd1")


# --- looking a link up ------------------------------------------------------------------------


def version_record(**changes: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "name": "v8",
        "baseModel": "SDXL 1.0",
        "trainedWords": ["dreamy"],
        "model": {"name": "Dreamy", "type": "Checkpoint"},
        "files": [civitai_file()],
        **changes,
    }


def test_a_link_to_civitai_says_name_kind_family_and_size(place: Place) -> None:
    place.json("/api/v1/models/3", {"modelVersions": [{"id": 7}, {"id": 6}]})
    place.json("/api/v1/model-versions/7", version_record())
    found = resolver(place).look_up(f"{place.url}/models/3/dreamy")
    assert (found.base, found.name, found.version, found.kind, found.family) == (
        "civitai:7", "Dreamy", "v8", "Checkpoint", "sdxl",
    )  # fmt: skip
    assert (found.bytes, found.sha256) == (2560, "ab" * 32)
    assert (found.trigger_words, found.fault) == (("dreamy",), "")
    # a look costs no download: nothing was signed
    assert not any("download" in path for path, _ in place.asked)
    assert resolver(place).look_up("civitai:7") == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "x", "type": "LORA"}}, "is a LORA"),
        ({"baseModel": "Wan Video 2.2"}, "is a Wan Video 2.2"),
        ({"files": [civitai_file(name="x.ckpt")]}, "pickle"),
    ],
)
def test_a_model_that_is_no_base_is_shown_with_its_fault(
    place: Place, changes: dict[str, Any], words: str
) -> None:
    place.json("/api/v1/model-versions/7", version_record(**changes))
    assert words in resolver(place).look_up("civitai:7").fault


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"model": None, "files": None, "trainedWords": None, "baseModel": None},
        {"model": [], "files": [{"sizeKB": "x"}], "trainedWords": "x", "name": {}},
    ],
)
def test_a_record_of_nonsense_is_no_base(place: Place, record: dict[str, Any]) -> None:
    place.json("/api/v1/model-versions/7", record)
    found = resolver(place).look_up("civitai:7")
    assert (found.bytes, bool(found.fault)) == (None, True)
    place.json("/api/v1/models/3", {"modelVersions": [{"id": "x"}, None]})
    with pytest.raises(BaseError, match="lists no version"):
        resolver(place).look_up(f"{place.url}/models/3")


def test_a_link_to_the_hub_says_family_and_size_of_a_folder_and_of_a_file(place: Place) -> None:
    files = [
        {"rfilename": "model_index.json", "size": 500},
        {"rfilename": "unet/model.safetensors", "size": 9, "lfs": {"size": 900, "sha256": SHA256}},
        {"rfilename": "one.safetensors", "lfs": {"size": 70, "sha256": SHA256}},
        {"rfilename": "README.md", "size": 10_000},
    ]
    record = {
        "sha": "c0ffee",
        "siblings": files,
        "tags": ["diffusers:FluxPipeline", 3],
        "cardData": {"instance_prompt": "a photo of ohwx"},
    }
    place.json("/api/models/a/b/revision/main?blobs=true", record)
    folder = resolver(place).look_up(f"{place.url}/a/b")
    assert (folder.base, folder.kind, folder.family, folder.bytes) == (
        "hf:a/b", "folder", "flux", 1400,
    )  # fmt: skip
    assert folder.trigger_words == ("a photo of ohwx",)
    file = resolver(place).look_up(f"{place.url}/a/b/blob/main/one.safetensors")
    assert (file.base, file.bytes, file.sha256) == (
        "hf:a/b/one.safetensors", 70, "ab" * 32,
    )  # fmt: skip
    place.json("/api/models/a/b/revision/main?blobs=true", {**record, "gated": "auto"})
    assert resolver(place).look_up("hf:a/b").fault == ""
    assert "gated" in resolver(place, huggingface_token=Secret("")).look_up("hf:a/b").fault


def test_a_link_that_leads_nowhere_says_so(place: Place) -> None:
    for link, code in (
        ("dreamshaper", "model.bad_address"),
        (f"{place.url}/models/99", "model.not_found"),
        ("hf:a/none", "model.not_found"),
        ("s3:bases/x", "model.bad_address"),
    ):
        with pytest.raises(BaseError) as refused:
            resolver(place).look_up(link)
        assert refused.value.code == code
        assert not refused.value.retryable
