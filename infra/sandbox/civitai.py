"""Civitai as far as a downloader sees it: a model version's record, and its file.

`directory` holds the files and an `index.json`: `{"<version id>": "<file name>"}`. It is read
anew for each request, so files may be added while the sandbox runs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, redirect, request, send_file
from werkzeug.wrappers import Response as BaseResponse

#: The real one's addresses live longer; short ones show who keeps them too long.
URL_LIFE_S = 300


class Shelf:
    """The files that can be had, with their SHA-256 (computed once per state of a file)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hashes: dict[tuple[str, int, int], str] = {}

    def file(self, version: int) -> Path | None:
        """Where the file of a version is; None when there is none."""
        try:
            index = json.loads((self._directory / "index.json").read_text())
        except (OSError, ValueError):
            return None
        name = index.get(str(version)) if isinstance(index, dict) else None
        path = self._directory / Path(str(name)).name
        return path if name and path.is_file() else None

    def versions(self) -> list[int]:
        try:
            index = json.loads((self._directory / "index.json").read_text())
        except (OSError, ValueError):
            return []
        numbers = index if isinstance(index, dict) else {}
        return [int(number) for number in numbers if number.isascii() and number.isdigit()]

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            with path.open("rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]


def civitai_blueprint(
    shelf: Shelf, api_key: str, *, clock: Callable[[], float] = time.time
) -> Blueprint:
    """The routes; `api_key` is what a download needs (as bearer token or `?token=`)."""
    api = Blueprint("civitai", __name__)
    signing_key = secrets.token_bytes(32)

    def signature(version: int, name: str, expires: int) -> str:
        text = f"{version}/{name}/{expires}".encode()
        return hmac.new(signing_key, text, hashlib.sha256).hexdigest()

    @api.get("/api/v1/model-versions/<int:version>")
    def model_version(version: int) -> tuple[Response, int]:
        path = shelf.file(version)
        if path is None:
            return jsonify({"error": f"No model version with id {version}"}), 404
        return jsonify(_record(version, path, shelf.sha256(path), request.host_url)), 200

    @api.get("/api/v1/models/<int:model>")
    def model(model: int) -> tuple[Response, int]:
        """A model by its number, with its versions, the newest first."""
        versions = [
            _record(version, path, shelf.sha256(path), request.host_url)
            for version in sorted(shelf.versions(), reverse=True)
            if _model_of(version) == model and (path := shelf.file(version)) is not None
        ]
        if not versions:
            return jsonify({"error": f"No model with id {model}"}), 404
        about = versions[0]["model"]
        return jsonify({"id": model, **about, "modelVersions": versions}), 200

    @api.get("/api/download/models/<int:version>")
    def download(version: int) -> tuple[BaseResponse, int]:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        key = bearer or request.args.get("token", "")
        if not api_key or not hmac.compare_digest(key.encode(), api_key.encode()):
            words = "The creator of this asset requires you to be logged in to download it"
            return jsonify({"error": "Unauthorized", "message": words}), 401
        path = shelf.file(version)
        if path is None:
            return jsonify({"error": "Model not found"}), 404
        expires = int(clock()) + URL_LIFE_S
        signed = signature(version, path.name, expires)
        place = f"{request.host_url}civitai-delivery/{version}/{path.name}"
        return redirect(f"{place}?expires={expires}&signature={signed}", 307), 307

    @api.get("/civitai-delivery/<int:version>/<name>")
    def deliver(version: int, name: str) -> BaseResponse:
        expires = request.args.get("expires", 0, type=int)
        given = request.args.get("signature", "")
        wanted = signature(version, name, expires)
        path = shelf.file(version)
        if not hmac.compare_digest(given.encode(), wanted.encode()) or expires < clock():
            return Response("<Error><Code>AccessDenied</Code></Error>", 403)
        if path is None or path.name != name:
            return Response("<Error><Code>NoSuchKey</Code></Error>", 404)
        return send_file(
            path, mimetype="application/octet-stream", conditional=True, as_attachment=True
        )

    return api


def _model_of(version: int) -> int:
    return version // 10 or 1


def _record(version: int, path: Path, sha256: str, host_url: str) -> dict[str, Any]:
    url = f"{host_url}api/download/models/{version}"
    size = path.stat().st_size
    return {
        "id": version,
        "modelId": _model_of(version),
        "name": "v1.0",
        "baseModel": "SD 1.5",
        "status": "Published",
        "trainedWords": [],
        "model": {"name": path.stem, "type": "Checkpoint", "nsfw": False, "poi": False},
        "files": [
            {
                "id": version * 10 + 1,
                "sizeKB": size / 1024,
                "name": path.name,
                "type": "Model",
                "primary": True,
                "pickleScanResult": "Success",
                "virusScanResult": "Success",
                "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"},
                "hashes": {"SHA256": sha256.upper()},
                "downloadUrl": url,
            }
        ],
        "downloadUrl": url,
    }
