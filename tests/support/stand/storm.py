"""A whole Stoker in a storm: jobs are always under way, processes are killed, lines are cut.

Everything is real and of this machine: granian, worker, beat, PostgreSQL, Redis, S3, the market's
sandbox and its machines with their agents. Between them stand links that can fail, and in front of
the web process a witness that remembers what was acknowledged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import secrets
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from infra import embedded
from infra.embedded import Program
from infra.embedded.supervisor import Supervisor
from infra.settings import Settings
from infra.wiring import Services
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError
from orchestrator.cli.jobs import photo_files, upload_dataset
from orchestrator.cli.processes import programs
from orchestrator.cli.servers import make_key, prepare
from orchestrator.cli.stage import TINY_FILE, descendants, free_port
from stand.audit import Rental
from stand.front import Front
from stand.links import Link, Links
from stand.running import Customer, argv_of, until
from state.errors import StoreUnavailable
from state.job import Job

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
HEALTHY_S = 120.0
PROCESSES = ("postgresql", "redis", "s3", "web", "worker", "beat")
#: What is killed, and how often beside the others.
VICTIMS: Mapping[str, int] = {
    "worker": 18, "web": 10, "web worker": 8, "postgresql": 10, "postgresql backend": 6,
    "redis": 8, "s3": 8, "beat": 6, "agent": 12, "trainer": 6, "machine": 3, "market": 2,
    "everything": 3,
}  # fmt: skip
#: What a job needs about a minute to get over: not in a short run.
SLOW = frozenset({"machine", "market", "sleep"})
#: Troubles beside a kill, by what they are done to.
TROUBLES: Mapping[str, tuple[str, ...]] = {
    "stop": (
        "worker", "web", "postgresql", "redis", "s3", "beat", "agent", "trainer", "market",
    ),
    "cut": ("postgresql", "redis", "s3", "market"),
    "refuse": ("postgresql", "redis", "s3", "market"),
    "hold": ("postgresql", "redis", "s3", "market"),
    "slow": ("postgresql", "redis", "s3", "market"),
    "lose": ("web",),
    "full": ("postgresql", "redis", "s3", "agent", "worker", "web"),
    "sleep": ("agent",),
}  # fmt: skip
#: One round in so many has a trouble beside its kill.
TROUBLE_EVERY = 3
TROUBLE_S = (0.5, 5.0)
#: An agent that sleeps for so long was given up, and wakes beside its successor.
SLEEP_S = 60.0
#: Of a piece on a slow line.
DELAY_S = 0.1


class Witness(Customer):
    """A customer that remembers how often, and with which bodies, each webhook came."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, set[str]] = {}
        self.times: Counter[str] = Counter()

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        taken = super().take(body, headers)
        if taken:
            name = headers["webhook-id"]
            self.bodies.setdefault(name, set()).add(hashlib.sha256(body).hexdigest())
            self.times[name] += 1
        return taken


