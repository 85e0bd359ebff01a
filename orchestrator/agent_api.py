"""What an agent asks for besides reporting: itself, its job, fresh URLs. See `docs/wire.md`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from flask import Blueprint, Response, jsonify, request

from gpu_agent import wire
from infra import logs
from infra.rehearsal.machine import BASE as NO_BASE
from orchestrator.api.problems import Refusal
from orchestrator.attempt_auth import AttemptAuth
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from orchestrator.webhook import read_body, signed_headers, stale
from state import boot, policy, record
from state.errors import AttemptOver, IllegalMove, NotFound, StokerError, TokenRefused
from state.events import Event, Secret
from state.job import Job, Reason
from state.store import Transaction
from tasks.verify import attempt_key

_log = logs.logger(__name__)
URL_SPAN_S = 3600
MAX_FILES = 100
#: Checkpoints that a later attempt is offered: the newest, and one to fall back to.
OFFERED = 2
CHECKPOINTS = "checkpoints/"
BASE_PARTS = "base/"
MAX_FILE_BYTES = 5 * 10**9
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A file of an uploaded checkpoint: its name for the agent, and where it lies."""

    name: str
    bytes: int
    sha256: str
    key: str


# --- hello: a one-use token for a job spec ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What an agent introduces itself with. `machine` has what it found out of these: gpu_name,
    gpus, vram_mb, driver, cuda, disk_free_gb, instance."""

    token_hash: str
    nonce: str
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_bytes(cls, body: bytes) -> Hello:
        """Raises: Refusal 422."""
        value = _object(body)
        token, nonce, version = (value.get(key) for key in ("token", "nonce", "version"))
        if not isinstance(token, str) or not 1 <= len(token) <= 512:
            raise _unclear("token")
        if not isinstance(nonce, str) or not re.fullmatch(r"[\x21-\x7e]{8,128}", nonce):
            raise _unclear("nonce")
        if type(version) is not int or not 1 <= version <= wire.VERSION:
            raise _unclear("version")
        hashed = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(token_hash=hashed, nonce=nonce, machine=_machine(value.get("machine")))


def _machine(said: object) -> dict[str, Any]:
    """What a stranger's machine says of itself; what we did not ask for is left out.

    Raises: Refusal 422.
    """
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise _unclear("machine")
    known: dict[str, Any] = {}
    for name, read in _MACHINE.items():
        if said.get(name) is not None:
            known[name] = read(said[name])
            if known[name] is None:
                raise _unclear(f"machine/{name}")
    return known


def _label(value: object) -> str | None:
    fits = isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()
    return str(value) if fits else None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 10**8 else None


def _amount(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**8:
        return None
    return float(value)


def _version(value: object) -> float | None:
    """`12.8`, as a text or as a number."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3})?", value, re.ASCII):
        return float(value)
    return _amount(value)


_MACHINE: Mapping[str, Callable[[object], Any]] = {
    "gpu_name": _label,
    "gpus": _count,
    "vram_mb": _count,
    "driver": _label,
    "cuda": _version,
    "disk_free_gb": _amount,
    "instance": _label,
}


