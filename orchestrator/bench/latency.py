"""How soon things happen while jobs queue: `stoker bench latency`.

Everything runs as in production (embedded servers, web, worker, beat) except two outsiders: the
market is the Vast sandbox, whose machines never boot here, and the agents are scripted, speaking
the real wire. Vast's own spacing between calls (4.5 s between creates) is switched off: it is a
limit of the account, not of Stoker.

Jobs are ordered, and facts reported, at fixed times, whatever the answers take. Whatever did not
come counts with the whole time that it was waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import requests
from PIL import Image

from gpu_agent import wire
from infra import embedded
from infra.sandbox.contracts import Contract
from infra.sandbox.hosts import Host, seeded
from infra.sandbox.server import Sandbox, running_sandbox
from infra.settings import Settings
from infra.wiring import Services
from orchestrator.bench.customer import Customer, ScriptedAgent
from orchestrator.bench.place import children, commit_ms, machine, memory_mb
from orchestrator.cli.client import Client
from orchestrator.cli.jobs import upload_dataset
from orchestrator.cli.processes import WEB_WORKERS, programs
from orchestrator.cli.servers import make_key, prepare
from orchestrator.cli.stage import free_port
from state.events import Secret
from state.job import GpuNeeds

BAR_S = 1.0
#: For what does not come (seconds).
PATIENCE_S = 30.0
READY_S = 60.0
AGENT_S = 30.0
#: Orders and reports under way at once.
SENDERS = 16
BASE = "civitai:1"
#: A GPU that the sandbox's market does not have: whoever wants it, queues.
NOWHERE = "H200 NVL"
#: The facts that an agent reports, in order; the webhook that the customer gets for each, or none.
FACTS: tuple[tuple[wire.Fact, Mapping[str, Any], str], ...] = (
    (wire.Fact.GPU_READY, {"gpu_name": "RTX 4090"}, "job.pending_images"),
    (wire.Fact.IMAGES_READY, {"count": 4}, "job.pending_model"),
    (wire.Fact.MODEL_READY, {"bytes": 1}, ""),
    (wire.Fact.FILES_POSITIONED, {}, "job.training"),
    (wire.Fact.TRAINING_PROGRESS, {"step": 10, "total": 100, "loss": 0.1}, "job.progress"),
)
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much, and how fast (seconds between two)."""

    queued: int = 50
    submits: int = 50
    submit_every_s: float = 0.25
    report_every_s: float = 0.1
    #: Orders sent all at once at the end, for a figure without a bar.
    burst: int = 50
    agent: bool = True
    #: Share of Vast's spacing between calls that is kept.
    pace: float = 0.0


