"""The contract between a rented machine's agent and the server. Standard library only.

Everything that crosses the wire is here: what the agent is asked to do (`JobSpec`), what it
reports (`Report`, whose `type` is a `Fact`), what it is answered (`Order`), and how both are
signed. The agent ships this file and nothing else of Stoker; the server imports this leaf of
`gpu_agent` and no other.

Rules that keep an agent of three months ago understood:

1. Changes are additive. A reader ignores keys that it does not know (a `recipe.Recipe` is
   strict: there an unknown key is a typo that would cost somebody's money).
2. A `Report` that cannot be read raises `WireError`, whatever the bytes are.
3. Signatures follow Standard Webhooks 1.0: HMAC-SHA256 over ``id.timestamp.body``, header
   ``v1,<base64>``, several separated by spaces while a secret is rotated.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import hmac
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Wire version; it grows only when an old reader could misunderstand a new writer.
VERSION = 1
#: A report's body may not be longer than this (bytes); longer is answered with 413.
MAX_BODY = 256 * 1024
#: Standard Webhooks: how far a timestamp may be from the reader's clock (seconds).
TOLERANCE = 300
SECRET_PREFIX = "whsec_"  # noqa: S105 -- a prefix, not a secret


class WireError(ValueError):
    """What arrived cannot be understood; the text says which part."""


class SignatureError(Exception):
    """The signature, its headers or its timestamp are not acceptable (answered with 401)."""


class Fact(enum.StrEnum):
    """What an agent can report. Only `state.machine` turns facts into states."""

    #: The machine runs, its GPU answers.
    GPU_READY = "gpu.ready"
    #: Bytes and files of the dataset zip so far.
    IMAGES_PROGRESS = "images.progress"
    #: The dataset is downloaded, verified and unpacked.
    IMAGES_READY = "images.ready"
    #: Bytes of the base model so far.
    MODEL_PROGRESS = "model.progress"
    #: The base model is downloaded and verified.
    MODEL_READY = "model.ready"
    #: Dataset, model and training configuration are where the trainer wants them.
    FILES_POSITIONED = "files.positioned"
    TRAINING_STARTED = "training.started"
    #: step, total, loss, lr, steps_per_s, eta_s; optionally `points`, a batch of series points.
    TRAINING_PROGRESS = "training.progress"
    TRAINING_CHECKPOINT = "training.checkpoint"
    TRAINING_SAMPLE = "training.sample"
    #: The trainer ended well; the weights are not uploaded yet.
    TRAINING_COMPLETED = "training.completed"
    #: All result files are in storage: `files` = [{name, bytes, sha256}].
    WEIGHTS_UPLOADED = "weights.uploaded"
    LOG_LINES = "log.lines"
    HEARTBEAT = "heartbeat"
    #: The attempt cannot go on: code, message, retryable, and the last lines of the log.
    ERROR = "error"


class Order(enum.StrEnum):
    """What the server may tell the agent in the answer to a report."""

    CANCEL = "cancel"
    CHECKPOINT_NOW = "checkpoint_now"
    SAMPLE_NOW = "sample_now"
    #: This attempt is stale or its job is finished: stop and destroy the instance.
    STOP = "stop"


# --- reading values out of parsed JSON ------------------------------------------------------


def _loads(body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what} is not a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return number


def _text(value: Mapping[str, Any], key: str, *, limit: int = 4096) -> str:
    got = value.get(key)
    if not isinstance(got, str) or not got or len(got) > limit:
        raise WireError(f"{key!r} must be a text of 1 to {limit} characters")
    if not _keepable(got):
        raise WireError(f"{key!r} holds a character that no database can keep")
    return got


_UNKEEPABLE = re.compile("[\x00\ud800-\udfff]")


def _keepable(value: object) -> bool:
    """Whether no text in `value` holds a NUL or half a surrogate pair.

    Both can only come in as an escape: as raw bytes they are not JSON, or not UTF-8.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if _UNKEEPABLE.search(item):
                return False
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
    return True


