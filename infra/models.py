"""Where base models come from: Civitai, Hugging Face, our own S3, or any https address.

An address as a customer writes it becomes a short-lived URL that a rented machine can download
without a key of ours. Whoever asks gets the size, and the SHA-256 where somebody published it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from gpu_agent.recipe import REPOSITORIES
from gpu_agent.wire import Download
from infra import guard, model_folders, model_links
from infra.settings import Settings
from infra.storage import Storage
from state.errors import StokerError
from state.events import Secret

#: Base models of our own lie here; every other key of the bucket is somebody's data.
STORED_PREFIX = "bases/"

_TIMEOUT_S = 20.0
_LARGEST_RECORD = 8 << 20
_LARGEST_HEADER = 100_000_000
_MOST_REDIRECTS = 5
_PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_HUGGING_FACE = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")

_NO_KEY = Secret("")

Http = Callable[..., guard.Response]


class BaseError(StokerError):
    """A base model cannot be had. `code` is for programs; `retryable`: later it may be."""

    def __init__(self, message: str, *, code: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable


@dataclass(frozen=True)
class _Repository:
    """Of the hub, at one commit: its files by path, and what else its record says."""

    what: str
    repo: str
    commit: str
    files: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]

    @property
    def tags(self) -> list[str]:
        listed = self.record.get("tags")
        return [tag for tag in (listed if isinstance(listed, list) else ()) if isinstance(tag, str)]

    def size(self, path: str) -> int | None:
        """Of a file, in bytes; None where the hub does not say."""
        file = self.files[path]
        large = file.get("lfs")
        size = (large if isinstance(large, dict) else {}).get("size", file.get("size"))
        return size if isinstance(size, int) and size > 0 else None


@dataclass(frozen=True, kw_only=True)
class FoundBase:
    """What a link leads to.

    Attributes:
        base: its address, as an order names it.
        kind: what the site calls it: `Checkpoint`, `LORA` …; `folder` or `file` elsewhere.
        family: one of ours; None where nobody says.
        bytes: of all files of the model itself; None where nobody says.
        fault: why it cannot be trained on; empty where it can.
    """

    base: str
    name: str
    version: str = ""
    kind: str = "file"
    family: str | None = None
    bytes: int | None = None
    sha256: str = ""
    trigger_words: tuple[str, ...] = ()
    fault: str = ""


class BaseResolver:
    """Makes downloads of base models' addresses. Holds the keys; hands none of them on.

    Args:
        storage: for `s3:` addresses.
        private: customers' own URLs may lead into private networks (an operator's choice).
        http: `guard.guarded_request`, or a test's.
    """

    def __init__(
        self,
        storage: Storage | None,
        *,
        civitai_url: str,
        huggingface_url: str,
        civitai_key: Secret = _NO_KEY,
        huggingface_token: Secret = _NO_KEY,
        private: bool = False,
        http: Http = guard.guarded_request,
    ) -> None:
        self._storage = storage
        self._civitai, self._civitai_key = civitai_url, civitai_key
        self._hub, self._hub_token = huggingface_url, huggingface_token
        self._private, self._http = private, http

    @classmethod
    def from_settings(cls, settings: Settings, storage: Storage | None) -> BaseResolver:
        return cls(
            storage,
            civitai_url=settings.civitai_url,
            huggingface_url=settings.huggingface_url,
            civitai_key=settings.civitai_api_key,
            huggingface_token=settings.huggingface_token,
            private=settings.private_bases,
        )

    def resolve(
        self, base: str, family: str = "sd1", *, allow_pickle: bool = False
    ) -> tuple[Download, ...]:
        """The downloads of `base`: `civitai:<version>`, `hf:<owner>/<repo>[@<revision>][/<file>]`,
        `s3:bases/<name>`, `s3:bases/<folder>/` or `https://…[#sha256=<hex>]`.

        One for a single file; more, the first of which is `model_index.json`, for a diffusers
        folder. What a single file of `family` lacks (encoders, tokenizers) follows it, named as
        in a diffusers folder, from the family's own repository.

        Raises:
            BaseError: no such model, no right to it, not a safetensors file, or the place does
                not answer.
        """
        kind, _, rest = base.partition(":")
        with _translated(base):
            match kind:
                case "civitai":
                    return self._whole(self._from_civitai(rest, allow_pickle), family)
                case "hf":
                    return self._from_hub(rest, family, allow_pickle)
                case "s3" if rest.endswith("/"):
                    return self._from_stored_folder(rest)
                case "s3":
                    return self._whole(self._from_storage(rest, allow_pickle), family)
                case "https" | "http":
                    found = self._from_url(base, allow_pickle)
                    return self._whole(found, family, private=self._private)
                case _:
                    pass
        raise BaseError(f"{_shown(base)} is no base model's address", code="model.bad_address")

    def look_up(self, link: str) -> FoundBase:
        """What a link to a model leads to, as people paste it from a browser, or as an order
        names it. Nothing is downloaded, and nothing signed.

        Raises:
            BaseError: as `resolve`.
        """
        said = model_links.understood(link, self._civitai, self._hub)
        with _translated(link):
            match said:
                case model_links.Version():
                    return self._found_on_civitai(said)
                case str() if said.startswith("hf:"):
                    return self._found_on_hub(said)
                case str() if said.startswith("s3:") and said.endswith("/"):
                    parts = self._from_stored_folder(said.removeprefix("s3:"))
                    size = sum(part.bytes for part in parts)
                    name = said.rstrip("/").rpartition("/")[2]
                    return FoundBase(base=said, name=name, kind="folder", bytes=size)
                case str():
                    if said.startswith("s3:"):
                        file = self._from_storage(said.removeprefix("s3:"), allow_pickle=False)
                    else:
                        file = self._from_url(said, allow_pickle=False)
                    return FoundBase(
                        base=said, name=file.name, bytes=file.bytes, sha256=file.sha256
                    )
                case None:
                    pass
        raise BaseError(
            f"{_shown(link)} is no link to a model on Civitai or Hugging Face, nor an address",
            code="model.bad_address",
        )

    # Civitai

    def _found_on_civitai(self, said: model_links.Version) -> FoundBase:
        headers, version = _bearer(self._civitai_key), said.version
        if not version:
            what = f"civitai.com/models/{said.model}"
            model = self._record(what, f"{self._civitai}/api/v1/models/{said.model}", headers)
            listed = model.get("modelVersions")
            rows = listed if isinstance(listed, list) else []
            ids = [row.get("id") for row in rows if isinstance(row, dict)]
            newest = next((item for item in ids if type(item) is int and item > 0), None)
            if newest is None:
                raise _unreadable(what, "lists no version")
            version = str(newest)
        what = f"civitai:{version}"
        record = self._record(what, f"{self._civitai}/api/v1/model-versions/{version}", headers)
        about = record.get("model")
        about = about if isinstance(about, dict) else {}
        kind, base_model = str(about.get("type") or ""), str(record.get("baseModel") or "")
        fault = model_links.fault_on_civitai(kind, base_model)
        file: Mapping[str, Any] = {}
        try:
            file = _civitai_file(what, record, allow_pickle=False)
        except BaseError as error:
            fault = fault or str(error)
        hashes = file.get("hashes")
        sha256 = hashes.get("SHA256", "") if isinstance(hashes, dict) else ""
        return FoundBase(
            base=what,
            name=str(about.get("name") or record.get("name") or what)[:200],
            version=str(record.get("name") or "")[:100],
            kind=kind[:40] or "file",
            family=model_links.family_on_civitai(base_model),
            bytes=round(file["sizeKB"] * 1024) if file else None,
            sha256=_sha256(what, sha256),
            trigger_words=model_links.words(record.get("trainedWords")),
            fault=fault,
        )

    def _found_on_hub(self, base: str) -> FoundBase:
        named = _HUGGING_FACE.fullmatch(base.removeprefix("hf:"))
        if named is None:
            raise BaseError(f"{_shown(base)} names no repository", code="model.bad_address")
        there = self._repository(base, named["repo"], named["revision"] or "main")
        folder = named["file"] is None and not there.files.keys().isdisjoint(model_folders.INDEXES)
        if folder:
            paths = list(model_folders.folder_files(there.files).values())
        else:
            paths = [_hub_file(base, there.files, named["file"], allow_pickle=False)]
        sizes = [there.size(path) for path in paths]
        large = there.files[paths[0]].get("lfs")
        sha256 = large.get("sha256", "") if isinstance(large, dict) and not folder else ""
        card = there.record.get("cardData")
        card = card if isinstance(card, dict) else {}
        has_token = bool(self._hub_token.reveal())
        return FoundBase(
            base=base,
            name=named["repo"] if folder else f"{named['repo']}/{paths[0]}",
            version=there.commit[:12],
            kind="folder" if folder else "file",
            family=model_links.family_on_hub(named["repo"], there.tags),
            bytes=None if None in sizes else sum(size or 0 for size in sizes),
            sha256=_sha256(base, sha256),
            trigger_words=model_links.words(card.get("instance_prompt")),
            fault=model_links.fault_on_hub(there.tags, there.record.get("gated"), has_token),
        )

    def _from_civitai(self, version: str, allow_pickle: bool) -> Download:
        what = f"civitai:{version}"
        if not version.isascii() or not version.isdigit():
            raise BaseError(f"{what} names no version", code="model.bad_address")
        headers = _bearer(self._civitai_key)
        record = self._record(what, f"{self._civitai}/api/v1/model-versions/{version}", headers)
        file = _civitai_file(what, record, allow_pickle)
        path = urlsplit(str(file.get("downloadUrl") or ""))
        if not path.path.startswith("/api/download/models/"):
            path = urlsplit(f"/api/download/models/{version}")
        address = self._civitai + path._replace(scheme="", netloc="", fragment="").geturl()
        url = self._signed(what, address, headers, "CIVITAI_API_KEY")
        hashes = file.get("hashes")
        sha256 = hashes.get("SHA256", "") if isinstance(hashes, dict) else ""
        return Download(
            url=url,
            name=_file_name(str(file.get("name"))),
            bytes=round(file["sizeKB"] * 1024),
            sha256=_sha256(what, sha256),
        )

    # Hugging Face

    def _from_hub(self, address: str, family: str, allow_pickle: bool) -> tuple[Download, ...]:
        what = f"hf:{address}"
        named = _HUGGING_FACE.fullmatch(address)
        if named is None:
            raise BaseError(f"{_shown(what)} names no repository", code="model.bad_address")
        there = self._repository(what, named["repo"], named["revision"] or "main")
        if named["file"] is None and not there.files.keys().isdisjoint(model_folders.INDEXES):
            paths = model_folders.folder_files(there.files)
            parts = [self._hub_part(there, name, path) for name, path in paths.items()]
            return tuple(sorted(parts, key=lambda part: part.name not in model_folders.INDEXES))
        path = _hub_file(what, there.files, named["file"], allow_pickle)
        return self._whole(self._hub_part(there, _file_name(path), path), family)

    def _repository(self, what: str, repo: str, revision: str) -> _Repository:
        place = f"{quote(repo)}/revision/{quote(revision, safe='')}?blobs=true"
        record = self._record(what, f"{self._hub}/api/models/{place}", _bearer(self._hub_token))
        rows = record.get("siblings")
        files = {
            row["rfilename"]: row
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, dict) and isinstance(row.get("rfilename"), str)
        }
        # the commit, so that bytes and hash belong together whatever is pushed meanwhile
        return _Repository(what, repo, str(record.get("sha") or revision), files, record)

    def _hub_part(self, there: _Repository, name: str, path: str) -> Download:
        file, headers = there.files[path], _bearer(self._hub_token)
        commit = quote(there.commit, safe="")
        place = f"{self._hub}/{quote(there.repo)}/resolve/{commit}/{quote(path)}"
        large = file.get("lfs")
        large = large if isinstance(large, dict) else {}
        size = there.size(path)
        if size is None:
            raise _unreadable(there.what, f"does not say how large {path} is")
        if large or self._storage is None:
            url = self._signed(there.what, place, headers, "HF_TOKEN")
            return Download(
                url=url, name=name, bytes=size, sha256=_sha256(there.what, large.get("sha256", ""))
            )
        # the hub has no addresses without a key for its small files, so we keep a copy
        key = f"{STORED_PREFIX}hub/{there.repo}/{there.commit}/{path}"
        if self._storage.head(key) is None:
            answer = self._ask(place, headers, _LARGEST_RECORD)
            _check_status(there.what, answer)
            self._storage.put_bytes(key, answer.body)
            size = len(answer.body)
        return Download(url=self._storage.presign_get(key), name=name, bytes=size)

    def _whole(self, file: Download, family: str, *, private: bool = True) -> tuple[Download, ...]:
        """A single file and what it lacks, from its family's own repository."""
        if family not in model_folders.OFTEN_PARTIAL:
            return (file,)
        tensors = self._tensors(file, private)
        what = f"hf:{REPOSITORIES[family]}"
        there = self._repository(what, REPOSITORIES[family], "main")
        paths = model_folders.folder_files(there.files)
        wanted = model_folders.lacking(tensors, {name.partition("/")[0] for name in paths})
        parts = [
            self._hub_part(there, name, path)
            for name, path in paths.items()
            if name.partition("/")[0] in wanted
        ]
        return (file, *parts)

    def _tensors(self, file: Download, private: bool) -> list[str]:
        """The names of the tensors in a safetensors file, by its header alone."""
        start = self._range(file, 0, 8, private)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(_LARGEST_RECORD, file.bytes - 8):
            raise BaseError(f"{file.name} is no safetensors file", code="model.not_safetensors")
        try:
            return list(json.loads(self._range(file, 8, length, private)))
        except (ValueError, RecursionError, TypeError):
            raise _unreadable(file.name, "has a header that is not JSON") from None

    def _range(self, file: Download, start: int, size: int, private: bool) -> bytes:
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        answer = self._http(
            "GET",
            file.url,
            headers=headers,
            timeout=_TIMEOUT_S,
            allow_private=private,
            # some servers ignore the range and send it all
            limit=start + size,
        )
        _check_status(file.name, answer)
        body = answer.body if answer.status == 206 else answer.body[start : start + size]
        if len(body) < size:
            raise _unreadable(file.name, "ends too early")
        return body

    # our own store

    def _from_storage(self, key: str, allow_pickle: bool) -> Download:
        what = f"s3:{key}"
        if not key.startswith(STORED_PREFIX) or ".." in key or self._storage is None:
            raise BaseError(
                f"{_shown(what)}: base models lie below s3:{STORED_PREFIX}",
                code="model.bad_address",
            )
        _refuse_pickle(what, key, allow_pickle)
        size = self._storage.head(key)
        if size is None:
            raise BaseError(f"{what} is not in the store", code="model.not_found")
        url = self._storage.presign_get(key)
        return Download(url=url, name=_file_name(key), bytes=size)

    def _from_stored_folder(self, prefix: str) -> tuple[Download, ...]:
        what = f"s3:{prefix}"
        if not prefix.startswith(STORED_PREFIX) or ".." in prefix or self._storage is None:
            raise BaseError(
                f"{_shown(what)}: base models lie below s3:{STORED_PREFIX}",
                code="model.bad_address",
            )
        sizes = {item.key[len(prefix) :]: item.bytes for item in self._storage.list_prefix(prefix)}
        if sizes.keys().isdisjoint(model_folders.INDEXES):
            raise BaseError(f"{what} has no model_index.json", code="model.not_found")
        parts = [
            Download(url=self._storage.presign_get(prefix + path), name=name, bytes=sizes[path])
            for name, path in model_folders.folder_files(sizes).items()
        ]
        return tuple(sorted(parts, key=lambda part: part.name not in model_folders.INDEXES))

    # any address

    def _from_url(self, address: str, allow_pickle: bool) -> Download:
        url, _, fragment = address.partition("#")
        what = _shown(url)
        sha256 = _sha256(what, fragment.removeprefix("sha256=")) if fragment else ""
        for _ in range(_MOST_REDIRECTS):
            answer = self._http(
                "GET",
                url,
                headers={"Range": "bytes=0-15", "Accept-Encoding": "identity"},
                timeout=_TIMEOUT_S,
                allow_private=self._private,
                limit=16,
            )
            target = _redirect(answer, url)
            if target is None:
                break
            url = target
        else:
            raise _unreadable(what, "sends us from address to address")
        _check_status(what, answer)
        size = _whole_size(answer)
        if size is None:
            raise _unreadable(what, "does not say how large the file is")
        if size < 16 or len(answer.body) < 9:
            raise BaseError(f"{what} has {size} bytes: no model", code="model.not_safetensors")
        if not _looks_like_safetensors(answer.body, size) and not allow_pickle:
            raise BaseError(
                f"{what} is not a safetensors file (pickles can run code, so they are refused)",
                code="model.not_safetensors",
            )
        return Download(url=url, name=_file_name(urlsplit(address).path), bytes=size, sha256=sha256)

    # HTTP

    def _record(self, what: str, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
        answer = self._ask(url, {**headers, "Accept": "application/json"}, _LARGEST_RECORD)
        _check_status(what, answer)
        try:
            record = json.loads(answer.body)
        except (ValueError, RecursionError):
            raise _unreadable(what, "has a record that is not JSON") from None
        if not isinstance(record, dict):
            raise _unreadable(what, "has a record that is no object")
        return record

    def _signed(self, what: str, url: str, headers: Mapping[str, str], key_name: str) -> str:
        """Where `url` sends a downloader who has our key: an address that needs none."""
        home = urlsplit(url).netloc
        for _ in range(_MOST_REDIRECTS):
            answer = self._ask(url, headers, 1)
            if answer.status in (401, 403) or _to_login(answer):
                raise BaseError(
                    f"{what} may not be downloaded: "
                    + ("the key has no right to it" if headers else "it needs a key")
                    + f" ({key_name})",
                    code="model.unauthorized",
                )
            target = _redirect(answer, url)
            if target is None:
                _check_status(what, answer)
                return url
            # within the house without a signature: a repository that was renamed, say
            if urlsplit(target).netloc != home or urlsplit(target).query:
                return target
            url = target
        raise _unreadable(what, "sends us from address to address")

    def _ask(self, url: str, headers: Mapping[str, str], limit: int) -> guard.Response:
        """Of a place that the operator chose, so it may be anywhere."""
        return self._http(
            "GET", url, headers=headers, timeout=_TIMEOUT_S, allow_private=True, limit=limit
        )


@contextlib.contextmanager
def _translated(base: str) -> Iterator[None]:
    """The guard's errors as ours."""
    try:
        yield
    except guard.GuardRefused as exc:
        raise BaseError(f"{_shown(base)}: {exc}", code="model.bad_address") from None
    except guard.GuardError as exc:
        raise BaseError(
            f"{_shown(base)}: {exc}", code="model.unreachable", retryable=True
        ) from None


def _bearer(key: Secret) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.reveal()}"} if key.reveal() else {}