class Doorkeeper:
    """Answers hellos."""

    def __init__(self, deps: Deps, waker: Waker) -> None:
        self._deps, self._waker = deps, waker

    def hello(self, hello: Hello) -> wire.JobSpec:
        """The job of a token.

        The token is used up last: what fails before (a model's site that is down) may be asked
        again with it.

        Raises:
            TokenRefused: it is unknown, expired or used.
            AttemptOver: the attempt is over, another machine has it, or this one is not what was
                rented.
            Refusal: 503 the base model cannot be had at the moment, or the dataset's URL not be
                made.
        """
        token, nonce = hello.token_hash, hello.nonce
        with self._deps.store.transaction() as tx:
            seen = record.knock(tx, token, nonce, self._deps.clock(), lock=True)
            kept = _offered(tx, seen.job)
        self._inspect(seen, hello.machine)
        with logs.bound(job=seen.job.id, attempt=seen.attempt.number):
            base = self.base(seen.job)
            dataset, resume = self._downloads(seen.job, kept)
            fresh, now = Secret(wire.new_secret()), self._deps.clock()
            with self._deps.store.transaction() as tx:
                seen = record.knock(tx, token, nonce, now, lock=True)
                secret = record.admit(
                    tx, seen, nonce=nonce, secret=fresh, now=now, machine=hello.machine
                )
            _log.info("agent said hello")
        return self._spec(seen, dataset, base, resume, secret.reveal())

    def _inspect(self, seen: record.Admission, machine: Mapping[str, Any]) -> None:
        """Send a machine away that is not what its offer said, before the big downloads.

        Raises: AttemptOver.
        """
        reason = None if seen.again else boot.lie(seen.lease, seen.job.request.gpu, machine)
        if reason is None:
            return
        with self._deps.store.transaction() as tx:
            job = record.machine_failed(tx, seen.lease.id, reason, self._deps.clock())
        with logs.bound(job=seen.job.id, attempt=seen.attempt.number):
            _log.warning("a host lied", machine=seen.lease.machine_id, why=reason.message)
        if job is not None:
            self._waker(job.id, (*record.wakes(job), "deallocate"))
        raise AttemptOver

    def refuse_stranger(self, hello: Hello) -> None:
        """A refused token: if somebody else used it before, the job goes to another machine."""
        with self._deps.store.transaction() as tx:
            job = record.token_reused(tx, hello.token_hash, hello.nonce, self._deps.clock())
        if job is not None:
            with logs.bound(job=job.id):
                _log.warning("a bootstrap token came twice with different nonces; revoked")
            self._waker(job.id, record.wakes(job))

    def base(self, job: Job) -> Sequence[wire.Download]:
        """The base model's own file, then its parts; in a rehearsal one that nobody pulls."""
        if job.request.rehearsal is not None:
            return (NO_BASE,)
        try:
            return self._deps.resolve_base(job.request)
        except StokerError as error:
            if getattr(error, "retryable", True):
                raise Refusal(
                    503,
                    "base_unavailable",
                    f"the base model cannot be had now: {error}",
                    headers={"Retry-After": "10"},
                    retryable=True,
                ) from error
            self._give_up(job, error)
            raise stale() from error

    def _give_up(self, job: Job, error: StokerError) -> None:
        """No later try will find this base model: say so on the job."""
        code = getattr(error, "code", "") or "model.unavailable"
        reason = Reason(code=code, message=str(error), retryable=False)
        try:
            with self._deps.store.transaction() as tx:
                if tx.job(job.id, lock=True).attempt != job.attempt:
                    return
                stalled = record.stall(tx, job.id, reason, self._deps.clock())
        except IllegalMove:
            return  # over already
        self._waker(job.id, record.wakes(stalled))

    def _downloads(
        self, job: Job, kept: Sequence[Kept]
    ) -> tuple[wire.Download, tuple[wire.Download, ...]]:
        with self._deps.store.transaction() as tx:
            dataset = _dataset_download(self._deps, tx, job)
        return dataset, tuple(_kept_download(self._deps, item) for item in kept)

    def _spec(
        self,
        seen: record.Admission,
        dataset: wire.Download,
        base: Sequence[wire.Download],
        resume: tuple[wire.Download, ...],
        secret: str,
    ) -> wire.JobSpec:
        request, attempt = seen.job.request, seen.attempt.number
        address = f"{self._deps.settings.public_url}/agent/v1/jobs/{seen.job.id}/attempts/{attempt}"
        return wire.JobSpec(
            job=seen.job.id,
            attempt=attempt,
            dataset=dataset,
            base=base[0],
            base_parts=tuple(base[1:]),
            base_family=request.base_family,
            method=request.method,
            recipe=dict(request.recipe),
            secret=secret,
            report_url=f"{address}/reports",
            files_url=f"{address}/files",
            lease_ends_at=seen.lease.expires_at.timestamp(),
            resume=resume,
            min_download_mbps=_least_mbps(seen.job),
        )


