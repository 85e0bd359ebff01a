"""What runs on a rented machine: the agent's side of the wire, and the ways in which a host fails.

The protocol is the real agent's: hello by token and nonce, reports numbered when first sent, one
under way at a time, retried with its delays and the same bytes, waiting progress merged, orders
obeyed, 410 means stop, a machine that heard nothing for too long ends itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_agent import wire
from gpu_agent.wire import Fact, Order
from infra.provider_memory import Rental
from orchestrator.sim.kernel import START

if TYPE_CHECKING:
    from orchestrator.sim.world import World

#: Waits between tries, as the agent's (seconds); the last one repeats.
REPORT_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
HELLO_DELAYS = (1.0, 2.0, 5.0, 10.0, *(30.0,) * 19)
#: Of these the latest counts; those that wait are merged.
MERGED = frozenset({Fact.IMAGES_PROGRESS, Fact.MODEL_PROGRESS, Fact.TRAINING_PROGRESS})
SILENCE_S = 900.0
#: An agent says something at least so often.
PACE_S = 20.0
#: Ways in which a machine fails before its agent says hello, and after.
BEFORE = ("host.never_boots", "host.abandoned", "host.mute")
AFTER = ("host.dies", "host.ends", "host.vanishes", "host.split_brain")


@dataclass
class Waiting:
    """A report in the spool; numbered, and then never changed, once it was sent."""

    fact: Fact
    data: dict[str, Any]
    at: float
    seq: int = 0
    raw: bytes = b""


class Agent:
    """One container: begins when it has booted, ends with its instance or by itself."""

    def __init__(self, world: World, rental: Rental, fate: str) -> None:
        self.world, self.rental, self.fate = world, rental, fate
        self.kernel = world.kernel
        self.alive, self.connected, self.over = True, True, False
        self.job, self.attempt, self.secret = "", 0, ""
        self.lease_ends_at = float("inf")
        self.heard_at = self.kernel.t
        self.skew = 0.0
        self.slow = 8.0 if world.hit("host.slow") else 1.0
        self._nonce = f"nonce-{rental.id}-{self.kernel.random.getrandbits(32):08x}"
        self._spool: deque[Waiting] = deque()
        self._seq = self._tries = 0
        self._busy = False
        self._done = 0
        self._plan: Iterator[tuple[float, Fact, dict[str, Any]]] = iter(())

    # --- the first word

    def hello(self) -> None:
        if not self.alive:
            return
        if not self.connected:
            self.kernel.after(5.0, self.hello)
            return
        token = self.rental.spec.env["STOKER_TOKEN"]
        status, spec = self.world.server.hello(token, self._nonce, self.rental.offer.machine_id)
        if status == 200 and self.world.hit("wire.answer_lost"):
            status = 0
        if status == 200 and self.world.hit("wire.hello_twice"):
            self.world.server.hello(token, self._nonce, self.rental.offer.machine_id)
        if status == 200:
            self._begin(spec)
        elif status in (401, 410, 422):
            self.give_back(f"hello was answered with {status}")
        elif self._tries >= len(HELLO_DELAYS):
            self.give_back("nobody answered hello")
        else:
            self._tries += 1
            self.kernel.after(HELLO_DELAYS[self._tries - 1], self.hello)

    def _begin(self, spec: Mapping[str, Any]) -> None:
        self.job, self.attempt, self.secret = spec["job"], spec["attempt"], spec["secret"]
        self.lease_ends_at = spec["lease_ends_at"] - START.timestamp()
        self._tries = 0
        self.heard_at = self.kernel.t
        self.kernel.at(self.lease_ends_at + 1.0, self.watch)
        self.kernel.after(SILENCE_S, self.watch)
        if self.world.hit("host.gpu"):
            code, text = "gpu.missing", "no CUDA device was found"
            self._plan = iter([(1.0, Fact.ERROR, {"code": code, "message": text})])
        else:
            self._plan = self._work()
        if self.fate in AFTER:
            self.kernel.after(self.kernel.random.expovariate(1 / 60.0), self._fail)
        self._advance()

    def _fail(self) -> None:
        """What this host does to its guests."""
        if not self.alive:
            return
        market, name = self.world.market, self.rental.id
        if self.rental.destroyed_at is not None:
            return
        self.kernel.note(self.job, f"{self.fate} on {name}")
        match self.fate:
            case "host.dies":
                market.set_phase(name, "lost")
                self.die()
            case "host.ends":
                market.set_phase(name, "ended")
                self.die()
            case "host.vanishes":
                market.vanish(name)
            case _:
                market.set_phase(name, "lost")
                self.connected = False
                self.kernel.after(self.kernel.random.uniform(20.0, 1200.0), self._back)

    def _back(self) -> None:
        """The host is reachable again, and its container went on all the while."""
        if self.alive and self.rental.destroyed_at is None:
            self.kernel.note(self.job, f"instance {self.rental.id} is back")
            self.world.market.set_phase(self.rental.id, "running")
            self.connected = True
            if self.rental.runs_from <= self.kernel.now():
                self._pump()

    # --- the work

    def _work(self) -> Iterator[tuple[float, Fact, dict[str, Any]]]:
        """Pauses and facts of an attempt that nothing happens to."""
        random, slow = self.kernel.random, self.slow
        yield 0.5, Fact.GPU_READY, {"gpu": self.rental.offer.gpu_name, "vram_gb": 24}
        yield from self._pull(random.uniform(2, 15) * slow, Fact.IMAGES_PROGRESS)
        if random.random() < 0.2:
            yield 1.0, Fact.MODEL_READY, {"bytes": 2 * 10**9}
            yield 1.0, Fact.IMAGES_READY, {"images": 20}
        else:
            yield 0.5, Fact.IMAGES_READY, {"images": 20}
            yield from self._pull(random.uniform(5, 30) * slow, Fact.MODEL_PROGRESS)
            yield 0.5, Fact.MODEL_READY, {"bytes": 2 * 10**9}
        yield 1.0, Fact.FILES_POSITIONED, {"resumed": False}
        lasts = min(600.0, random.lognormvariate(3.9, 0.6)) * slow
        total = 100
        yield 2.0, Fact.TRAINING_STARTED, {"step": 0, "total": total}
        ticks = max(1, int(lasts / PACE_S))
        for tick in range(1, ticks + 1):
            step = total * tick // ticks
            data = {"step": step, "total": total, "loss": 0.1, "eta_s": (ticks - tick) * PACE_S}
            yield lasts / ticks, Fact.TRAINING_PROGRESS, data
            if tick % 3 == 0:
                yield 0.0, Fact.TRAINING_CHECKPOINT, {"step": step, "files": []}
        yield 1.0, Fact.TRAINING_COMPLETED, {"step": total, "loss": 0.1}
        yield random.uniform(1.0, 5.0), Fact.WEIGHTS_UPLOADED, self._upload()

    def _pull(self, lasts: float, fact: Fact) -> Iterator[tuple[float, Fact, dict[str, Any]]]:
        ticks = int(lasts / PACE_S)
        for tick in range(1, ticks + 1):
            yield lasts / (ticks + 1), fact, {"bytes": tick * 10**6, "bytes_total": 10**8}

    def _upload(self) -> dict[str, Any]:
        body = f"weights of {self.job}.{self.attempt}".encode()
        claimed = hashlib.sha256(body).hexdigest()
        stored = body + b"!" if self.world.hit("host.bad_weights") else body
        self.world.storage.upload(self.job, self.attempt, "lora.safetensors", stored)
        files = [{"name": "lora.safetensors", "bytes": len(body), "sha256": claimed}]
        return {"files": files}

    def _advance(self) -> None:
        """Wait for the next fact of the work, and report it."""
        following = next(self._plan, None)
        if following is None or not self.alive or self.over:
            return
        pause, fact, data = following
        self.kernel.after(pause, self._learn, fact, data)

    def _learn(self, fact: Fact, data: dict[str, Any]) -> None:
        if not self.alive or self.over:
            return
        self._done += 1
        self._put(fact, {**data, "moved": self._done})
        self._advance()

    # --- reports

    def _put(self, fact: Fact, data: dict[str, Any]) -> None:
        last = self._spool[-1] if self._spool else None
        if last is not None and last.fact is fact and fact in MERGED and not last.seq:
            last.data.update(data)
        else:
            self._spool.append(Waiting(fact, data, self.clock()))
        self._pump()

    def clock(self) -> float:
        """Seconds since the epoch, as this machine believes."""
        return self.kernel.now().timestamp() + self.skew

    def _pump(self) -> None:
        if self._busy or not self._spool or not self.alive or not self.connected or self.over:
            return
        self._busy = True
        self._send()

    def _send(self) -> None:
        """One try at sending the first report."""
        self._busy = True
        if not self.alive or self.over:
            return
        if not self.connected:
            self._busy = False
            return
        report = self._spool[0]
        if not report.seq:
            self._seq += 1
            report.seq = self._seq
            report.raw = wire.Report(
                job=self.job,
                attempt=self.attempt,
                seq=report.seq,
                type=report.fact,
                at=report.at,
                data=report.data,
            ).to_bytes()
        name = f"{self.job}.{self.attempt}.{report.seq}"
        headers = wire.sign(report.raw, secrets=[self.secret], webhook_id=name, at=self.clock())
        status, orders = self._exchange(report.raw, headers)
        if status == 0:
            self._again()
            return
        self.world.agent_heard(self, status, orders)
        if 200 <= status < 300:
            self.heard_at = self.kernel.t
            self._accepted(report, orders)
        elif status == 410:
            self.give_back("a report was answered with 410")
        elif status in (413, 422):
            self._accepted(report, ())
        else:
            if status == 401:
                self.skew += self.world.server.skew - self.skew
            self._again()

    def _exchange(self, raw: bytes, headers: Mapping[str, str]) -> tuple[int, tuple[Order, ...]]:
        """What the network makes of a report, and of its answer. Status 0: no answer."""
        hit, server = self.world.hit, self.world.server
        if hit("wire.lost"):
            return 0, ()
        where = (self.job, self.attempt)
        if hit("wire.late"):
            # A proxy on the way keeps it, gives up on it towards us, and delivers it later.
            pause = self.kernel.random.uniform(1.0, 400.0)
            self.kernel.after(pause, server.report, *where, raw, headers)
            return 0, ()
        if hit("wire.forged"):
            self.world.forge(self, raw, headers)
        answer = server.report(*where, raw, headers)
        if hit("wire.duplicate"):
            pause = self.kernel.random.uniform(0.0, 60.0)
            self.kernel.after(pause, server.report, *where, raw, headers)
        return (0, ()) if hit("wire.answer_lost") else answer

    def _again(self) -> None:
        delay = REPORT_DELAYS[min(self._tries, len(REPORT_DELAYS) - 1)]
        self._tries += 1
        self.kernel.after(delay * self.kernel.random.uniform(0.8, 1.2), self._send)

    def _accepted(self, report: Waiting, orders: tuple[Order, ...]) -> None:
        self._spool.popleft()
        self._tries = 0
        self._busy = False
        if Order.STOP in orders or Order.CANCEL in orders:
            self.give_back("it was ordered to stop")
        elif report.fact in (Fact.WEIGHTS_UPLOADED, Fact.ERROR):
            self.over = True
            self.kernel.after(2.0, self.give_back, "its work is done")
        else:
            self._pump()

    # --- the end

    def watch(self) -> None:
        """The dead man's switch."""
        if not self.alive:
            return
        if self.kernel.t >= self.lease_ends_at:
            self.give_back("its lease ended")
        elif self.kernel.t - self.heard_at >= SILENCE_S:
            self.give_back("the server was silent")
        elif not self.over:
            # Not at the very moment: sums of seconds are not exact.
            self.kernel.at(min(self.heard_at + SILENCE_S, self.lease_ends_at) + 1.0, self.watch)

    def give_back(self, why: str) -> None:
        """End the own instance, where its key lets it."""
        self.over = True
        if not self.alive or not self.connected:
            return
        self.kernel.note(self.job, f"agent on {self.rental.id} ends itself: {why}")
        if self.world.hit("host.keeps"):
            self.die()
            self.world.market.stop(self.rental.id)
        else:
            self.world.market.vanish(self.rental.id)

    def die(self) -> None:
        self.alive = False
