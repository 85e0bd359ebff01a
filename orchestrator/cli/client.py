"""The public API, as the command line uses it: over HTTP, like any other customer."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import requests

from infra.settings import Settings
from orchestrator.cli.console import CliError, Exit

TIMEOUT_S = 40.0
_CODES = {401: Exit.AUTH, 403: Exit.AUTH, 404: Exit.NOT_FOUND, 402: Exit.OVER_BUDGET}


def credentials_file(settings: Settings) -> Path:
    """Where `stoker up` leaves the URL and a key for commands on the same machine."""
    return settings.data_dir / "client.json"


class Client:
    """Calls one installation with one API key.

    Every method raises `CliError` for whatever is not a success, with the server's own words.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Authorization"] = f"Bearer {key}"

    @classmethod
    def here(cls) -> Self:
        """By STOKER_URL and STOKER_API_KEY, else the one that `stoker up` runs here."""
        url, key = os.environ.get("STOKER_URL", ""), os.environ.get("STOKER_API_KEY", "")
        if not (url and key):
            try:
                known = json.loads(credentials_file(Settings.from_env()).read_text())
                url, key = url or known["url"], key or known["key"]
            except (OSError, ValueError, KeyError):
                raise CliError(
                    "no Stoker to talk to",
                    "STOKER_URL and STOKER_API_KEY are not set, and none runs in this directory",
                    "start one with `stoker up`, or set both variables",
                    Exit.AUTH,
                ) from None
        return cls(url, key)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = dict(options.pop("headers", {}))
        if method == "POST":
            headers.setdefault("Idempotency-Key", uuid.uuid4().hex)
        try:
            answer = self._session.request(
                method,
                self.url + path,
                headers=headers,
                timeout=TIMEOUT_S,
                allow_redirects=False,
                **options,
            )
        except requests.RequestException as error:
            raise CliError(
                f"{self.url} does not answer", type(error).__name__, "is it up? `stoker doctor`"
            ) from None
        if answer.status_code >= 400:
            raise self._refused(answer)
        return answer

    def _refused(self, answer: requests.Response) -> CliError:
        try:
            problem = answer.json()
        except ValueError:
            problem = {}
        detail = problem.get("detail") or problem.get("title") or f"HTTP {answer.status_code}"
        faults = "; ".join(
            f"{item.get('pointer', '')} {item.get('detail', '')}"
            for item in problem.get("errors", [])
        )
        then = f"quote request {problem['request_id']}" if problem.get("request_id") else ""
        code = _CODES.get(answer.status_code, Exit.FAILED)
        if answer.status_code == 422:
            code, then = Exit.USAGE, "correct it and try again"
        return CliError(str(detail), faults or str(problem.get("code", "")), then, code)

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, params=query).json()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self.call("POST", path, json=body).json()

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page after page."""
        cursor: str | None = None
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = self.get(path, **query, **more)
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not page.get("has_more") or not cursor:
                return

    def put_file(self, upload: Mapping[str, Any], path: Path) -> None:
        """One presigned upload: no key of ours goes with it."""
        try:
            with path.open("rb") as stream:
                answer = requests.put(
                    upload["url"], data=stream, headers=upload["headers"], timeout=600
                )
        except (OSError, requests.RequestException) as error:
            raise CliError(f"{path.name} was not uploaded", type(error).__name__) from None
        if answer.status_code >= 300:
            raise CliError(f"{path.name} was not uploaded", f"storage said {answer.status_code}")

    def download(self, path: str, target: Path) -> None:
        """A result file: the API redirects to storage, which wants no key."""
        answer = self.call("GET", path)
        where = answer.headers.get("Location", "")
        part = target.with_name(target.name + ".part")
        try:
            with requests.get(where, stream=True, timeout=600) as got, part.open("wb") as file:
                got.raise_for_status()
                for chunk in got.iter_content(1 << 20):
                    file.write(chunk)
        except (OSError, requests.RequestException) as error:
            part.unlink(missing_ok=True)
            raise CliError(f"{target.name} was not downloaded", type(error).__name__) from None
        part.replace(target)
