"""One cohort of jobs with everything around it: workers, beat, market, agents, customers."""

from __future__ import annotations

import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any

from gpu_agent import wire
from gpu_agent.wire import Order
from infra.provider_memory import Rental
from orchestrator.sim.agents import AFTER, BEFORE, Agent
from orchestrator.sim.customers import Customers
from orchestrator.sim.invariants import Checker, Violation
from orchestrator.sim.kernel import Crash, Kernel, seconds
from orchestrator.sim.market import Market, hosts
from orchestrator.sim.profiles import Rates, swarm
from orchestrator.sim.server import Server, Storage, Store
from state import money, policy, record
from state.errors import IllegalMove, NotFound, StokerError
from state.events import Dataset, DatasetStatus, Outgoing, OutgoingStatus, Secret
from state.job import GpuNeeds, Job, JobRequest, Status
from state.lease import Lease
from state.policy import Policy
from tasks.allocate import Renter, Terms
from tasks.deallocate import Keeper, sweep
from tasks.reconcile import RECEIVER, reconcile
from tasks.relay import Relay
from tasks.verify import Verifier

DEPLOYMENT = "sim"
SWEEP_S = 30.0
#: Between two looks at the whole world, healed (seconds).
LOOK_S = 300.0
#: After the last arrival until all faults end (seconds).
FAULTS_LAST = 1800.0
#: Nothing may take longer than this after the healing: the webhook schedule is 75.6 h.
CONVERGED_S = 120 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What makes one world; the same values give the same run."""

    seed: int
    jobs: int = 500
    profile: str = "calm"
    #: share of machines that fail every job
    bad_hosts: float = 0.0
    hedge: bool = True
    #: of the profile's fault kinds, only these; None is all that the swarm draws
    kinds: tuple[str, ...] | None = None


@dataclass
class Outcome:
    """What one cohort came to. Everything adds up over cohorts."""

    trace_hash: str = ""
    events: int = 0
    violation: dict[str, Any] | None = None
    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    attempts_completed: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    #: seconds from a job's creation to its first training
    to_training: list[float] = field(default_factory=list)
    cost_receipt: int = 0
    cost_ledger: int = 0
    worst_difference: int = 0
    worst_over_cap: int = 0
    orphan_s: float = 0.0
    trace: list[str] = field(default_factory=list)


class World:
    """Drives everything by events; `run` is its whole life."""

    def __init__(self, cohort: Cohort, rules: Policy = policy.DEFAULT) -> None:
        self.cohort, self.outcome = cohort, Outcome()
        self.kernel = Kernel(cohort.seed)
        random = self.kernel.random
        self.rates: dict[str, float] = dict(_rates(cohort, random))
        self.had_trouble = bool(self.rates)
        self.checker = Checker(self.kernel, f"{DEPLOYMENT}/")
        self.checker.world = self
        self.store = Store(self.checker.watch, self.boundary)
        self.storage = Storage(self.hit, self.boundary)
        self.rules = rules
        # Where bad machines stay, there must be enough of them to meet new ones all the time.
        offers = hosts(random, 100 if cohort.bad_hosts else 60)
        count = round(len(offers) * cohort.bad_hosts)
        self.bad = {offer.machine_id for offer in random.sample(offers, count)}
        self._always_bad = frozenset(self.bad)
        self.market = Market(
            self.kernel,
            offers,
            self.hit,
            self.checker,
            boundary=self.boundary,
            on_begin=self._begin,
            on_end=self._end,
        )
        self.customers = Customers(self.kernel, self.hit, self.checker)
        self.server = Server(
            self.kernel, self.store, self.rules, self.checker, self.wake, self.as_process
        )
        terms = Terms(
            deployment=DEPLOYMENT, image="image", public_url="https://stoker", onstart="true"
        )
        clock = self.kernel.now
        self.renter = Renter(
            store=self.store, provider=self.market, terms=terms, clock=clock, rules=self.rules
        )
        self.keeper = Keeper(store=self.store, provider=self.market, clock=clock, rules=self.rules)
        self.verifier = Verifier(
            store=self.store,
            storage=self.storage,  # type: ignore[arg-type]  # the part of it that is used
            clock=clock,
            rules=self.rules,
        )
        self.relay = Relay(
            store=self.store, post=self.customers.post, clock=clock, random=Random(cohort.seed + 1)
        )
        self.agents: dict[str, Agent] = {}
        #: Whether what runs now is a process that may die.
        self._mortal = False
        self._beat_at = math.inf
        self.kernel.after_each = self._arm
        self._beat_stops_until = 0.0
        self._signed_at = -1.0
        self._sweeping = False
        self._jobs_open = 0
        self._healed = False
        self._last_forged: dict[str, tuple[bytes, Mapping[str, str]]] = {}

    # --- faults

    def hit(self, kind: str) -> bool:
        """Whether a fault of this kind comes now."""
        rate = self.rates.get(kind)
        if rate is None or self.kernel.random.random() >= rate:
            return False
        self.checker.fault()
        self.outcome.counts[f"fault {kind}"] += 1
        return True

    def boundary(self, where: str) -> None:
        """A line between two effects: the process may die on it, or wait while others act."""
        if not self._mortal or not self.rates:
            return
        if self.hit("server.crash"):
            self.kernel.note("-", f"crash {where}")
            raise Crash(where)
        if where != "before the commit" and self.hit("server.pause"):
            long = self.kernel.random.random() < 0.05
            pause = self.kernel.random.uniform(20.0, 150.0) if long else 1.0
            self.checker.fault(pause)
            self.kernel.pause(pause)

    # --- what the checker asks

    def job(self, job_id: str) -> Job:
        return self.store._data.jobs[job_id]

    def leases_of(self, job_id: str) -> list[Lease]:
        data = self.store._data
        return [data.leases[item] for item in data.leases_by_job.get(job_id, ())]

    def lease_by_label(self, label: str) -> Lease | None:
        data = self.store._data
        name = data.labels.get(label)
        return None if name is None else data.leases[name]

    def outgoing(self, name: str) -> Outgoing:
        return self.store._data.outgoing[name]

    def outgoing_of(self, job_id: str) -> list[Outgoing]:
        data = self.store._data
        return [data.outgoing[name] for name in data.outgoing_by_job.get(job_id, {}).values()]

    # --- messages and workers

    def wake(self, task: str, ids: Sequence[str]) -> None:
        """Send a message to a worker."""
        random = self.kernel.random
        if self.hit("message.lost"):
            return
        delay = random.uniform(0.0, 30.0) if self.hit("message.late") else 0.01
        self.kernel.after(delay, self.work, task, list(ids))
        if self.hit("message.duplicate"):
            self.kernel.after(random.uniform(0.0, 5.0), self.work, task, list(ids))

    def work(self, task: str, ids: Sequence[str]) -> None:
        """What a worker does with a message; a task that raises is over, as in Celery."""
        self._process(self._task, task, ids)

    def as_process(self, mortal: bool) -> bool:
        """From now on what runs may die, or not; what held before, to be put back."""
        before, self._mortal = self._mortal, mortal
        return before

    def _process(self, what: Callable[..., object], *args: Any) -> None:
        before = self.as_process(True)
        try:
            what(*args)
        except Crash:
            self.outcome.counts["crashes"] += 1
            if args and self.kernel.random.random() < 0.5:
                self.kernel.after(1.0, self._process, what, *args)
        except StokerError as error:
            self.outcome.counts[f"task raised {type(error).__name__}"] += 1
        finally:
            self.as_process(before)

    def _safely(self, what: Callable[..., object], *args: Any) -> None:
        """Do what is not under test, and does not die."""
        before = self.as_process(False)
        try:
            what(*args)
        finally:
            self.as_process(before)

    def _task(self, task: str, ids: Sequence[str]) -> None:
        if task == "tend":
            self.keeper.tend(ids)
            return
        if task == "sweep":
            sweep(self.keeper, DEPLOYMENT)
            return
        for item in ids:
            if task == "allocate":
                self.renter.allocate(item)
            elif task == "deallocate":
                self.keeper.release_job(item)
            elif task == "relay":
                self.relay.relay(item)
            elif task == "verify":
                self.verifier.verify(item)
                self.wake("deallocate", [item])
                self.wake("relay", [item])

    # --- beat

    def _arm(self) -> None:
        """Beat ticks each second; only the ticks at which something is due are played."""
        due = self.store.next_due()
        if due is None:
            return
        tick = max(math.ceil(seconds(due)), math.floor(self.kernel.t) + 1)
        tick = max(tick, math.ceil(self._beat_stops_until))
        if tick < self._beat_at:
            self._beat_at = tick
            self.kernel.at(float(tick), self._beat, tick)

    def _beat(self, tick: float) -> None:
        if tick != self._beat_at:
            return  # an earlier one was played instead
        self._beat_at = math.inf
        self._process(self._reconcile)
        if self.hit("beat.double"):
            self.kernel.after(0.01, self._process, self._reconcile)

    def _reconcile(self) -> None:
        self._safely(self._sign_of_life)
        reconcile(self.store, self.wake, self.kernel.now(), self.rules)

    def _sign_of_life(self) -> None:
        """The receivers' sign of life, as their thread would have left it by now."""
        server = self.server
        if server.down:
            return
        at = max(server.listens_since, self.kernel.t - self.kernel.t % 5.0)
        if at == self._signed_at:
            return
        self._signed_at = at
        start = self.kernel.now() - timedelta(seconds=self.kernel.t)
        since = start + timedelta(seconds=server.listens_since)
        with self.store.transaction() as tx:
            said = {"since": since.isoformat()}
            tx.beat(RECEIVER, start + timedelta(seconds=at), said)

    def _sweep_on(self) -> None:
        """Beat sweeps always; here only while there is a job, a lease, an orphan or a machine."""
        if not self._sweeping:
            self._sweeping = True
            self.kernel.after(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        data = self.store._data
        idle = not self._jobs_open and not data.open_leases and not data.open_orphans
        if idle and not self.market.ours(f"{DEPLOYMENT}/"):
            self._sweeping = False
            return
        self.kernel.after(SWEEP_S, self._sweep)
        if self.kernel.t >= self._beat_stops_until:
            self._process(self._task, "sweep", ())

    # --- machines

    def _begin(self, rental: Rental) -> None:
        self.checker.began(rental)
        fate = self._fate(rental)
        agent = self.agents[rental.id] = Agent(self, rental, fate)
        self.kernel.note("-", f"instance {rental.id}: {fate}")
        boots = seconds(rental.runs_from)
        if fate == "host.never_boots":
            rental.phase, rental.phase_since = "starting", rental.created_at
            agent.die()
        elif fate == "host.abandoned":
            self.kernel.at(boots * 0.5 + self.kernel.t * 0.5, self._abandon, rental)
            agent.die()
        elif fate == "host.mute":
            agent.die()
        else:
            self.kernel.at(boots + 1.0, agent.hello)

    def _abandon(self, rental: Rental) -> None:
        if rental.destroyed_at is None:
            self.market.set_phase(rental.id, "ended")

    def _fate(self, rental: Rental) -> str:
        if rental.offer.machine_id in self.bad:
            return self.kernel.random.choice((*BEFORE, "host.dies"))
        return next((kind for kind in (*BEFORE, *AFTER) if self.hit(kind)), "")

    def _end(self, rental: Rental) -> None:
        self.checker.ended(rental)
        agent = self.agents.get(rental.id)
        if agent is None:
            return
        agent.die()
        known = self.store._data.hosts.get(rental.offer.machine_id)
        failed = known is not None and known.bad > known.good
        if failed and not self.cohort.bad_hosts and self.kernel.random.random() < 0.95:
            # Markets are larger than ours: what failed rarely comes back soon.
            self.market.replace(rental)

    def agent_heard(self, agent: Agent, status: int, orders: tuple[Order, ...]) -> None:
        del agent, orders
        self.outcome.counts[f"reports answered {status}"] += 1

    def forge(self, agent: Agent, raw: bytes, headers: Mapping[str, str]) -> None:
        """Send what somebody without the right to it could send."""
        where = (agent.job, agent.attempt)
        wrong = wire.sign(
            raw,
            secrets=["whsec_" + "B" * 40],
            webhook_id=headers["webhook-id"],
            at=self.server.clock().timestamp(),
        )
        status, _, wrote = self.server.judge(*where, raw, wrong)
        self.checker.attacked(agent.job, "a forged report", status, wrote)
        foreign = self._last_forged.get("any")
        if foreign is not None and f'"job":"{agent.job}"'.encode() not in foreign[0]:
            status, _, wrote = self.server.judge(*where, *foreign)
            self.checker.attacked(agent.job, "another job's report", status, wrote)
        self._last_forged["any"] = (raw, headers)

    # --- the course of a world

    def run(self) -> Outcome:
        """All of it. A violation ends it and is part of the outcome."""
        try:
            self._live()
        except Violation as error:
            self.outcome.violation = {
                "invariant": error.invariant,
                "job": error.job,
                "what": error.words,
                "at": round(self.kernel.t, 3),
                "where": _where(error),
            }
            self.outcome.trace = _trace_of(self.kernel.trace, error.job)
        except AssertionError as error:
            self._failed(error)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, LookupError) as error:
            self._failed(error)
        self.outcome.trace_hash = self.kernel.trace_hash
        self.outcome.events = self.kernel.events
        return self.outcome

    def _failed(self, error: Exception) -> None:
        lines = traceback.format_exc().splitlines()
        self.outcome.violation = {
            "invariant": "crash",
            "job": "",
            "what": f"{type(error).__name__}: {error}",
            "at": round(self.kernel.t, 3),
        }
        self.outcome.trace = [*list(self.kernel.trace)[-20:], *lines[-30:]]

    def _live(self) -> None:
        at = 0.0
        for number in range(self.cohort.jobs):
            at += self.kernel.random.expovariate(1 / 20.0)
            self.kernel.at(at, self._safely, self._arrive, number)
        self._windows(at + FAULTS_LAST)
        self.kernel.at(at + FAULTS_LAST, self._heal)
        while self.kernel.step():
            if self._healed and self.kernel.t > at + FAULTS_LAST + CONVERGED_S:
                break
        self.checker.finish(Random(self.cohort.seed + 2))
        self._measure()

    def _arrive(self, number: int) -> None:
        """A customer orders a training."""
        random, now = self.kernel.random, self.kernel.now()
        job_id, dataset_id = f"job_{number:06d}", f"ds_{number:06d}"
        late = self.hit("dataset.late")
        dataset = Dataset(
            id=dataset_id,
            owner="o",
            created_at=now,
            status=DatasetStatus.OPEN if late else DatasetStatus.READY,
            zip_bytes=50_000_000,
        )
        secret = "whsec_" + f"{number:040d}"
        url = self.customers.join(job_id, secret)
        changes: dict[str, Any] = {}
        if "hedge" in JobRequest.__dataclass_fields__:
            changes["hedge"] = self.cohort.hedge
        request = JobRequest(
            dataset_id=dataset_id,
            base="civitai:1",
            gpu=GpuNeeds(min_reliability=0.9),
            max_cost=20_000 if self.hit("cap.small") else 5_000_000,
            webhook_url=url,
            **changes,
        )
        with self.store.transaction() as tx:
            tx.add_dataset(dataset)
            job = record.create_job(
                tx,
                request,
                owner="o",
                now=now,
                job_id=job_id,
                webhook_secrets=[Secret(secret)],
                rules=self.rules,
            )
        self._jobs_open += 1
        self._sweep_on()
        for task in record.wakes(job):
            self.wake(task, [job_id])
        if late:
            self.kernel.after(random.uniform(1.0, 300.0), self._safely, self._build, dataset_id)
        if self.hit("customer.cancels"):
            self.kernel.after(random.expovariate(1 / 120.0), self._safely, self._cancel, job_id)

    def _build(self, dataset_id: str) -> None:
        with self.store.transaction() as tx:
            dataset = tx.dataset(dataset_id).evolve(status=DatasetStatus.READY)
            moved = record.dataset_built(tx, dataset, self.kernel.now(), self.rules)
        for job in moved:
            for task in record.wakes(job):
                self.wake(task, [job.id])

    def _cancel(self, job_id: str) -> None:
        try:
            with self.store.transaction() as tx:
                job = record.cancel(tx, job_id, self.kernel.now(), self.rules)
        except (IllegalMove, NotFound):
            return
        for task in record.wakes(job):
            self.wake(task, [job_id])

    # --- faults that last

    def _windows(self, until: float) -> None:
        """When, and for how long, whole parts are away."""
        random = self.kernel.random
        for kind, mean, begin, end in (
            ("market.outage", 1800.0, self._market_off, self._market_on),
            ("market.no_credit", 600.0, self._credit_off, self._credit_on),
            ("receiver.down", 120.0, self._receiver_off, self._receiver_on),
            ("receiver.clock", 300.0, self._clock_off, self._clock_on),
            ("beat.stops", 120.0, self._beat_off, self._nothing),
        ):
            if kind not in self.rates:
                continue
            at = random.uniform(0.0, 3600.0)
            while at < until:
                lasts = min(random.expovariate(1 / mean), 3 * 3600.0)
                self.kernel.at(at, self._window, kind, lasts, begin, end)
                at += lasts + random.uniform(900.0, 7200.0)

    def _window(self, kind: str, lasts: float, begin: Any, end: Any) -> None:
        if self._healed:
            return
        self.kernel.note("-", f"{kind} for {lasts:.0f} s")
        self.outcome.counts[f"fault {kind}"] += 1
        self.checker.fault(lasts + 2 * 75.0)
        begin(lasts)
        self.kernel.after(lasts, end)

    def _nothing(self) -> None:
        pass

    def _market_off(self, lasts: float) -> None:
        self.market.down = True

    def _market_on(self) -> None:
        self.market.down = False

    def _credit_off(self, lasts: float) -> None:
        self.market.credit = -(10**12)
        for instance_id in self.market.stop_all():
            agent = self.agents.get(instance_id)
            if agent is not None:
                agent.die()

    def _credit_on(self) -> None:
        self.market.credit = 10**12

    def _receiver_off(self, lasts: float) -> None:
        self.server.down = True

    def _receiver_on(self) -> None:
        self.server.down = False
        self.server.listens_since = self.kernel.t

    def _clock_off(self, lasts: float) -> None:
        self.server.skew = self.kernel.random.choice((-400.0, -30.0, 30.0, 400.0))

    def _clock_on(self) -> None:
        self.server.skew = 0.0

    def _beat_off(self, lasts: float) -> None:
        self._beat_stops_until = self.kernel.t + lasts

    def _heal(self) -> None:
        """All faults end; from now on everything must come to its end."""
        self.kernel.note("-", "healed")
        self._healed = True
        self.rates.clear()
        self.bad.clear()
        self._market_on()
        self._credit_on()
        if self.server.down:
            self._receiver_on()
        self._clock_on()
        self._beat_stops_until = 0.0
        self._beat_at = math.inf
        self.customers.heal()
        self.checker.healed_at = self.kernel.t
        self._look()

    def _look(self) -> None:
        self.checker.look()
        if any(life.ended_at is None for life in self.checker.lives.values()) or self.market.ours(
            f"{DEPLOYMENT}/"
        ):
            self.kernel.after(LOOK_S, self._look)

    # --- figures

    def job_ended(self, job: Job) -> None:
        out = self.outcome
        self._jobs_open -= 1
        out.statuses[str(job.status)] += 1
        out.attempts[job.attempt] += 1
        if job.status is Status.COMPLETED:
            out.attempts_completed[job.attempt] += 1
        if job.started_at is not None:
            out.to_training.append((job.started_at - job.created_at).total_seconds())

    def _orphaned(self, leases: Sequence[Lease]) -> int:
        """What orphans with the labels of these leases cost, micro-USD."""
        with self.store.transaction() as tx:
            found = [orphan for lease in leases for orphan in tx.orphans_labelled(lease.label)]
        return sum(money.orphaned(orphan, self.kernel.now()) for orphan in found)

    def _measure(self) -> None:
        out = self.outcome
        again: defaultdict[tuple[str, str], int] = defaultdict(int)
        for job_id, rentals in self.checker.of_job.items():
            leases = self.leases_of(job_id)
            receipt = sum(item.cost if item.billed is None else item.billed for item in leases)
            receipt += self._orphaned(leases)
            ledger = sum(self.market.cost(rental.id) for rental in rentals)
            out.cost_receipt += receipt
            out.cost_ledger += ledger
            out.worst_difference = max(out.worst_difference, abs(receipt - ledger))
            over = ledger - self.job(job_id).request.max_cost
            out.worst_over_cap = max(out.worst_over_cap, over)
            for rental in rentals:
                again[job_id, rental.offer.machine_id] += 1
        twice = [machine for (_, machine), count in again.items() if count > 1]
        out.counts["machines rented twice for a job"] = len(twice)
        out.counts["bad machines rented twice for a job"] = len(self._always_bad & set(twice))
        out.counts["instances"] = sum(again.values())
        out.counts["webhooks sent"] = self.customers.posts
        out.counts["webhooks received twice"] = self.customers.duplicates
        for row in self.store._data.outgoing.values():
            if row.status is not OutgoingStatus.DELIVERED:
                out.counts[f"webhooks {row.status}"] += 1
        out.counts["webhooks owed"] = len(self.store._data.outgoing)
        out.counts["reports taken"] = self.server.taken
        out.counts["reports again"] = self.server.known_twice
        out.counts["reports refused"] = self.server.refused
        out.orphan_s = self.checker.orphan_s


def _rates(cohort: Cohort, random: Random) -> Rates:
    rates = swarm(cohort.profile, random)
    if cohort.kinds is None:
        return rates
    return {kind: rate for kind, rate in rates.items() if kind in cohort.kinds}


def _where(error: Exception) -> list[str]:
    """The functions of ours, outermost first, in which it came to light."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = ("/tasks/", "/state/", "/infra/")
    return [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
        for frame in frames
        if any(room in frame.filename for room in rooms)
    ][-12:]


def _trace_of(lines: Sequence[str], job: str) -> list[str]:
    """The lines that tell of `job`, and of everybody."""
    return [line for line in lines if job in ("", "-") or f" {job} " in line or " - " in line]
