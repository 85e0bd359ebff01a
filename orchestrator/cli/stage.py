"""All of Stoker on this machine, with a Vast sandbox in place of the market: the demo's, and the
end-to-end tests'."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from rich.console import Console

from infra import embedded
from infra.embedded import EmbeddedError, Program
from infra.embedded.supervisor import Supervisor
from infra.settings import Settings
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError
from orchestrator.cli.processes import program, programs
from orchestrator.cli.servers import left_beside, make_key, prepare, services
from state.money import NO_LIMITS

if TYPE_CHECKING:
    from infra.wiring import Services

#: A tiny base that is one file: its version at the Civitai sandbox.
TINY_FILE = "civitai:1"
#: One that is a folder: where it lies in our own store.
TINY_FOLDER = "bases/tiny/"
READY_S = 60.0


@dataclass
class Stage:
    """Everything that is started, and where it is.

    Attributes:
        root: an empty directory; all files lie below it.
        port: of the API.
        own_base: base models come from the real Civitai; else from a sandbox with a tiny one.
        family: of the tiny base.
        key: an operator's, once everything runs.
    """

    root: Path
    port: int
    show: Console
    own_base: bool = False
    family: str = "sd1"
    servers: embedded.Running | None = None
    key: str = field(default="", repr=False)
    _ours: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tiny(self) -> Path:
        """One file, or a folder where the family's models usually are one."""
        return self.root / "models" / ("tiny.safetensors" if self.family == "sd1" else "tiny")

    @property
    def tiny_address(self) -> str:
        return TINY_FILE if self.family == "sd1" else f"s3:{TINY_FOLDER}"

    def start(self, stack: contextlib.ExitStack) -> tuple[Client, Services]:
        """Start servers and processes; a client with a key of its own, and what is behind it.

        `stack` ends everything. Raises: CliError, EmbeddedError.
        """
        tiny = None if self.own_base else threading.Thread(target=self._make_tiny)
        if tiny:
            tiny.start()
        servers = stack.enter_context(embedded.start(self._settings(), progress=self._say))
        self.servers = servers
        stack.callback(self._look_around)
        prepare(servers.settings)
        if tiny:
            self._say("tiny base model", "being made")
            tiny.join()
            if not self.tiny.exists():
                raise CliError("the tiny base model was not made", _tail(self.root / "tiny.log"))
        settings = self._with_sandbox(servers, servers.settings)
        for item in programs(settings):
            servers.run(item)
        have = services(settings)
        if self.tiny.is_dir():
            for path in filter(Path.is_file, self.tiny.rglob("*")):
                key = TINY_FOLDER + path.relative_to(self.tiny).as_posix()
                have.storage.put_file(key, path)
        scopes = frozenset({"jobs:read", "jobs:write", "operator"})
        self.key = make_key(have, owner="demo", name="demo", scopes=scopes)
        self._until_ready(settings)
        stack.enter_context(left_beside(self.url, self.key, settings))
        return Client(self.url, self.key), have

    def left(self) -> list[int]:
        """Processes that were ours when the end began, and run still."""
        return sorted(pid for pid in self._ours if is_running(pid))

    def _look_around(self) -> None:
        if self.servers is not None and (top := self.servers.pids.get("supervisor")):
            self._ours = frozenset({top} | descendants(top))

    def _settings(self) -> Settings:
        given = Settings.from_env()
        blank = Settings()
        return dataclasses.replace(
            given,
            deployment=f"demo-{secrets.token_hex(3)}",
            data_dir=self.root,
            database_url=blank.database_url,
            redis_url=blank.redis_url,
            s3_endpoint="",
            s3_access_key="",
            s3_secret_key=blank.s3_secret_key,
            secret_keys=(),
            public_url=self.url,
            bind=f"127.0.0.1:{self.port}",
            private_webhooks=True,
            private_bases=not self.own_base,
            vast_pace=0.0,
            limits=NO_LIMITS,
            kill_switch=False,
        )

    def _make_tiny(self) -> None:
        self.tiny.parent.mkdir(parents=True)
        (self.tiny.parent / "index.json").write_text(json.dumps({"1": self.tiny.name}))
        argv = (
            sys.executable, "-m", "gpu_agent.lora.tiny_base", str(self.tiny),
            "--family", self.family,
        )  # fmt: skip
        log = self.root / "tiny.log"
        # Under a supervisor of its own: it begins before the servers, and dies with us like them.
        maker = Supervisor()
        with contextlib.suppress(EmbeddedError), contextlib.closing(maker):
            maker.run_once(Program(name="tiny", argv=argv, log=log, cwd=Path.cwd(), once=True))

    def _with_sandbox(self, servers: embedded.Running, settings: Settings) -> Settings:
        port = free_port()
        account, civitai = secrets.token_hex(16), secrets.token_hex(16)
        argv = (
            sys.executable, "-m", "infra.sandbox", "--port", str(port), "--boot", "1",
            "--data-dir", str(self.root / "sandbox"), "--keep-logs",
            *(() if self.own_base else ("--base-model-dir", str(self.tiny.parent))),
        )  # fmt: skip
        keys = {"SANDBOX_ACCOUNT_KEY": account, "SANDBOX_CIVITAI_KEY": civitai}
        url = f"http://127.0.0.1:{port}"
        servers.run(program("sandbox", argv, settings, keys))
        secret = type(settings.vast_api_key)
        changes: dict[str, Any] = {"vast_url": url, "vast_api_key": secret(account)}
        if not self.own_base:
            changes |= {"civitai_url": url, "civitai_api_key": secret(civitai)}
        return dataclasses.replace(settings, **changes)

    def _until_ready(self, settings: Settings) -> None:
        self._say("web, worker, beat", "starting")
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(requests.RequestException):
                answer = requests.get(f"{self.url}/readyz", timeout=5)
                if answer.status_code == 200:
                    break
            if time.monotonic() > deadline:
                logs = settings.data_dir / "logs"
                tails = "; ".join(f"{path.stem}: {_tail(path)}" for path in logs.glob("*.log"))
                raise CliError("Stoker did not get ready", tails)
            time.sleep(0.2)
        self._say("web, worker, beat", "ready")

    def _say(self, name: str, state: str) -> None:
        self.show.print(f"  {name}: {state}", markup=False)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> frozenset[int]:
    """The processes below `pid`, all generations; none where there is no /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return frozenset(found)


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that ended and that nobody waited for is none."""
    try:
        return _stat(pid)[0] != "Z"
    except (OSError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    """State, parent …, as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
