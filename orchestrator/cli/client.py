"""The public API, as the command line uses it: over HTTP, like any other customer."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import requests

from infra.settings import Settings, server
from orchestrator.api.keys import TEST_PREFIX
from orchestrator.cli.console import CliError, Exit, err

TIMEOUT_S = 40.0
#: A server that answered before is waited for: it may be restarting.
PATIENCE_S = 30.0
AGAIN_S = 0.5
#: So often, and so long (seconds), a key that made too many requests waits.
TOO_MANY_WAITS, LONGEST_WAIT_S = 5, 60
_CODES = {401: Exit.AUTH, 403: Exit.AUTH, 404: Exit.NOT_FOUND, 402: Exit.OVER_BUDGET}
_NEXT = {
    401: "set STOKER_API_KEY to a key that is not revoked; `stoker keys create` makes one",
    403: "use a key with that scope; `stoker keys create --scope` makes one",
    404: "`stoker ps -a` lists what there is",
    409: "`stoker show JOB` says where it stands",
    422: "correct it and try again",
}
_EXPLANATION = frozenset({"job", "status", "headline", "sentences", "signals", "options"})
_ESTIMATE = frozenset({"price", "time", "candidates", "cap", "brakes", "offers_refused"})
#: What every job has; an answer without is none of Stoker's.
_JOB = frozenset({"id", "status", "attempt", "progress", "cost"})
_HOST = frozenset({"machine_id", "gpu", "geo", "good", "bad", "lies", "blocked", "shunned"})


def demo_dir(settings: Settings) -> Path:
    """Where `stoker demo` keeps everything while it runs."""
    return settings.data_dir / "demo"


def beside_file(data_dir: Path) -> Path:
    """Where what runs leaves what commands on the same machine need: URL, key, settings."""
    return data_dir / "beside.json"


def beside(settings: Settings, *, demo: bool = True) -> Mapping[str, Any] | None:
    """What the `stoker up` that runs in `data_dir` left: `url`, `key`, `env`; where none does,
    with `demo` what a demo there left. None: nothing runs."""
    for folder in (settings.data_dir, demo_dir(settings))[: 2 if demo else 1]:
        try:
            known = json.loads(beside_file(folder).read_text())
            os.kill(known["pid"], 0)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # there is none, or it was killed
        return dict(known)
    return None


class Client:
    """Calls one installation with one API key.

    Every method raises `CliError` for whatever is not a success, with the server's own words.
    A server that does not answer is an error at once; one that answered before is waited for.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float = TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        #: Whether all that is ordered here is rehearsed: it costs nothing.
        self.rehearses = key.startswith(TEST_PREFIX)
        self._sleep, self._monotonic = sleep, monotonic
        self._answered = False
        self._session = requests.Session()
        self._session.trust_env = False
        # requests would put it into latin-1, and a pasted key may hold anything
        self._session.headers["Authorization"] = f"Bearer {key}".encode()

    @classmethod
    def here(cls, *, timeout_s: float = TIMEOUT_S) -> Self:
        """By STOKER_URL and STOKER_API_KEY or the configuration files, else the one that
        runs here; its key goes to no other server that a file names."""
        url, secret = server()
        key = secret.reveal()
        if not (url and key):
            known = beside(Settings.from_env()) or {}
            ours = known.get("url", "")
            if not key and url in ("", ours, os.environ.get("STOKER_URL", "")):
                key = known.get("key", "")
            url = url or ours
        if not (url and key):
            unset = " and ".join(
                name for name, value in (("STOKER_URL", url), ("STOKER_API_KEY", key)) if not value
            )
            raise CliError(
                "no Stoker to talk to",
                f"{unset} not set, and none runs in this directory",
                f"start one with `stoker up`, or set {unset} (or in stoker.toml)",
                Exit.AUTH,
            )
        return cls(url, key, timeout_s=timeout_s)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """The answer, below 400."""
        headers = dict(options.pop("headers", {}))
        if method == "POST":  # sent again under the same key, it is done once
            headers.setdefault("Idempotency-Key", uuid.uuid4().hex)
        until = self._monotonic() + (PATIENCE_S if self._answered else 0.0)
        waits = TOO_MANY_WAITS
        while True:
            answer = self._try(method, path, headers, options)
            if waits and (pause := _asked_to_wait(answer)):
                err.print(f"too many requests with this key; going on in {pause} s", markup=False)
                self._sleep(pause)
                waits -= 1
                continue
            if isinstance(answer, requests.Response) and answer.status_code not in (502, 503, 504):
                self._answered = True
                break
            if self._monotonic() >= until:
                break
            self._sleep(AGAIN_S)
        if isinstance(answer, CliError):
            raise answer
        if answer.status_code >= 400:
            raise self._refused(answer)
        return answer

    def _try(
        self, method: str, path: str, headers: Mapping[str, str], options: Mapping[str, Any]
    ) -> requests.Response | CliError:
        try:
            return self._session.request(
                method,
                self.url + path,
                headers=headers,
                timeout=self._timeout_s,
                allow_redirects=False,
                **options,
            )
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.MissingSchema,
            requests.exceptions.InvalidSchema,
        ):
            return CliError(
                f"{self.url} is no URL",
                "it must be http:// or https:// with a host",
                "correct STOKER_URL",
                Exit.USAGE,
            )
        except requests.RequestException as error:
            return CliError(
                f"{self.url} does not answer", _why(error), "is it up? `stoker doctor` tells"
            )

    def _refused(self, answer: requests.Response) -> CliError:
        try:
            problem = answer.json()
        except ValueError:
            problem = {}
        if not isinstance(problem, dict):
            problem = {}
        status = answer.status_code
        detail = problem.get("detail") or problem.get("title") or f"{self.url} answered {status}"
        listed = problem.get("errors")
        faults = "; ".join(
            f"{item.get('pointer', '')} {item.get('detail', '')}".strip()
            for item in (listed if isinstance(listed, list) else [])
            if isinstance(item, dict)
        )
        why = faults or f"HTTP {status} {problem.get('code', '')}".strip()
        then = _NEXT.get(status, "")
        if status >= 500 and problem.get("request_id"):
            then = f"the server's log has more under request {problem['request_id']}"
        code = Exit.USAGE if status == 422 else _CODES.get(status, Exit.FAILED)
        return CliError(str(detail), why, then, code)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._document(self.call("GET", path, params=query))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._document(self.call("POST", path, json=body))

    def job(self, job_id: str) -> dict[str, Any]:
        """One job, whole."""
        return self._shaped(self.get(job_path(job_id)), _JOB | {"transitions", "result_files"})

    def poll(
        self, job_id: str, *, wait_s: int = 0, etag: str = ""
    ) -> tuple[dict[str, Any] | None, str]:
        """One job and its ETag, at once or when it changes; None where it is what `etag` was of
        for so many seconds."""
        headers = {"If-None-Match": etag} if etag else {}
        query = {"wait": wait_s} if wait_s else {}
        answer = self.call("GET", job_path(job_id), params=query, headers=headers)
        if answer.status_code == 304:
            return None, etag
        whole = self._shaped(self._document(answer), _JOB | {"transitions", "result_files"})
        return whole, answer.headers.get("ETag", "")

    def explanation(self, job_id: str) -> dict[str, Any]:
        """Why a job stands where it stands."""
        return self._shaped(self.get(f"{job_path(job_id)}/explain"), _EXPLANATION)

    def estimate(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """What an order would cost; nothing is ordered."""
        return self._shaped(self.post("/v1/jobs/estimate", order), _ESTIMATE)

    def _document(self, answer: requests.Response) -> dict[str, Any]:
        try:
            value = answer.json() if answer.status_code < 300 else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._strange(f"it answered {answer.status_code} without a JSON object")
        return value

    def _shaped(self, value: Any, keys: frozenset[str]) -> dict[str, Any]:
        if not isinstance(value, dict) or not keys <= set(value):
            lacks = ", ".join(sorted(keys - set(value if isinstance(value, dict) else ())))
            raise self._strange(f"its answer lacks {lacks}")
        return value

    def _strange(self, why: str) -> CliError:
        return CliError(
            f"{self.url} does not speak Stoker's API",
            why,
            "check STOKER_URL, and what stands between (a proxy, a login page)",
        )

    def jobs(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Jobs, newest first, page after page."""
        cursor: str | None = None
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = self.get("/v1/jobs", limit=100, **query, **more)
            for item in self._items(page):
                yield self._shaped(item, _JOB)
            cursor = page.get("next_cursor")
            if not page.get("has_more") or not cursor:
                return

    def newest_jobs(self) -> list[dict[str, Any]]:
        """One page of them."""
        page = self._items(self.get("/v1/jobs", limit=100))
        return [self._shaped(item, _JOB) for item in page]

    def hosts(self) -> list[dict[str, Any]]:
        """Remembered machines, those to look at first."""
        return [self._shaped(item, _HOST) for item in self._items(self.get("/v1/hosts"))]

    def host(self, machine: str, verb: str = "", body: Mapping[str, Any] | None = None) -> Any:
        """One machine, after `verb` where there is one."""
        path = f"/v1/hosts/{quote(machine, safe='')}"
        found = self.post(f"{path}/{verb}", body) if verb else self.get(path)
        return self._shaped(found, _HOST)

    def events(self, job_id: str, after: int) -> dict[str, Any]:
        """A page of what happened to a job: `data`, `has_more`, `next_after`."""
        page = self.get(f"{job_path(job_id)}/events", after=after, limit=500)
        for item in self._items(self._shaped(page, frozenset({"has_more", "next_after"}))):
            self._shaped(item, frozenset({"at", "type", "data"}))
        return page

    def _items(self, page: Mapping[str, Any]) -> list[Any]:
        if not isinstance(page.get("data"), list):
            raise self._strange("its answer holds no list")
        return list(page["data"])

    def put_file(self, upload: Mapping[str, Any], path: Path) -> None:
        """One presigned upload: no key of ours goes with it."""
        try:
            with path.open("rb") as stream:
                answer = requests.put(
                    upload["url"], data=stream, headers=upload["headers"], timeout=600
                )
        except (OSError, requests.RequestException) as error:
            raise CliError(f"{path.name} was not uploaded", _why(error), "try again") from None
        if answer.status_code >= 300:
            raise CliError(
                f"{path.name} was not uploaded",
                f"the storage answered {answer.status_code}",
                "is the file being changed? `stoker doctor` looks at the storage",
            )

    def download(
        self, path: str, target: Path, *, came: Callable[[int], object] = lambda size: None
    ) -> None:
        """A result file: the API redirects to storage, which wants no key. It appears whole.

        `came` hears of each so many bytes.
        """
        answer = self.call("GET", path)
        where = answer.headers.get("Location", "")
        if not where:
            raise self._strange(f"it answered {answer.status_code} without the file's address")
        part = target.with_name(target.name + ".part")
        try:
            with requests.get(where, stream=True, timeout=600) as got, part.open("wb") as file:
                got.raise_for_status()
                for chunk in got.iter_content(1 << 20):
                    file.write(chunk)
                    came(len(chunk))
            part.replace(target)
        except (OSError, requests.RequestException) as error:
            raise CliError(f"{target} was not downloaded", _why(error), "try again") from None
        finally:
            part.unlink(missing_ok=True)


def _asked_to_wait(answer: requests.Response | CliError) -> int:
    """Seconds after which a refused request may be made again; 0 where that is not said."""
    if isinstance(answer, CliError) or answer.status_code != 429:
        return 0
    said = answer.headers.get("Retry-After", "")[:9]
    return min(max(1, int(said)), LONGEST_WAIT_S) if said.isascii() and said.isdigit() else 0


def job_path(job_id: str) -> str:
    """Where a job is; whatever was typed as its id stays one segment."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _why(error: Exception) -> str:
    """In words, and without the address: a presigned one is a secret."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the storage answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "it took too long"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    if isinstance(error, requests.ConnectionError):
        return "the connection was refused or broke"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
