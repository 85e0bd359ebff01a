"""Customers' endpoints: some fast, some slow, some down for hours, some that may not be called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpu_agent import wire
from infra import guard
from orchestrator.sim.invariants import Checker
from orchestrator.sim.kernel import Kernel
from tasks.relay import Answer, EndpointRefused, NoAnswer

#: A name that leads to a public and to a private address at once.
MIXED = "https://rebinding.example/hook"


@dataclass
class Endpoint:
    url: str
    kind: str = "healthy"
    #: no answer until then (kernel's seconds)
    down_until: float = 0.0


class Customers:
    """Takes what the relay sends."""

    def __init__(self, kernel: Kernel, hit: Callable[[str], bool], checker: Checker) -> None:
        self.kernel, self.hit, self.checker = kernel, hit, checker
        self.endpoints: dict[str, Endpoint] = {}
        self.secrets: dict[str, str] = {}
        self.received: defaultdict[str, int] = defaultdict(int)
        self.posts = self.duplicates = 0

    def join(self, job: str, secret: str) -> str:
        """A new job's endpoint; its URL."""
        kind = "healthy"
        for name in ("gone", "private", "slow", "down"):
            if self.hit(f"endpoint.{name}"):
                kind = name
                break
        if kind == "down" and self.kernel.random.random() > 0.05:
            kind = "healthy"
        url = MIXED if kind == "private" else f"https://customer.example/{kind}/{job}"
        until = self.kernel.t + self.kernel.random.uniform(600, 8 * 3600) if kind == "down" else 0.0
        self.endpoints[job] = Endpoint(url, kind, until)
        self.secrets[job] = secret
        return url

    def heal(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.down_until = 0.0

    def post(self, url: str, *, headers: Mapping[str, str], body: bytes, timeout: float) -> Answer:
        """The relay's way out. Raises: EndpointRefused, NoAnswer."""
        name = headers["webhook-id"]
        job = name.rpartition(".")[0]
        endpoint = self.endpoints[job]
        self.posts += 1
        self.checker.post_began(name, url, body)
        return self._post(endpoint, job, name, headers, body, timeout)

    def _post(
        self,
        endpoint: Endpoint,
        job: str,
        name: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout: float,
    ) -> Answer:
        random = self.kernel.random
        if endpoint.kind == "private":
            try:
                guard.guarded_request("POST", endpoint.url, body=body, resolver=_mixed)
            except guard.GuardRefused as error:
                raise EndpointRefused(str(error)) from None
            raise AssertionError("a private address was called")
        if self.kernel.t < endpoint.down_until:
            self.kernel.pause(random.choice((0.01, timeout)))
            raise NoAnswer("no answer in time")
        self.kernel.pause(random.uniform(2.0, timeout) if endpoint.kind == "slow" else 0.05)
        if endpoint.kind == "gone":
            return Answer(410, {})
        if self.hit("endpoint.fails"):
            status = random.choice((500, 503, 429, 302, 404))
            return Answer(status, {"retry-after": "20"} if status in (429, 503) else {})
        try:
            now = self.kernel.now().timestamp()
            wire.verify(body, headers, secrets=[self.secrets[job]], now=now)
        except wire.SignatureError:
            return Answer(401, {})  # it was under way for too long
        self.received[name] += 1
        if self.received[name] > 1:
            self.duplicates += 1
        self.checker.customer_took(job, name)
        if self.hit("endpoint.loses_answers"):
            raise NoAnswer("the connection was cut")
        return Answer(200, {})


def _mixed(host: str, port: int) -> list[str]:
    del host, port
    return ["93.184.216.34", "10.0.0.7"]
