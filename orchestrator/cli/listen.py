"""`stoker listen`: webhooks at a developer's desk, behind whatever firewall.

It makes a listener, an endpoint that is sent nothing: what it is owed waits at the server until
it is fetched here and answered for. So nothing is lost while this is not running (for an hour),
and nothing comes twice, unless this is killed between a forward and its answer.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import requests
import typer

from gpu_agent import wire
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit, err, out, print_line
from orchestrator.cli.jobs import AsJson

ENDPOINTS = "/v1/webhook-endpoints"
#: Seconds between two looks; and until the next after one that failed.
LOOK_S, AGAIN_S = 1.0, 5.0
#: What the local server may take.
FORWARD_TIMEOUT_S = 30.0
#: Answers are told at least this often, and this many at once: the API counts requests.
TELL_S, AT_ONCE = 2.0, 100


def listen(
    forward_to: Annotated[
        str, typer.Option(help="POST each webhook there: localhost:3000/webhooks, say.")
    ] = "",
    events: Annotated[
        str, typer.Option(help="Only these, with commas between: job.completed,job.failed.")
    ] = "",
    secret: Annotated[
        str,
        typer.Option(
            help="Sign with this one, best said by STOKER_LISTEN_SECRET; else one is made."
        ),
    ] = "",
    count: Annotated[int, typer.Option(help="Stop after so many; 0: never.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Show webhooks of your jobs as they happen, and forward them to a local server.

    Example: stoker listen --forward-to localhost:3000/webhooks

    JSON: a line per webhook: {id, type, job, seq, created_at, answer, took_ms, error}; with
    `payload` where nothing is forwarded.
    """
    target = _target(forward_to)
    key = _secret(secret)
    client = Client.here()
    desk = Desk(client=client, target=target, secret=key)
    filtered = [name.strip() for name in events.split(",") if name.strip()]
    resumed = desk.open(filtered)
    where = f", forwarding to {target}" if target else ""
    err.print(f"{'listening again' if resumed else 'listening'}{where}", markup=False)
    if target:
        err.print(f"webhook secret: {key}", markup=False, soft_wrap=True)
    err.print("Ctrl-C stops; `stoker trigger job.completed` sends a sample", markup=False)
    try:
        desk.run(count, print_line if as_json else _print)
    except KeyboardInterrupt:
        words = "stopped; what happens within an hour comes when you listen again, unless you"
        err.print(f"{words} `stoker webhooks rm {desk.endpoint}`", markup=False, soft_wrap=True)
        raise


def _target(given: str) -> str:
    """Raises: CliError."""
    url = given if "://" in given or not given else f"http://{given}"
    try:
        parts = urlsplit(url)
        bad = bool(url) and (parts.scheme not in ("http", "https") or not parts.hostname)
        bad = bad or parts.port == 0
    except ValueError:
        bad = True
    if bad:
        raise CliError(
            f"{given} is no URL",
            "it must be http:// or https:// with a host",
            "`stoker listen --forward-to localhost:3000/webhooks`",
            Exit.USAGE,
        )
    return url


def _secret(given: str) -> str:
    """Raises: CliError, which does not repeat it."""
    if not given:
        return wire.new_secret()
    try:
        wire.secret_key(given)
    except wire.WireError as error:
        raise CliError(
            "the secret is no use", str(error), "leave --secret out: one is made", Exit.USAGE
        ) from None
    return given