#: A host that brings less than this share of the rate that was asked for is not worth its wait.
LEAST_RATE = 0.25


def _least_mbps(job: Job) -> float:
    """Below which rate (Mbit/s) the agent is to give up; on the last try slow is better."""
    return 0.0 if policy.last_try(job) else job.request.gpu.min_download_mbps * LEAST_RATE


def _dataset_download(deps: Deps, tx: Transaction, job: Job) -> wire.Download:
    dataset = tx.dataset(job.request.dataset_id)
    return wire.Download(
        url=deps.storage.presign_get(dataset.zip_key, expires_s=URL_SPAN_S),
        name="dataset.zip",
        bytes=dataset.zip_bytes,
        sha256=dataset.zip_sha256,
    )


def _kept_download(deps: Deps, item: Kept) -> wire.Download:
    return wire.Download(
        url=deps.storage.presign_get(item.key, expires_s=URL_SPAN_S),
        name=item.name,
        bytes=item.bytes,
        sha256=item.sha256,
    )


def checkpoints(tx: Transaction, job: Job) -> Iterator[tuple[Event, tuple[Kept, ...]]]:
    """The uploaded checkpoints of a job, the newest first, each with the report that told of it.

    Only whole ones, of which the manifest went last. Each was reported by an attempt that was the
    current one then: what comes later is answered with 410 and leaves no event.
    """
    reported = tx.events(job.id, type=wire.Fact.TRAINING_CHECKPOINT.value, limit=10_000)
    for event in reversed(reported):
        listed = event.data.get("files")
        if not isinstance(listed, list) or len(listed) > MAX_FILES:
            continue
        try:
            files = [_file(item) for item in listed]
        except Refusal:
            continue
        folder, _, last = files[-1][0].rpartition("/") if files else ("", "", "")
        if last != "manifest.json" or not re.fullmatch(CHECKPOINTS + "[^/]+", folder):
            continue
        if not all(name.startswith(f"{folder}/") for name, _, _ in files):
            continue
        yield (
            event,
            tuple(
                Kept(
                    name=name,
                    bytes=size,
                    sha256=digest,
                    key=attempt_key(job.id, event.attempt, name),
                )
                for name, size, digest in files
            ),
        )


def _offered(tx: Transaction, job: Job) -> tuple[Kept, ...]:
    """The files of the checkpoints that an attempt may go on from."""
    newest = islice(checkpoints(tx, job), OFFERED)
    return tuple(item for _, files in newest for item in files)


def _named(tx: Transaction, job: Job, names: frozenset[str]) -> list[Kept]:
    """The files of checkpoints among `names`."""
    if not any(name.startswith(CHECKPOINTS) for name in names):
        return []
    return [item for _, files in checkpoints(tx, job) for item in files if item.name in names]