class Ledger:
    """What the market bills, looked at so often that killing the market takes nothing away."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._rentals: dict[str, Rental] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ledger", daemon=True)

    @property
    def rentals(self) -> list[Rental]:
        return list(self._rentals.values())

    def look(self) -> None:
        rows: list[dict[str, Any]] = []
        query: dict[str, str] = {}
        while True:
            answer = requests.get(
                f"{self._url}/api/v0/charges/",
                params=query,
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=5,
            )
            answer.raise_for_status()
            page = answer.json()
            rows += page["results"]
            if not page.get("next_token"):
                break
            query = {"after_token": page["next_token"]}
        for row in rows:
            if row["type"] == "instance":
                name = row["source"].removeprefix("instance-")
                began, ended = (datetime.fromtimestamp(row[key], UTC) for key in ("start", "end"))
                label = str(row["metadata"]["label"])
                self._rentals[name] = Rental(id=name, label=label, began=began, ended=ended)

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(requests.RequestException):
                self.look()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class Storm:
    """One Stoker, and what is done to it.

    Args:
        root: an empty directory.
        photos: a directory with a few photographs.
        in_flight: so many jobs are always under way.
        real_every: each so-many-th job is trained by the real trainer; 0: none.
    """

    def __init__(
        self, root: Path, photos: Path, *, in_flight: int, real_every: int, dice: random.Random
    ) -> None:
        self.root, self._photos, self._dice = root, photos, dice
        self._in_flight, self._real_every = in_flight, real_every
        self.ordered: list[str] = []
        self.witness = Witness()
        self.killed: Counter[str] = Counter()
        self.troubled: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self._port = free_port()
        self._market_port = free_port()
        self._market_keys = (secrets.token_hex(16), secrets.token_hex(16))
        self.ledger = Ledger(f"http://127.0.0.1:{self._market_port}", self._market_keys[0])
        self._asleep: list[tuple[float, Callable[[], None]]] = []
        #: Held by whoever looks into the database beside the rounds.
        self._looking = threading.Lock()
        self._calm = threading.Event()
        self._dataset = ""

    # --- start and end

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything up until the block ends."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.witness.close)
            self._market = Supervisor()
            stack.callback(self._market.close)
            base = threading.Thread(target=self._make_base)
            base.start()
            self._market.launch(self._market_program())
            self.ledger.start()
            stack.callback(self.ledger.close)
            self.front = stack.enter_context(Front(self._port))
            links = stack.enter_context(Links())
            self._servers = embedded.start(self._settings())
            stack.callback(lambda: self._servers.close())
            self.links = self._make_links(links)
            self._start_programs()
            stack.callback(lambda: self.services.store.close())
            scopes = frozenset({"jobs:read", "jobs:write", "operator"})
            key = make_key(self.services, owner="storm", name="storm", scopes=scopes)
            self.client = Client(self.front.url, key)
            self.until_healthy(datetime.now(UTC))
            base.join()
            self._dataset = upload_dataset(self.client, self._photos, photo_files(self._photos))
            ready = f"/v1/datasets/{self._dataset}"
            until(lambda: self.client.get(ready)["status"] == "ready", "a dataset")
            yield

    def _settings(self) -> Settings:
        return Settings(
            deployment="storm",
            data_dir=self.root,
            public_url=self.front.url,
            bind=f"127.0.0.1:{self._port}",
            private_webhooks=True,
            private_bases=True,
            vast_pace=0.0,
            rate_reads=0,
            rate_writes=0,
        )

    def _make_links(self, links: Links) -> dict[str, Link]:
        have = self._servers.settings
        targets = {
            "postgresql": _port_of(have.database_url.reveal()),
            "redis": _port_of(have.redis_url.reveal()),
            "s3": _port_of(have.s3_endpoint),
            "market": self._market_port,
        }
        return {name: links.to(port) for name, port in targets.items()}

    def _linked(self, have: Settings) -> Settings:
        """`have`, with everything reached by way of the links."""

        def by_way(name: str, url: str) -> str:
            return url.replace(f":{_port_of(url)}", f":{self.links[name].port}")

        market = f"http://127.0.0.1:{self.links['market'].port}"
        account, civitai = self._market_keys
        return Settings.from_env(
            have.to_env()
            | {
                "DATABASE_URL": by_way("postgresql", have.database_url.reveal()),
                "REDIS_URL": by_way("redis", have.redis_url.reveal()),
                "S3_ENDPOINT": by_way("s3", have.s3_endpoint),
                "VAST_URL": market,
                "VAST_API_KEY": account,
                "CIVITAI_URL": market,
                "CIVITAI_API_KEY": civitai,
            }
        )

    def _start_programs(self) -> None:
        have = self._servers.settings
        for name, url in (
            ("postgresql", have.database_url.reveal()),
            ("redis", have.redis_url.reveal()),
            ("s3", have.s3_endpoint),
        ):
            self.links[name].target = _port_of(url)
        prepare(have)
        #: The observer's own, past the links.
        self.services = Services(have)
        for item in programs(self._linked(have)):
            self._servers.run(item)

    def _make_base(self) -> None:
        models = self.root / "models"
        models.mkdir()
        (models / "index.json").write_text(json.dumps({"1": "tiny.safetensors"}))
        tiny = str(models / "tiny.safetensors")
        argv = (sys.executable, "-m", "gpu_agent.lora.tiny_base", tiny)
        log = self.root / "tiny.log"
        self._market.run_once(Program(name="tiny", argv=argv, log=log, cwd=ROOT, once=True))

    def _market_program(self) -> Program:
        data, image = self.root / "market", self.root / "image"
        argv = (sys.executable, HERE / "market.py", image, self._market_port, data)
        return Program(
            name="market",
            argv=(*map(str, argv), str(self.root / "models")),
            log=self.root / "market.log",
            cwd=ROOT,
            env={
                "PYTHONPATH": str(ROOT),
                "SANDBOX_ACCOUNT_KEY": self._market_keys[0],
                "SANDBOX_CIVITAI_KEY": self._market_keys[1],
            },
        )

    # --- orders

    @contextlib.contextmanager
    def ordering(self) -> Iterator[None]:
        """Jobs under way all the time; at the end no new one is ordered."""
        self._calm.clear()
        thread = threading.Thread(target=self._keep_ordering, name="orders", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._calm.set()
            thread.join()

    def _keep_ordering(self) -> None:
        while not self._calm.wait(0.2):
            with contextlib.suppress(StoreUnavailable):
                active = sum(not job.terminal for job in self.jobs().values())
                for _ in range(self._in_flight - active):
                    self.ordered.append(self._order())

    def _order(self) -> str:
        """Order until it is acknowledged: one key, so one job."""
        number = len(self.ordered) + 1
        real = bool(self._real_every) and number % self._real_every == 0
        recipe: dict[str, Any] = {
            "steps": 4 if real else random.Random(number).randint(4, 40),
            "resolution": 64,
            "rank": 4,
            "trigger": "real" if real else "sks",
            "validation_every": 4,
        }
        body = {
            "dataset_id": self._dataset,
            "base": TINY_FILE,
            "recipe": recipe,
            "webhook": {"url": self.witness.url, "secret": self.witness.secret},
        }
        key = {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            with contextlib.suppress(CliError):
                answer = self.client.call("POST", "/v1/jobs", json=body, headers=key)
                return str(answer.json()["id"])
            time.sleep(0.2)

    def jobs(self) -> dict[str, Job]:
        with self._looking, self.services.store.transaction() as tx:
            return tx.jobs(list(self.ordered))

    # --- harm

    def round(self, number: int, *, short: bool) -> None:
        """One SIGKILL at some moment, perhaps amid another trouble; returns when all is well."""
        dice = self._dice
        self.wake(time.monotonic())
        time.sleep(dice.uniform(0.0, 1.5))
        heal: Callable[[], None] | None = None
        lasts = 0.0
        if number % TROUBLE_EVERY == 0:
            what = dice.choice([name for name in TROUBLES if not (short and name in SLOW)])
            whom = dice.choice(TROUBLES[what])
            lasts = dice.uniform(*TROUBLE_S)
            self._say(f"round {number}: {what} {whom} for {lasts:.1f} s")
            heal = self._begin(what, whom)
            if what == "sleep":  # not waited for
                self._asleep.append((time.monotonic() + SLEEP_S, heal))
                heal, lasts = None, 0.0
        began = time.monotonic()
        time.sleep(dice.uniform(0.0, lasts))
        victim, gone = self._kill(short=short)
        self._say(f"round {number}: {victim} ({gone}) is killed")
        self.killed[victim] += 1
        killed_at = time.monotonic()
        time.sleep(max(0.0, began + lasts - time.monotonic()))
        if heal is not None:
            heal()
        if victim == "everything":
            self._start_again()
        self.until_healthy(datetime.now(UTC), gone)
        took = time.monotonic() - killed_at
        self._say(f"round {number}: all is well after {took:.1f} s")
        self.slowest[victim] = max(took, self.slowest.get(victim, 0.0))

    def wake(self, now: float = float("inf")) -> None:
        """Wake the agents that have slept for long enough by `now`; else all."""
        due = [wake for until_s, wake in self._asleep if until_s <= now]
        self._asleep = [item for item in self._asleep if item[0] > now]
        for wake in due:
            wake()

    def _say(self, words: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S.%f} {words}")  # noqa: T201 -- shown with a failure

    def _kill(self, *, short: bool) -> tuple[str, int]:
        """Who was killed, and its process id. Who is not there now is not drawn."""
        while True:
            names = [name for name in VICTIMS if not (short and name in SLOW)]
            (victim,) = self._dice.choices(names, [VICTIMS[name] for name in names])
            pids = sorted(self.pids(victim))
            with contextlib.suppress(IndexError, ProcessLookupError):
                pid = self._dice.choice(pids)
                # a container has nothing left when its first process is gone
                inside = descendants(pid) if victim == "machine" else frozenset()
                os.kill(pid, signal.SIGKILL)
                _signal(inside, signal.SIGKILL)
                return victim, pid

    def _start_again(self) -> None:
        """As an operator does after the power came back."""
        with self._looking:
            self.services.store.close()
            self._servers.close()
            self._servers = embedded.start(self._settings(), patience_s=30.0)
            self._start_programs()

    def _begin(self, what: str, whom: str) -> Callable[[], None]:
        """Start a trouble; what ends it."""
        self.troubled[f"{what} {whom}"] += 1
        if what == "lose":
            self.front.lose()
            return self.front.mend
        if what in ("cut", "refuse", "hold", "slow"):
            return _hurt(self.links[whom], what)
        pids = sorted(self.pids(whom))
        group = frozenset(pids[:1]).union(*(descendants(pid) for pid in pids[:1]))
        if what in ("stop", "sleep"):
            _signal(group, signal.SIGSTOP)
            return lambda: _signal(group, signal.SIGCONT)
        _limit(group, full=True)
        # those that were born meanwhile have the limit from their parents
        return lambda: _limit(group.union(*(descendants(pid) for pid in group)), full=False)

    def pids(self, victim: str) -> frozenset[int]:
        """The processes that are meant by `victim`, now."""
        ours = self._servers.pids
        if victim == "everything":
            return frozenset({ours["supervisor"]})
        if victim in ("agent", "trainer", "machine"):
            return self._on_machines(victim)
        if victim == "market":
            return frozenset({self._market.pids["market"]})
        name, _, part = victim.partition(" ")
        if name not in ours:
            return frozenset()
        return descendants(ours[name]) if part else frozenset({ours[name]})

    def _on_machines(self, kind: str) -> frozenset[int]:
        marks = {
            "agent": (b"gpu_agent.pyz",),
            "trainer": (b"gpu_agent.lora", str(HERE / "protocol_trainer.py").encode()),
            "machine": (b"leave", b"stay"),
        }
        below = descendants(self._market.pids.get("market", os.getpid()))
        return frozenset(
            pid for pid in below if any(mark in argv_of(pid)[1:] for mark in marks[kind])
        )

    # --- health

    def until_healthy(self, since: datetime, gone: int = 0) -> None:
        """Until every part does its work again, shown by what it did after `since`."""
        until(lambda: self._healthy(since, gone), "all is well", HEALTHY_S)

    def _healthy(self, since: datetime, gone: int) -> bool:
        pids = self._servers.pids
        if any(pids.get(name) in (None, gone) for name in PROCESSES):
            return False
        with self.services.store.transaction() as tx:
            heard, _ = tx.beats().get("reconcile", (since, {}))
        if heard <= since:  # it takes beat, Redis, a worker and PostgreSQL to get there
            return False
        with contextlib.suppress(requests.RequestException):
            ready = requests.get(f"http://127.0.0.1:{self._port}/readyz", timeout=5)
            return ready.status_code == 200 and _answers(self._market_port)
        return False

    # --- the end

    def until_all_ended(self, seconds: float) -> None:
        """Every job ended, every machine given back, every webhook delivered."""
        self.wake()

        def settled() -> bool:
            jobs = self.jobs()
            with self.services.store.transaction() as tx:
                if any(not job.terminal for job in jobs.values()) or tx.open_leases():
                    return False
                return all(len(self.heard(job.id)) >= job.owed for job in jobs.values())

        until(settled, "every job ended, and all was told", seconds)
        self.ledger.look()

    def heard(self, job_id: str) -> list[dict[str, Any]]:
        """What the customer heard of a job, by `seq`."""
        mine = [item for item in list(self.witness.got) if item["data"]["job"] == job_id]
        return sorted(mine, key=lambda item: item["data"]["seq"])


def _port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


def _hurt(link: Link, what: str) -> Callable[[], None]:
    if what == "slow":
        link.slow(DELAY_S)
    elif what == "hold":
        link.hold()
    else:
        link.cut(refuse=what == "refuse")

    def heal() -> None:
        if what == "hold":
            link.cut()  # half-open to the end: what was held never arrives
        link.mend()

    return heal


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _limit(pids: Iterable[int], *, full: bool) -> None:
    """A full disk for these processes alone, and without rights: no file may be written to."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))
