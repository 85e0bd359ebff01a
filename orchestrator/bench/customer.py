"""The two outsiders of the latency bench: a customer's receiver, and an agent that only reports."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

import requests

from gpu_agent import wire
from orchestrator.cli.receiver import Receiver


class Customer(Receiver):
    """A receiver that notes when each webhook came."""

    def __init__(self, secret: str) -> None:
        #: (job, webhook type) to seconds since the epoch, of the first arrival
        self.arrived: dict[tuple[str, str], float] = {}
        self.secret = secret
        super().__init__(secret)

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        at = time.time()
        good = super().take(body, headers)
        if good:
            payload = json.loads(body)
            self.arrived.setdefault((payload["data"]["job"], payload["type"]), at)
        return good


class ScriptedAgent:
    """Speaks the real wire: trades its token for the job, then signs and POSTs reports.

    Raises: requests.RequestException, when the server does not take what it is told.
    """

    def __init__(self, url: str, token: str) -> None:
        self._session = requests.Session()
        self._session.trust_env = False
        self._seq = 0
        said = {"token": token, "nonce": secrets.token_hex(16), "version": wire.VERSION}
        answer = self._session.post(f"{url}/agent/v1/hello", json=said, timeout=30)
        answer.raise_for_status()
        self._spec = wire.JobSpec.from_bytes(answer.content)

    @property
    def job(self) -> str:
        return self._spec.job

    def report(self, fact: wire.Fact, data: Mapping[str, Any]) -> float:
        """Report once; seconds since the epoch at which it was sent."""
        self._seq += 1
        report = wire.Report(
            job=self._spec.job,
            attempt=self._spec.attempt,
            seq=self._seq,
            type=fact,
            at=time.time(),
            data=data,
        )
        body = report.to_bytes()
        sent = time.time()
        headers = wire.sign(
            body, secrets=[self._spec.secret], webhook_id=report.webhook_id, at=sent
        )
        answer = self._session.post(self._spec.report_url, data=body, headers=headers, timeout=30)
        answer.raise_for_status()
        return sent

    def close(self) -> None:
        self._session.close()