# --- files: fresh URLs ------------------------------------------------------------------------


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(422, "bad_json", "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Refusal(422, "bad_json", "the body is not a JSON object")
    return value


def _unclear(what: str) -> Refusal:
    return Refusal(
        422, "invalid", f"{what} is missing or not understood", errors=[(f"/{what}", "invalid")]
    )


def _file(item: object) -> tuple[str, int, str]:
    """Raises: Refusal 422."""
    if not isinstance(item, dict):
        raise _unclear("put")
    name, size, sha256 = (item.get(key) for key in ("name", "bytes", "sha256"))
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        raise _unclear("put/name")
    if type(size) is not int or not 0 < size <= MAX_FILE_BYTES:
        raise _unclear("put/bytes")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _unclear("put/sha256")
    return name, size, sha256


def uploaded(said: Mapping[str, Any]) -> tuple[str, int, str]:
    """Name, bytes and SHA-256 of the file that a report says is in storage. Raises: Refusal 422."""
    return _file(dict(said))


def _is_gettable(what: object) -> bool:
    return isinstance(what, str) and (
        what in ("dataset", "base")
        or (what.startswith((CHECKPOINTS, BASE_PARTS)) and len(what) <= 200)
    )


@dataclass(frozen=True, kw_only=True)
class FilesWanted:
    """Which URLs an agent asks for."""

    put: tuple[tuple[str, int, str], ...]
    get: frozenset[str]

    @classmethod
    def from_bytes(cls, body: bytes) -> FilesWanted:
        """Raises: Refusal 422."""
        value = _object(body)
        put, get = value.get("put", []), value.get("get", [])
        if not isinstance(put, list) or len(put) > MAX_FILES:
            raise _unclear("put")
        if not isinstance(get, list) or not all(map(_is_gettable, get)):
            raise _unclear("get")
        files = tuple(_file(item) for item in put)
        if len({name for name, _, _ in files}) != len(files):
            raise _unclear("put")
        return cls(put=files, get=frozenset(get))


class FileDesk:
    """Hands out presigned URLs to the agent of an attempt that is under way."""

    def __init__(self, deps: Deps, doorkeeper: Doorkeeper) -> None:
        self._deps, self._doorkeeper = deps, doorkeeper

    def urls(self, job_id: str, number: int, wanted: FilesWanted) -> dict[str, Any]:
        """Raises: Refusal 410 when the attempt is over, 503 when a URL cannot be made."""
        with self._deps.store.transaction() as tx:
            try:
                job = tx.job(job_id)
            except NotFound:
                raise stale() from None
            if job.attempt != number or not job.active:
                raise stale()
            dataset = _dataset_download(self._deps, tx, job) if "dataset" in wanted.get else None
            kept = _named(tx, job, wanted.get)
        got: dict[str, Any] = {}
        if dataset is not None:
            got["dataset"] = asdict(dataset)
        if any(what == "base" or what.startswith(BASE_PARTS) for what in wanted.get):
            file, *parts = self._doorkeeper.base(job)
            named = {"base": file, **{BASE_PARTS + part.name: part for part in parts}}
            got |= {what: asdict(named[what]) for what in wanted.get & named.keys()}
        for item in kept:
            # without an address the agent knows that it need not try again
            if self._deps.storage.head(item.key) == item.bytes:
                got[item.name] = asdict(_kept_download(self._deps, item))
        return {"put": dict(self._puts(job_id, number, wanted.put)), "get": got}

    def _puts(
        self, job_id: str, number: int, files: Iterable[tuple[str, int, str]]
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        for name, size, _ in files:
            key = attempt_key(job_id, number, name)
            upload = self._deps.storage.presign_put(key, bytes=size, expires_s=URL_SPAN_S)
            yield name, {"url": upload.url, "headers": dict(upload.headers)}


# --- routes -----------------------------------------------------------------------------------


def agent_api(deps: Deps, auth: AttemptAuth, waker: Waker) -> Blueprint:
    """`/agent/v1`, without the receiver of reports; not part of the public description."""
    blueprint = Blueprint("agent", __name__, url_prefix="/agent/v1")
    doorkeeper = Doorkeeper(deps, waker)
    desk = FileDesk(deps, doorkeeper)

    @blueprint.get("/gpu_agent.pyz")
    def bundle() -> Response:
        response = Response(deps.bundle.bytes, mimetype="application/octet-stream")
        response.set_etag(deps.bundle.sha256)
        return response

    @blueprint.post("/hello")
    def hello() -> Response:
        said = Hello.from_bytes(read_body(request.environ))
        try:
            spec = doorkeeper.hello(said)
        except TokenRefused:
            doorkeeper.refuse_stranger(said)
            raise
        except AttemptOver:
            raise stale() from None
        response = Response(spec.to_bytes(), mimetype="application/json")
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.post("/jobs/<job_id>/attempts/<int:number>/files")
    def files(job_id: str, number: int) -> Response:
        raw = read_body(request.environ)
        auth.verify(job_id, number, raw, signed_headers(request.environ))
        with logs.bound(job=job_id, attempt=number):
            response = jsonify(desk.urls(job_id, number, FilesWanted.from_bytes(raw)))
        response.headers["Cache-Control"] = "no-store"
        return response

    return blueprint
