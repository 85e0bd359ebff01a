"""The order of steps on a rented machine, from the first hello to giving the machine back.

hello → look at the GPU → zip, model and requirements at the same time → trainer → uploads →
everything acknowledged → the instance destroys itself. Whatever goes wrong on the way ends in an
`error` report and the same last step; whatever is told from outside (an order, a signal, the end
of the lease) goes through `Halt` and reaches every phase within seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_agent import hello, report
from gpu_agent.clock import Clock
from gpu_agent.deadman import DeadMan, Instance, Promise
from gpu_agent.gpu import Gauge, machine
from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.hello import GiveUp, introduce
from gpu_agent.journal import Journal
from gpu_agent.methods import Method
from gpu_agent.methods.lora import Lora
from gpu_agent.moved import Moved
from gpu_agent.pull import disk_faults
from gpu_agent.push import Files
from gpu_agent.report import Reporter, Spool
from gpu_agent.wire import Fact, JobSpec, Order
from gpu_agent.work import Patience, Work

log = logging.getLogger(__name__)

METHODS: Mapping[str, Callable[[], Method]] = {"lora": Lora}
#: The reason to end that is still reported: the host takes the machine away.
TERMINATED = "terminated"
#: How long a terminated agent tries to say so (seconds).
LAST_WORDS_S = 2.5


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What the machine was started with. `home` is the agent's own folder, kept over restarts;
    `promise` is where the start script looks how long the agent may take."""

    url: str
    token: str = field(repr=False)
    home: Path
    instance: Instance | None = None
    promise: Path | None = None


class Agent:
    """One attempt of one job on this machine.

    Args:
        journal: where the log's last lines are found.
        methods: training methods by name.
        delays, hello_delays, patience: how long is waited, for tests to shorten.
    """

    def __init__(
        self,
        charge: Charge,
        *,
        halt: Halt,
        clock: Clock,
        journal: Journal,
        methods: Mapping[str, Callable[[], Method]] = METHODS,
        delays: Sequence[float] = report.DELAYS,
        hello_delays: Sequence[float] = hello.DELAYS,
        patience: Patience | None = None,
    ) -> None:
        self._charge, self._halt, self._clock, self._journal = charge, halt, clock, journal
        self._methods, self._patience = methods, patience or Patience()
        self._delays, self._hello_delays = delays, hello_delays
        self._moved = Moved(charge.home / "moved")
        self._deadman = DeadMan(
            charge.instance,
            clock=clock,
            on_end=halt.call,
            promise=Promise(charge.promise) if charge.promise else None,
        )
        self._gauge = Gauge(halt)
        self._work: Work | None = None

    def run(self) -> int:
        """Do the job and give the machine back; 0 when the weights were delivered."""
        self._deadman.start()
        try:
            done = self._live()
        except (GiveUp, Halted) as error:
            log.error("no job for this machine: %s", error)
            done = False
        finally:
            self._halt.call("finished")
            self._deadman.destroy()
        return 0 if done else 1

    def terminate(self) -> None:
        """The machine is about to be taken away: save what can be saved, say so, and end."""
        work = self._work
        if work is None or work.phase not in ("training", "uploading", "done"):
            self._halt.call(TERMINATED)
            return
        self._halt.warn(TERMINATED, self._patience.grace_s)
        work.obey(Order.STOP)

    def _live(self) -> bool:
        """Raises: GiveUp, Halted."""
        charge = self._charge
        spec = introduce(
            charge.url,
            charge.token,
            charge.home,
            machine=machine(charge.home),
            clock=self._clock,
            halt=self._halt,
            delays=self._hello_delays,
        )
        self._deadman.heard()
        self._deadman.limit(lease_ends_at=spec.lease_ends_at, silence_limit_s=spec.silence_limit_s)
        reporter = self._reporter(spec)
        reporter.start()
        self._gauge.start()
        try:
            return self._attempt(spec, reporter)
        finally:
            reporter.close()

    def _reporter(self, spec: JobSpec) -> Reporter:
        return Reporter(
            spec,
            Spool(self._charge.home / "spool.db"),
            clock=self._clock,
            halt=self._halt,
            on_order=self._obey,
            on_heard=self._deadman.heard,
            status=self._status,
            moved=self._moved.read,
            log_lines=self._journal.take,
            delays=self._delays,
        )

    def _status(self) -> dict[str, Any]:
        """What a heartbeat says."""
        about = self._work.status if self._work else {"phase": "starting"}
        return {**about, "gpu": self._gauge.read}

    def _attempt(self, spec: JobSpec, reporter: Reporter) -> bool:
        """Whether the job was done. Whatever ended it was reported when this returns."""
        try:
            with disk_faults():
                self._do(spec, reporter)
            self._flush(reporter)
            # asked of the fact itself: a later report may be told that all is over by now
            return Fact.WEIGHTS_UPLOADED in reporter.taken
        except Halted:
            log.warning("the work ends: %s", self._halt.reason)
            if self._halt.reason == TERMINATED:
                self._tell(
                    reporter,
                    Fault("agent.terminated", "the machine is shut down", retryable=True),
                )
                reporter.flush(LAST_WORDS_S)
            return False
        except Fault as error:
            fault = error
        except Exception as error:
            log.exception("the agent itself failed")
            fault = Fault("agent.crashed", f"{type(error).__name__}", retryable=True)
        log.error("%s: %s", fault.code, fault.message)
        self._tell(reporter, fault)
        self._flush(reporter)
        return False

    def _do(self, spec: JobSpec, reporter: Reporter) -> None:
        make = self._methods.get(spec.method)
        if make is None:
            raise Fault("job.invalid", f"this agent has no method {spec.method!r}", retryable=False)
        self._work = Work(
            spec,
            self._charge.home,
            make(),
            report=reporter.put,
            halt=self._halt,
            moved=self._moved.add,
            files=lambda: Files(
                spec,
                clock=self._clock,
                halt=self._halt,
                on_heard=self._deadman.heard,
                moved=self._moved.add,
                delays=self._patience.file_delays,
            ),
            log_tail=self._journal.tail,
            patience=self._patience,
        )
        self._work.do()

    def _tell(self, reporter: Reporter, fault: Fault) -> None:
        data = {"code": fault.code, "message": fault.message, "retryable": fault.retryable}
        reporter.put(Fact.ERROR, {**data, "log_tail": self._journal.tail()})

    def _flush(self, reporter: Reporter) -> None:
        """Wait until the server has everything, or the work is told to end."""
        while not reporter.flush(0.5) and not self._halt.wait(0):
            pass

    def _obey(self, order: Order) -> None:
        if order in (Order.CANCEL, Order.STOP):
            self._halt.call(str(order))
        elif self._work is not None:
            self._work.obey(order)