def _whole(value: Mapping[str, Any], key: str, *, least: int) -> int:
    got = value.get(key)
    if isinstance(got, bool) or not isinstance(got, int) or not least <= got < 2**53:
        raise WireError(f"{key!r} must be a whole number of at least {least}")
    return got


def _number(value: Mapping[str, Any], key: str) -> float:
    got = value.get(key)
    if isinstance(got, bool) or not isinstance(got, (int, float)) or abs(got) >= 2**53:
        raise WireError(f"{key!r} must be a number")
    return float(got)


# --- reports ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """One fact of one attempt. `seq` counts from 1 within the attempt, without gaps."""

    job: str
    attempt: int
    seq: int
    type: Fact
    #: Seconds since the epoch, by the agent's clock.
    at: float
    data: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """Compact UTF-8 JSON with keys in a fixed order, so that equal reports are equal bytes."""
        return json.dumps(
            vars(self), separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @property
    def webhook_id(self) -> str:
        """The same for every retry of this report, as Standard Webhooks asks."""
        return f"{self.job}.{self.attempt}.{self.seq}"

    @classmethod
    def from_bytes(cls, body: bytes) -> Report:
        """Read a report.

        Raises:
            WireError: the bytes are not a report that this version understands.
        """
        value = _loads(body, "the report")
        version = _whole(value, "version", least=1)
        if version > VERSION:
            raise WireError(f"wire version {version} is newer than ours ({VERSION})")
        try:
            kind = Fact(_text(value, "type", limit=64))
        except ValueError:
            raise WireError(f"unknown fact {value.get('type')!r}") from None
        data = value.get("data", {})
        if not isinstance(data, dict):
            raise WireError("'data' must be an object")
        if b"\\u" in body and not _keepable(data):
            raise WireError("'data' holds a character that no database can keep")
        return cls(
            job=_text(value, "job", limit=64),
            attempt=_whole(value, "attempt", least=1),
            seq=_whole(value, "seq", least=1),
            type=kind,
            at=_number(value, "at"),
            data=data,
            version=version,
        )


def answer_to_bytes(orders: Sequence[Order]) -> bytes:
    """The body of a 2xx (or 410) answer to a report."""
    return json.dumps({"orders": [str(order) for order in orders]}).encode()


def orders_from_bytes(body: bytes) -> list[Order]:
    """The orders in an answer; unknown ones and anything unreadable are no orders."""
    try:
        listed = _loads(body, "the answer").get("orders")
    except WireError:
        return []
    known = set(Order)
    return [Order(item) for item in listed if item in known] if isinstance(listed, list) else []


# --- the job spec -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Download:
    """Something to pull. `sha256` is lower-case hex; empty where nobody published one."""

    url: str = field(repr=False)
    name: str
    bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """The answer to the agent's hello: all that one attempt needs, and nothing that outlives it.

    Attributes:
        base_family: model family, e.g. `sd1`.
        secret: `whsec_…` of this attempt alone; signs reports and requests for fresh URLs.
        report_url: where reports are POSTed.
        files_url: where fresh presigned URLs are asked for (see `docs/wire.md`).
        lease_ends_at: seconds since the epoch; later than this the agent destroys its instance.
        silence_limit_s: so long without any answer from the server, and it does the same.
        base_parts: the other files of a base that is a folder, or what a single file lacks; named
            as in a diffusers folder, they go beside `base`.
        resume: the files of the newest checkpoint, then of the one before it, where there are any.
        min_download_mbps: a machine whose big downloads are slower gives up; 0 takes any.
    """

    job: str
    attempt: int
    dataset: Download
    base: Download
    base_family: str
    method: str
    recipe: Mapping[str, Any]
    secret: str = field(repr=False)
    report_url: str
    files_url: str
    lease_ends_at: float
    silence_limit_s: float = 900.0
    heartbeat_s: float = 10.0
    progress_s: float = 5.0
    resume: tuple[Download, ...] = ()
    base_parts: tuple[Download, ...] = ()
    min_download_mbps: float = 0.0
    version: int = VERSION

    def to_bytes(self) -> bytes:
        value = dataclasses.asdict(self)
        # younger than the golden bytes: written where they matter
        for key in ("min_download_mbps", "base_parts"):
            if not value[key]:
                del value[key]
        return json.dumps(value, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> JobSpec:
        """Read a job spec; keys that this agent does not know are ignored.

        Raises:
            WireError: something needed is missing or of the wrong kind.
        """
        value = _loads(body, "the job spec")
        known = {item.name for item in dataclasses.fields(cls)}
        taken = {key: item for key, item in value.items() if key in known}
        for key in ("job", "base_family", "method", "secret", "report_url", "files_url"):
            _text(value, key)
        _whole(value, "attempt", least=1)
        _number(value, "lease_ends_at")
        for key in ("silence_limit_s", "heartbeat_s", "progress_s", "min_download_mbps"):
            if key in value:
                _number(value, key)
        if not isinstance(value.get("recipe"), dict):
            raise WireError("'recipe' must be an object")
        for key in ("resume", "base_parts"):
            listed = value.get(key, [])
            if not isinstance(listed, list):
                raise WireError(f"{key!r} must be a list")
            taken[key] = tuple(_download(item, key) for item in listed)
        taken["dataset"] = _download(value.get("dataset"), "dataset")
        taken["base"] = _download(value.get("base"), "base")
        return cls(**taken)


def _download(value: object, what: str) -> Download:
    if not isinstance(value, dict):
        raise WireError(f"{what!r} must be an object")
    sha256 = value.get("sha256", "")
    if not isinstance(sha256, str):
        raise WireError(f"{what!r}: 'sha256' must be a text")
    return Download(
        url=_text(value, "url", limit=16_384),
        name=_text(value, "name", limit=255),
        bytes=_whole(value, "bytes", least=0),
        sha256=sha256.lower(),
    )


# --- signatures (Standard Webhooks 1.0) -------------------------------------------------------


def new_secret() -> str:
    """A fresh `whsec_` secret of 256 random bits."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def secret_key(secret: str) -> bytes:
    """The key bytes of a `whsec_…` secret.

    Raises:
        WireError: it is not base64 of 24 to 64 bytes.
    """
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise WireError("a webhook secret is 'whsec_' and base64") from None
    if not 24 <= len(key) <= 64:
        raise WireError("a webhook secret holds 24 to 64 bytes")
    return key


def _digest(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> bytes:
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.digest(key, signed, "sha256"))


def sign(body: bytes, *, secrets: Sequence[str], webhook_id: str, at: float) -> dict[str, str]:
    """The three headers for `body`, signed with every secret given (oldest first)."""
    timestamp = int(at)
    signatures = [
        "v1," + _digest(secret_key(secret), webhook_id, timestamp, body).decode()
        for secret in secrets
    ]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def verify(body: bytes, headers: Mapping[str, str], *, secrets: Sequence[str], now: float) -> str:
    """The `webhook-id` of a well-signed body; `headers` has lower-case names.

    Raises:
        SignatureError: for anything else, whatever the garbage.
    """
    webhook_id = headers.get("webhook-id", "")
    stamp = headers.get("webhook-timestamp", "")
    if not webhook_id or len(webhook_id) > 256 or not webhook_id.isascii():
        raise SignatureError("webhook-id is missing or not a short ASCII text")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise SignatureError("webhook-timestamp is not whole seconds since the epoch")
    if abs(now - int(stamp)) > TOLERANCE:
        raise SignatureError(f"webhook-timestamp is more than {TOLERANCE} s from now")
    try:
        wanted = [_digest(secret_key(item), webhook_id, int(stamp), body) for item in secrets]
        offered = [
            item[3:].encode("ascii")
            for item in headers.get("webhook-signature", "")[:4096].split(" ")
            if item.startswith("v1,")
        ]
    except (WireError, UnicodeError):
        raise SignatureError("webhook-signature cannot be read") from None
    matches = [hmac.compare_digest(want, got) for want in wanted for got in offered]
    if not any(matches):
        raise SignatureError("no signature matches")
    return webhook_id
