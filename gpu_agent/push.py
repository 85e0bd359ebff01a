"""Files off the machine: fresh addresses from the server, uploads by presigned PUT."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from gpu_agent.clock import Clock
from gpu_agent.halt import Fault, Halt
from gpu_agent.wire import Download, JobSpec, sign

log = logging.getLogger(__name__)

CHUNK = 1 << 20
#: Connecting, and waiting for each part of an answer (seconds); storage may think longer.
TIMEOUT = (10.0, 30.0)
PUT_TIMEOUT = (10.0, 120.0)
#: Waits between tries (seconds); after the last one it is a fault.
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 60.0, 60.0)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file and the name under which the server is to know it."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What `weights.uploaded` says of a file. `sha256` is lower-case hex."""

    name: str
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class _Slot:
    """Where one file may be PUT, once."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)


class Gone(Fault):
    """The server knows no such file, or found it missing in storage: no later try will help."""


class Files:
    """Asks the server for addresses, and uploads. Each thread needs one of its own.

    Args:
        on_heard: called whenever the server answered.
        moved: called with the number of bytes that went out.
    """

    def __init__(
        self,
        spec: JobSpec,
        *,
        clock: Clock,
        halt: Halt,
        on_heard: Callable[[], None],
        moved: Callable[[int], None],
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self._spec, self._clock, self._halt, self._on_heard = spec, clock, halt, on_heard
        self._moved, self._delays = moved, delays
        self._session = requests.Session()
        self._session.trust_env = False

    def fresh(self, what: str) -> Download:
        """A new address for `dataset`, `base` or a file of a checkpoint, by its name in the spec.

        Raises:
            Fault: `download.failed` when the server gives none; `Gone` when it never will.
        """
        answer = self._ask({"get": [what]}, code="download.failed")
        given = _object(_object(answer.get("get")).get(what))
        known = {item: given[item] for item in ("url", "name", "bytes", "sha256") if item in given}
        try:
            return Download(**known)
        except TypeError:
            raise Gone(
                "download.failed", f"the server gave no address for {what}", retryable=True
            ) from None

    def upload(self, item: Upload) -> Stored:
        """Put one file into storage.

        Raises:
            Fault: `upload.failed`.
            FileNotFoundError: the file went away (a checkpoint that was rotated out).
            Halted: the work was told to end.
        """
        stored = Stored(
            name=item.name, bytes=item.path.stat().st_size, sha256=self._sha256(item.path)
        )
        why = ""
        for delay in (*self._delays, None):
            status, why = self._put(self._slot(stored), item.path, stored.bytes)
            # 412: it is there already (If-None-Match), so the answer to an earlier try was lost
            if 200 <= status < 300 or status == 412:
                return stored
            log.warning("upload of %s: %s", item.name, why)
            if delay is not None:
                self._halt.sleep(delay)
        raise Fault("upload.failed", f"{item.name}: {why}", retryable=True)

    def _slot(self, stored: Stored) -> _Slot:
        answer = self._ask({"put": [stored.to_dict()]}, code="upload.failed")
        slot = _object(_object(answer.get("put")).get(stored.name))
        url, headers = slot.get("url"), _object(slot.get("headers"))
        if not isinstance(url, str):
            raise Fault(
                "upload.failed", f"the server gave no address for {stored.name}", retryable=True
            )
        return _Slot(url, {str(name): str(value) for name, value in headers.items()})

    def _put(self, slot: _Slot, path: Path, size: int) -> tuple[int, str]:
        """One try: the status (0 without an answer), and it in words."""
        try:
            with path.open("rb") as stream:
                answer = self._session.put(
                    slot.url,
                    # an empty file object would be sent in chunks, which S3 refuses
                    data=_Stream(stream.read, size, self._halt, self._moved) if size else b"",
                    headers={"content-type": "application/octet-stream", **slot.headers},
                    timeout=PUT_TIMEOUT,
                    allow_redirects=False,
                )
        except requests.RequestException as error:
            return 0, type(error).__name__  # its text holds the signed address
        return answer.status_code, f"storage answered with {answer.status_code}"

    def _ask(self, question: Mapping[str, Any], *, code: str) -> dict[str, Any]:
        body = json.dumps(question).encode()
        why = ""
        for delay in (*self._delays, None):
            status, answer = self._post(body)
            if status == 200 and answer is not None:
                return answer
            why = f"the server answered with {status}" if status else "the server did not answer"
            log.warning("asking for addresses: %s", why)
            if status == 410:
                self._halt.call("gone")
            self._halt.check()
            if status in (413, 422):
                break
            if delay is not None:
                self._halt.sleep(delay)
        raise Fault(code, f"no addresses for files: {why}", retryable=True)

    def _post(self, body: bytes) -> tuple[int, dict[str, Any] | None]:
        spec = self._spec
        headers = sign(
            body,
            secrets=[spec.secret],
            webhook_id=f"{spec.job}.{spec.attempt}.files.{secrets.token_hex(8)}",
            at=self._clock.now(),
        )
        try:
            answer = self._session.post(
                spec.files_url,
                data=body,
                headers={**headers, "content-type": "application/json"},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException:
            return 0, None
        if answer.status_code == 200:
            self._on_heard()
        elif answer.status_code == 401:
            self._clock.learn(answer.headers.get("date"))
        try:
            return answer.status_code, _object(answer.json())
        except ValueError:
            return answer.status_code, None

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                self._halt.check()
                digest.update(chunk)
                self._moved(len(chunk))
        return digest.hexdigest()


class _Stream:
    """A body of known length that is read in pieces, and ends when the work does."""

    def __init__(
        self, read: Callable[[int], bytes], size: int, halt: Halt, moved: Callable[[int], None]
    ) -> None:
        self._read, self._size, self._halt, self._moved = read, size, halt, moved

    def __len__(self) -> int:
        return self._size

    def read(self, amount: int = CHUNK) -> bytes:
        self._halt.check()
        chunk = self._read(amount)
        self._moved(len(chunk))
        return chunk

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read():
            yield chunk


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
