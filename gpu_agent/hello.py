"""The first word: a one-use token is exchanged for the job's spec."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from gpu_agent.clock import Clock
from gpu_agent.halt import Halt
from gpu_agent.report import TIMEOUT, retry_after
from gpu_agent.wire import VERSION, JobSpec, WireError

log = logging.getLogger(__name__)

#: Waits between tries (seconds): ten minutes in all.
DELAYS = (1.0, 2.0, 5.0, 10.0, *(30.0,) * 19)


class GiveUp(Exception):
    """The server will never give this machine a job."""


def introduce(
    url: str,
    token: str,
    home: Path,
    *,
    machine: Mapping[str, Any],
    clock: Clock,
    halt: Halt,
    delays: Sequence[float] = DELAYS,
) -> JobSpec:
    """Get the job's spec from the server at `url`, or from `home` after a restart.

    The nonce is on disk before the token is used, so that the answer can be asked for again
    when it was lost; the spec is on disk before anything is done with it. On a full disk both
    are only remembered: then the server is at least told what is wrong here.

    Args:
        machine: what this machine is; the server may refuse it for that.

    Raises:
        GiveUp: the token is unknown or used, the attempt is over, the server does not want this
            machine, or nobody answered for long.
        Halted: the work was told to end.
    """
    kept = home / "spec.json"
    if kept.exists() and (spec := _read(kept.read_bytes())):
        return spec
    nonce = _nonce(home / "nonce")
    said = {"token": token, "nonce": nonce, "version": VERSION, "machine": machine}
    body = json.dumps(said).encode()
    for delay in (*delays, None):
        answer = _ask(f"{url.rstrip('/')}/agent/v1/hello", body)
        if answer is not None:
            clock.learn(answer.headers.get("date"))
            if answer.status_code == 200 and (spec := _read(answer.content)):
                _write(kept, answer.content)
                return spec
            log.warning("hello: answered with %d", answer.status_code)
            if answer.status_code in (401, 410, 422):
                raise GiveUp(f"the server answered with {answer.status_code}")
        if delay is not None:
            halt.sleep(max(delay, retry_after(answer) if answer is not None else 0.0))
    raise GiveUp("the server gave no job")


def _ask(url: str, body: bytes) -> requests.Response | None:
    try:
        with requests.Session() as session:
            session.trust_env = False
            return session.post(
                url,
                data=body,
                headers={"content-type": "application/json"},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
    except requests.RequestException as error:
        log.warning("hello: %s", type(error).__name__)
        return None


def _read(body: bytes) -> JobSpec | None:
    try:
        return JobSpec.from_bytes(body)
    except (WireError, TypeError) as error:
        log.warning("hello: the job spec cannot be read: %s", error)
        return None


def _nonce(path: Path) -> str:
    if path.exists():
        return path.read_text()
    made = secrets.token_hex(16)
    _write(path, made.encode())
    return made


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and for nobody else to read."""
    growing = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(growing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        growing.replace(path)
    except OSError as error:
        log.warning("%s is not kept: %s", path.name, error)