def _shown(base: str) -> str:
    """Without a query: it may hold a signature."""
    return base.partition("?")[0][:200]


def _unreadable(what: str, why: str) -> BaseError:
    return BaseError(f"{what} {why}", code="model.unreadable", retryable=True)


def _check_status(what: str, answer: guard.Response) -> None:
    match answer.status:
        case 200 | 206:
            return
        case 401 | 403:
            raise BaseError(
                f"{what} may not be read (HTTP {answer.status})", code="model.unauthorized"
            )
        case 404 | 410:
            raise BaseError(f"{what} does not exist", code="model.not_found")
        case 429:
            raise BaseError(
                f"{what}: too many requests for now", code="model.throttled", retryable=True
            )
        case status:
            raise BaseError(
                f"{what} answers with HTTP {status}",
                code="model.unreachable",
                retryable=status >= 500,
            )


def _redirect(answer: guard.Response, url: str) -> str | None:
    """Where it leads; None for any other answer."""
    if answer.status not in (301, 302, 303, 307, 308):
        return None
    try:
        target = urljoin(url, answer.headers.get("Location", ""))
        urlsplit(target)
    except ValueError:
        raise _unreadable(_shown(url), "redirects to nowhere") from None
    if target == url or not target.startswith(("https://", "http://")):
        raise _unreadable(_shown(url), "redirects to nowhere")
    if url.startswith("https://") and not target.startswith("https://"):
        raise _unreadable(_shown(url), "redirects out of https")
    return target