@dataclass
class Desk:
    """Fetches what a listener is owed, forwards it, and says what was answered."""

    client: Client
    target: str
    secret: str = field(repr=False)
    sleep: Callable[[float], None] = time.sleep
    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    endpoint: str = ""
    #: Forwarded, and not yet known at the server to be.
    untold: dict[str, dict[str, Any]] = field(default_factory=dict)
    told_at: float = 0.0

    def __post_init__(self) -> None:
        self._session = requests.Session()
        self._session.trust_env = False

    def open(self, events: list[str]) -> bool:
        """Make the listener, or take up the one of an earlier time; whether it is that one."""
        where = f" to {self.target}" if self.target else ""
        name = f"stoker listen on {socket.gethostname()}{where}"[:200]
        listed = self.client.get(ENDPOINTS, mine="true").get("data")
        for item in listed if isinstance(listed, list) else []:
            if item.get("url") is None and item.get("description") == name:
                self.endpoint = str(item["id"])
                body = {"events": events, "enabled": True}
                self.client.call("PATCH", self._path(), json=body)
                return True
        body = {"url": None, "events": events, "description": name}
        self.endpoint = str(self.client.post(ENDPOINTS, body).get("id", ""))
        return False

    def _path(self, below: str = "") -> str:
        return f"{ENDPOINTS}/{quote(self.endpoint, safe='')}{below}"

    def run(self, count: int, show: Callable[[Mapping[str, Any]], None]) -> None:
        """Until `count` webhooks came (0: for ever). A server that is away is waited for.

        Raises:
            CliError: the key was revoked, or the listener was deleted.
        """
        seen, away = 0, False
        try:
            while True:
                try:
                    waiting = self.fetch()
                    away = False
                except CliError as error:
                    if error.code is not Exit.FAILED:
                        raise
                    if not away:
                        err.print(f"waiting: {error.what}", markup=False, soft_wrap=True)
                    away = True
                    self.sleep(AGAIN_S)
                    continue
                for delivery in waiting:
                    show(self.forward(delivery))
                    seen += 1
                    if count and seen >= count:
                        return
                    self.tell(TELL_S)
                self.tell()
                if len(waiting) < AT_ONCE:
                    self.sleep(LOOK_S)
        finally:
            self.tell()

    def fetch(self) -> list[dict[str, Any]]:
        """What waits and was not forwarded yet, oldest first. Raises: CliError."""
        page = self.client.get(self._path("/waiting"), limit=AT_ONCE).get("data")
        if not isinstance(page, list):
            raise CliError(f"{self.client.url} does not speak Stoker's API", "it holds no list")
        return [item for item in page if item["id"] not in self.untold]

    def forward(self, delivery: Mapping[str, Any]) -> dict[str, Any]:
        """POST one webhook to the local server, if there is one; what came of it."""
        line = {
            "id": delivery["id"],
            "type": delivery["type"],
            "job": delivery.get("job"),
            "seq": delivery["seq"],
            "created_at": delivery["created_at"],
            "answer": None,
            "took_ms": 0,
            "error": "",
        }
        if not self.target:
            line["payload"] = delivery["payload"]
            self.untold[delivery["id"]] = {"delivery": delivery["id"], "answer": 200}
            return line
        body = json.dumps(delivery["payload"], separators=(",", ":")).encode()
        signed = wire.sign(
            body, secrets=[self.secret], webhook_id=str(delivery["id"]), at=self.now()
        )
        headers = {"content-type": "application/json", "user-agent": "stoker-listen/1", **signed}
        began, answer, error = self.monotonic(), 0, ""
        try:
            with self._session.post(
                self.target,
                data=body,
                headers=headers,
                timeout=FORWARD_TIMEOUT_S,
                allow_redirects=False,
                stream=True,
            ) as got:
                answer = got.status_code
        except requests.Timeout:
            error = "it took too long"
        except requests.RequestException:
            error = "nobody answers there"
        took = min(round((self.monotonic() - began) * 1000), 3_600_000)
        said = {"answer": answer if answer <= 599 else 0, "took_ms": took, "error": error}
        self.untold[delivery["id"]] = {"delivery": delivery["id"], **said}
        return {**line, **said}

    def tell(self, pause: float = 0.0) -> None:
        """Say what was forwarded, if the last time is `pause` seconds ago; else it waits for the
        next time. What the server does not take now, it is told again."""
        if not self.untold or self.monotonic() - self.told_at < pause:
            return
        self.told_at = self.monotonic()
        said = list(self.untold.values())[:AT_ONCE]
        try:
            self.client.call("POST", self._path("/answers"), json={"data": said})
        except CliError as error:
            if error.code is Exit.FAILED:
                return
            # Not there any more, all of them or one: nobody waits for the answer.
        for item in said:
            del self.untold[item["delivery"]]


def _print(line: Mapping[str, Any]) -> None:
    at = datetime.fromisoformat(line["created_at"]).astimezone().strftime("%H:%M:%S")
    said = ""
    if line["error"]:
        said = f"  → {line['error']}"
    elif line["answer"] is not None:
        said = f"  → {line['answer']} ({line['took_ms']} ms)"
    job = line["job"] or "a test"
    text = f"{at}  {line['type']}  {job} #{line['seq']}{said}  {line['id']}"
    out.print(text, markup=False, soft_wrap=True)
