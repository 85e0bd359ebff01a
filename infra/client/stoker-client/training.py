"""Photographs in, weights out: the few calls that most programs need."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import httpx

from .api.datasets import create_dataset, get_dataset, seal_dataset
from .api.jobs import create_job, get_job
from .client import AuthenticatedClient
from .models.dataset_in import DatasetIn
from .models.file_in import FileIn
from .models.job import Job
from .models.job_in import JobIn
from .models.new_job import NewJob
from .models.problem import Problem

__all__ = ["JobEnded", "Refused", "Stoker"]

PHOTOGRAPHS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
BESIDE = frozenset({".txt"})
ENDS = frozenset({"completed", "failed", "cancelled"})
#: Answers after which the same call may succeed, and how often it is made at most.
AGAIN = frozenset({429, 502, 503, 504})
TRIES = 5
#: Seconds that the server waits for a change before it answers.
LONG_POLL = 30

Answer = TypeVar("Answer")
Parsed = TypeVar("Parsed", covariant=True)


class Answered(Protocol[Parsed]):
    """What a function under `stoker_client.api` answers. (`Response` itself is invariant, which
    hides what is in one of several kinds.)"""

    @property
    def status_code(self) -> HTTPStatus: ...

    @property
    def headers(self) -> MutableMapping[str, str]: ...

    @property
    def parsed(self) -> Parsed | None: ...


class Refused(Exception):
    """The server said no. `problem` has its code, detail and, per field, what is wrong."""

    def __init__(self, status: int, problem: Problem | None) -> None:
        self.status, self.problem = status, problem
        faults = (
            "; ".join(f"{item.pointer} {item.detail}" for item in (problem.errors or ()))
            if (problem is not None)
            else ""
        )
        detail = problem.detail if problem is not None else HTTPStatus(status).phrase
        super().__init__(f"{status} {detail}" + (f" ({faults})" if faults else ""))


class JobEnded(Exception):
    """The job ended without weights. `job` says why."""

    def __init__(self, job: Job) -> None:
        self.job = job
        why = job.reason.message if job.reason else "no reason was given"
        super().__init__(f"job {job.id} is {job.status}: {why}")


class Stoker:
    """One installation, with one API key.

    Args:
        url: `https://stoker.example.com`.
        key: `stk_live_…` or `stk_test_…`.
        sleep: waits so many seconds.
    """

    def __init__(self, url: str, key: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        timeout = httpx.Timeout(LONG_POLL + 15.0, connect=10.0)
        self.client = AuthenticatedClient(base_url=url.rstrip("/"), token=key, timeout=timeout)
        self._files = httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0))
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._files.close()
        self.client.get_httpx_client().close()

    def upload(self, folder: str | Path) -> str:
        """Upload the photographs in `folder`, with the captions beside them; the dataset's id.

        Raises:
            ValueError: there is no photograph.
            Refused: the server, or the storage, said no.
        """
        files = sorted(
            path
            for path in Path(folder).expanduser().iterdir()
            if path.suffix.lower() in PHOTOGRAPHS | BESIDE and path.is_file()
        )
        if not any(path.suffix.lower() in PHOTOGRAPHS for path in files):
            raise ValueError(f"{folder} holds no photograph")
        announced = [
            FileIn(
                name=path.name,
                bytes_=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in files
        ]
        made = self.call(create_dataset.sync_detailed, body=DatasetIn(files=announced))
        paths = {path.name: path for path in files}
        for upload in made.uploads:
            self._put(paths[upload.name], upload.url, upload.headers.to_dict())
        self.call(seal_dataset.sync_detailed, made.id)
        return str(made.id)

    def train(
        self,
        photographs: str | Path,
        *,
        base: str,
        recipe: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> NewJob:
        """Upload a folder (or take a dataset, `ds_…`) and order a training on it.

        Args:
            base: `civitai:<version>`, `hf:<owner>/<repo>[/<file>]`, `s3:bases/<key>`, or a URL.
            recipe: how to train; what it does not say follows from its `quality`.
            idempotency_key: the same key orders the same job once, however often it is asked.
            options: other fields of `JobIn`, as JSON: `max_cost` (micro-USD), `webhook`, `test`, …

        Raises:
            ValueError: there is no photograph.
            Refused: the order cannot be taken; `problem.errors` says which fields are wrong.
        """
        known = str(photographs)
        dataset = known if known.startswith("ds_") else self.upload(photographs)
        order = {"dataset_id": dataset, "base": base, "recipe": dict(recipe or {}), **options}
        made = self.call(
            create_job.sync_detailed,
            body=JobIn.from_dict(order),
            idempotency_key=idempotency_key or uuid.uuid4().hex,
        )
        if not isinstance(made, NewJob):  # an estimate, which only `dry_run` is answered by
            raise Refused(HTTPStatus.BAD_GATEWAY, None)
        return made

    def wait(self, job_id: str, told: Callable[[Job], None] = lambda job: None) -> Job:
        """The job, once it is completed; `told` gets it whenever it changed.

        Raises:
            JobEnded: it failed or was cancelled.
            Refused: there is no such job.
        """
        while True:
            job: Job = self.call(get_job.sync_detailed, job_id, wait=LONG_POLL)
            told(job)
            if str(job.status) == "completed":
                return job
            if str(job.status) in ENDS:
                raise JobEnded(job)

    def download(self, job_id: str, folder: str | Path) -> list[Path]:
        """Fetch all result files of a completed job into `folder`. Each appears whole, or not.

        Raises:
            Refused: the server, or the storage, said no.
            ValueError: a file is not what the server read back (SHA-256).
        """
        into = Path(folder).expanduser()
        into.mkdir(parents=True, exist_ok=True)
        job = self.call(get_job.sync_detailed, job_id)
        return [
            self._get(file.url, into / Path(file.name).name, file.sha256)
            for file in job.result_files
            if file.verified and not file.expired
        ]

    def dataset(self, dataset_id: str) -> Any:
        """A dataset, with the report of kept, warned and refused photographs."""
        return self.call(get_dataset.sync_detailed, dataset_id)

    def call(
        self,
        function: Callable[..., Answered[Answer | Problem]],
        *arguments: Any,
        **named: Any,
    ) -> Answer:
        """The answer of a function under `stoker_client.api`; asked again where that may help.

        Raises:
            Refused: an answer of 400 or more.
            httpx.TransportError: the server cannot be reached.
        """
        for tried in range(1, TRIES + 1):
            last = tried == TRIES
            try:
                answer = function(*arguments, client=self.client, **named)
            except httpx.TransportError:
                if last:
                    raise
                self._sleep(2.0**tried)
                continue
            status = int(answer.status_code)
            if status in AGAIN and not last:
                asked = answer.headers.get("retry-after", "")
                self._sleep(float(asked) if asked.isdigit() else 2.0**tried)
                continue
            break
        parsed = answer.parsed
        if status >= 400 or parsed is None or isinstance(parsed, Problem):
            raise Refused(status, parsed if isinstance(parsed, Problem) else None)
        return parsed

    def _put(self, path: Path, url: str, headers: Mapping[str, str]) -> None:
        with path.open("rb") as stream:
            answer = self._files.put(url, content=stream, headers=dict(headers))
        if answer.status_code >= 300:
            raise Refused(answer.status_code, None)

    def _get(self, route: str, target: Path, sha256: str) -> Path:
        found = self.client.get_httpx_client().get(route, follow_redirects=False)
        where = found.headers.get("location", "")
        if found.status_code != HTTPStatus.FOUND or not where:
            raise Refused(found.status_code, None)
        part = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        with self._files.stream("GET", where) as answer, part.open("wb") as file:
            if answer.status_code != HTTPStatus.OK:
                raise Refused(answer.status_code, None)
            for chunk in answer.iter_bytes(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            part.unlink()
            raise ValueError(f"{target.name} did not arrive whole")
        part.replace(target)
        return target