def _to_login(answer: guard.Response) -> bool:
    return urlsplit(answer.headers.get("Location", "")).path.startswith("/login")


def _civitai_file(what: str, record: Mapping[str, Any], allow_pickle: bool) -> dict[str, Any]:
    """The primary file where it is safetensors, else the first that is."""
    rows = record.get("files")
    models: list[dict[str, Any]] = [
        file
        for file in (rows if isinstance(rows, list) else ())
        if isinstance(file, dict)
        and file.get("type") in ("Model", "Pruned Model", None)
        and isinstance(file.get("sizeKB"), int | float)
        and 0 < file["sizeKB"] < 1e12
    ]
    if not models:
        raise _unreadable(what, "lists no model file")
    models.sort(key=lambda file: not file.get("primary"))
    safe = [file for file in models if str(file.get("name")).lower().endswith(".safetensors")]
    if safe:
        return safe[0]
    if not allow_pickle:
        _refuse_pickle(what, str(models[0].get("name")), allow_pickle)
        raise BaseError(f"{what} has no safetensors file", code="model.not_safetensors")
    return models[0]


def _hub_file(what: str, files: Iterable[str], wanted: str | None, allow_pickle: bool) -> str:
    """The path of the file that is wanted, or of the one model at the repository's top."""
    if wanted is not None:
        if wanted not in files:
            raise BaseError(f"{what}: the repository has no such file", code="model.not_found")
        _refuse_pickle(what, wanted, allow_pickle)
        return wanted
    models = sorted(name for name in files if "/" not in name and name.endswith(".safetensors"))
    if len(models) != 1:
        raise BaseError(
            f"{what}: "
            + (
                f"say which file: {', '.join(models[:8])}"
                if models
                else "the repository has no safetensors file at its top; name the file"
            ),
            code="model.ambiguous" if models else "model.not_found",
        )
    return models[0]


def _refuse_pickle(what: str, name: str, allow_pickle: bool) -> None:
    if PurePosixPath(name).suffix.lower() in _PICKLES and not allow_pickle:
        raise BaseError(
            f"{what} is a pickle, which can run code; ask for a safetensors file",
            code="model.pickle",
        )


def _looks_like_safetensors(start: bytes, size: int) -> bool:
    length = int.from_bytes(start[:8], "little")
    return 2 <= length <= min(_LARGEST_HEADER, size - 8) and start[8:9] == b"{"


def _whole_size(answer: guard.Response) -> int | None:
    text = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _sha256(what: str, text: Any) -> str:
    """In lower case; empty where nobody published one."""
    if text in ("", None):
        return ""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise _unreadable(what, "has a SHA-256 that is none")
    return text.lower()


def _file_name(path: str) -> str:
    """The last part of `path`, fit for any file system."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", unquote(path).rpartition("/")[2]).lstrip(".")
    return name[-120:] or "base.safetensors"