def run(data_dir: Path, *, scale: Scale = Scale(), say: Say = lambda line: None) -> dict[str, Any]:
    """Measure with servers of its own, below `data_dir`; all of it is gone afterwards.

    Returns: what it ran on; `latency` of both ways and of a burst (ms); `limits`: what the parts
    of each way cost alone; `ratios` of the p95s to the bar and of the p50s to those parts;
    `memory_mb` of each process; `bar_ms`.

    Raises:
        EmbeddedError: a server cannot run here.
        RuntimeError: a process did not start.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=data_dir)))
        customer = stack.enter_context(Customer(wire.new_secret()))
        place = stack.enter_context(_running(root, scale, customer, say))
        limits = place.limits()
        say(f"{scale.queued} jobs that no machine fits")
        place.queue()
        say(f"{scale.submits} jobs, one each {scale.submit_every_s:g} s")
        jobs, create = place.submit(scale.submits, scale.submit_every_s)
        say("agents reporting")
        hook = place.report(jobs, scale.report_every_s)
        memory = place.memory()
        if scale.burst:
            say(f"{scale.burst} jobs at once")
        _, burst = place.submit(scale.burst, 0.0)
        if scale.agent:
            say("a real agent, up to its trainer")
            memory["agent"] = place.agent_memory(root / "machine")
        return {
            "ran_on": place.ran_on(scale),
            "latency": {
                "submit_to_create": _figures(create),
                "fact_to_webhook": _figures(hook),
                "burst_to_create": _figures(burst),
            },
            "limits": limits,
            "ratios": _ratios(create, hook, limits),
            "bar_ms": 1000 * BAR_S,
            "memory_mb": memory,
        }


def _figures(spans: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(spans)
    if not ordered:
        return {"count": 0}
    return {
        "count": len(ordered),
        "p50_ms": round(1000 * statistics.median(ordered), 1),
        "p95_ms": round(1000 * _p95(ordered), 1),
        "max_ms": round(1000 * ordered[-1], 1),
        "missing": sum(span >= PATIENCE_S for span in ordered),
    }


def _p95(spans: Sequence[float]) -> float:
    ordered = sorted(spans)
    return ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]


def _ratios(
    create: Sequence[float], hook: Sequence[float], limits: Mapping[str, float]
) -> dict[str, float]:
    http, commit, market = (limits[f"{name}_ms"] / 1000 for name in ("http", "commit", "market"))
    # an order, the order's and the intent's commit, the search and the create
    alone_create = http + 2 * commit + 2 * market
    # a report, its and the claim's commit, a webhook
    alone_hook = 2 * http + 2 * commit
    return {
        "create_p95_to_bar": round(_p95(create) / BAR_S, 3),
        "webhook_p95_to_bar": round(_p95(hook) / BAR_S, 3),
        "create_p50_to_parts_alone": round(statistics.median(create) / alone_create, 2),
        "webhook_p50_to_parts_alone": round(statistics.median(hook) / alone_hook, 2),
    }


# --- the place --------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(root: Path, scale: Scale, customer: Customer, say: Say) -> Iterator[_Place]:
    """Servers, sandbox, web, worker and beat; a dataset that is ready."""
    bind = f"127.0.0.1:{free_port()}"
    account, civitai = secrets.token_hex(16), secrets.token_hex(16)
    blank = dataclasses.replace(
        Settings(),
        deployment=f"bench-{secrets.token_hex(3)}",
        data_dir=root,
        public_url=f"http://{bind}",
        bind=bind,
        private_webhooks=True,
        private_bases=True,
        rate_reads=0,
        rate_writes=0,
        vast_pace=scale.pace,
        vast_api_key=Secret(account),
        civitai_api_key=Secret(civitai),
    )
    with (
        embedded.start(blank, progress=lambda name, state: say(f"{name}: {state}")) as servers,
        running_sandbox(
            account_key=account,
            civitai_key=civitai,
            base_model_dir=_base_model(root / "models"),
            data_dir=root / "sandbox",
            hosts=_hosts(scale.submits + scale.burst + 1),
            boot_s=1e6,
        ) as sandbox,
    ):
        settings = dataclasses.replace(
            servers.settings, vast_url=sandbox.url, civitai_url=sandbox.url
        )
        prepare(settings)
        for item in programs(settings):
            servers.run(item)
        services = Services(settings)
        scopes = frozenset({"jobs:read", "jobs:write"})
        key = make_key(services, owner="bench", name="bench", scopes=scopes)
        client = Client(settings.public_url, key)
        _until(lambda: _answers(f"{settings.public_url}/readyz"), "web, worker and beat", READY_S)
        say("web, worker, beat: ready")
        dataset = upload_dataset(client, root / "photos", _photos(root / "photos"))
        ready = f"/v1/datasets/{dataset}"
        _until(lambda: client.get(ready)["status"] == "ready", "the dataset", READY_S)
        with contextlib.closing(services.store):
            yield _Place(
                scale, settings, services, sandbox, servers, client, key, customer, dataset
            )


def _hosts(count: int) -> list[Host]:
    like = next(host for host in seeded(0) if host.gpu_name == "RTX 4090" and host.hosting_type)
    return [dataclasses.replace(like, machine_id=1000 + n, host_id=2000 + n) for n in range(count)]


def _base_model(folder: Path) -> Path:
    """A megabyte that is served like a model; nobody loads it."""
    folder.mkdir()
    (folder / "base.safetensors").write_bytes(secrets.token_bytes(1 << 20))
    (folder / "index.json").write_text(json.dumps({"1": "base.safetensors"}))
    return folder


def _photos(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{shade}.png" for shade in (40, 90, 140, 190)]
    for path in paths:
        Image.linear_gradient("L").point(lambda grey, by=int(path.stem): (grey + by) % 256).save(
            path
        )
    return paths


def _answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=5).status_code == 200
    return False


def _until(done: Callable[[], bool], what: str, within_s: float) -> None:
    """Raises: RuntimeError, when it takes too long."""
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not ready within {within_s:g} s")
        time.sleep(0.1)


@dataclass(frozen=True)
class _Place:
    """What runs, and what is done with it."""

    scale: Scale
    settings: Settings
    services: Services
    sandbox: Sandbox
    servers: embedded.Running
    client: Client
    key: str = field(repr=False)
    customer: Customer
    dataset: str

    def ran_on(self, scale: Scale) -> dict[str, Any]:
        web = f"granian, {WEB_WORKERS} processes"
        known = machine(self.settings.database_url.reveal())
        return {
            **known,
            "web": web,
            "queued": scale.queued,
            "vast_spacing": "off (Vast asks for 4.5 s between creates)",
        }

    # orders

    def queue(self) -> None:
        """Jobs that stay: each was looked for on the market, and nothing fits."""
        with ThreadPoolExecutor(SENDERS) as pool:
            list(pool.map(lambda _: self._order([NOWHERE]), range(self.scale.queued)))

        def all_searched() -> bool:
            with self.services.store.transaction() as tx:
                jobs = tx.list_jobs(owner="bench", limit=self.scale.queued)
            return all("gpu_search" in job.progress for job in jobs)

        _until(all_searched, "the queued jobs", READY_S)

    def submit(self, count: int, every_s: float) -> tuple[list[str], list[float]]:
        """Order `count` jobs; their ids, and the seconds from each order to its create call."""
        ordered = _at_fixed_times(count, every_s, lambda _: self._order([]))
        wanted = {job for job, _ in ordered}
        deadline = time.monotonic() + PATIENCE_S
        while not wanted <= self._contracts().keys() and time.monotonic() < deadline:
            time.sleep(0.05)
        created = self._contracts()
        spans = [
            created[job].start_date - began if job in created else PATIENCE_S
            for job, began in ordered
        ]
        return [job for job, _ in ordered], spans

    def _order(self, gpu_names: list[str]) -> tuple[str, float]:
        """The new job, and when it was asked for (seconds since the epoch)."""
        body = {
            "dataset_id": self.dataset,
            "base": BASE,
            "gpu": {"gpu_names": gpu_names},
            "webhook": {"url": self.customer.url, "secret": self.customer.secret},
        }
        key = {"Authorization": f"Bearer {self.key}"}
        began = time.time()
        answer = requests.post(f"{self.client.url}/v1/jobs", json=body, headers=key, timeout=30)
        answer.raise_for_status()
        return str(answer.json()["id"]), began

    def _contracts(self) -> dict[str, Contract]:
        """What was rented, by job: labels are `<deployment>/<job>/…`."""
        market = self.sandbox.market
        with market.lock:
            return {item.label.split("/")[1]: item for item in market.contracts.values()}

    # reports

    def report(self, jobs: Sequence[str], every_s: float) -> list[float]:
        """Every fact of every job's agent, round by round; seconds from fact to webhook."""
        contracts = self._contracts()
        with ThreadPoolExecutor(SENDERS) as pool:
            agents = list(
                pool.map(
                    lambda job: ScriptedAgent(
                        self.settings.public_url, contracts[job].env["STOKER_TOKEN"]
                    ),
                    [job for job in jobs if job in contracts],
                )
            )
        sent: dict[tuple[str, str], float] = {}
        try:
            for fact, data, webhook in FACTS:
                report = partial(_report, agents, fact, data)
                times = _at_fixed_times(len(agents), every_s, report)
                pairs = zip(agents, times, strict=True)
                if webhook:
                    sent |= {(agent.job, webhook): at for agent, at in pairs}
            return self._spans(sent)
        finally:
            for agent in agents:
                agent.close()

    def _spans(self, sent: Mapping[tuple[str, str], float]) -> list[float]:
        arrived = self.customer.arrived
        deadline = time.monotonic() + PATIENCE_S
        while not sent.keys() <= arrived.keys() and time.monotonic() < deadline:
            time.sleep(0.05)
        return [arrived[key] - at if key in arrived else PATIENCE_S for key, at in sent.items()]

    # limits and memory

    def limits(self) -> dict[str, float]:
        """What the parts cost alone, before anything queues: medians in ms."""
        web = requests.Session()
        web.trust_env = False
        market = self.services.provider
        return {
            "http_ms": _median_ms(
                lambda: web.get(f"{self.settings.public_url}/healthz", timeout=5)
            ),
            "commit_ms": round(commit_ms(self.settings.database_url.reveal()), 3),
            "market_ms": _median_ms(lambda: market.offers(GpuNeeds())),
        }

    def memory(self) -> dict[str, Any]:
        """Resident MB of our processes; None where the system does not tell."""
        pids = self.servers.pids
        return {
            "web": [memory_mb(pid) for pid in children(pids["web"])],
            "web_master": memory_mb(pids["web"]),
            "worker": memory_mb(pids["worker"]),
            "beat": memory_mb(pids["beat"]),
        }

    def agent_memory(self, folder: Path) -> float | None:
        """The most that a real agent took, from its hello until its trainer starts."""
        job, _ = self._order([])
        _until(lambda: job in self._contracts(), "a machine for the agent", PATIENCE_S)
        folder.mkdir()
        bundle = folder / "gpu_agent.pyz"
        bundle.write_bytes(self.services.bundle.bytes)
        env = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "HOME": str(folder),
            "STOKER_URL": self.settings.public_url,
            "STOKER_TOKEN": self._contracts()[job].env["STOKER_TOKEN"],
            "PIP_NO_INDEX": "1",  # a bench downloads nothing
        }
        with (folder / "log").open("wb") as log:
            agent = subprocess.Popen(
                [sys.executable, str(bundle)],
                env=env,
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        most: float | None = None
        deadline = time.monotonic() + AGENT_S
        try:
            while time.monotonic() < deadline and agent.poll() is None:
                most = memory_mb(agent.pid, "VmHWM") or most
                if self.client.get(f"/v1/jobs/{job}")["status"] not in _BEFORE_TRAINING:
                    break
                time.sleep(0.1)
        finally:
            _end(agent)
        return most


_BEFORE_TRAINING = ("pending", "pendingGpu", "pendingImages", "pendingModel")


def _report(
    agents: Sequence[ScriptedAgent], fact: wire.Fact, data: Mapping[str, Any], number: int
) -> float:
    return agents[number].report(fact, data)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _median_ms(act: Callable[[], object], rounds: int = 20) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return round(1000 * statistics.median(took), 2)


def _at_fixed_times(count: int, every_s: float, act: Callable[[int], T]) -> list[T]:
    """Call `act(0)`, `act(1)` … at their times, also while earlier calls still wait."""
    began = time.monotonic()
    with ThreadPoolExecutor(SENDERS) as pool:
        calls = []
        for n in range(count):
            time.sleep(max(0.0, began + n * every_s - time.monotonic()))
            calls.append(pool.submit(act, n))
        return [call.result() for call in calls]
