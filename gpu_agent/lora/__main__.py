"""The trainer as a process.

::

    python -m gpu_agent.lora --job job.json [--processes 2]

stdout carries one JSON object per line and nothing else::

    {"event": "started", "total": 200, "loss_first": 1.02, "parameters": …, "images": 5,
     "buckets": {"64x64": 5}, "label": "train-eval", "step": 0, "resume_refused": null,
     "processes": 1, "regularization": 0, "warnings": ["no caption, so called …: a.jpg"], …}
    {"event": "progress", "step": 31, "total": 200, "loss": …, "lr": …, "gradient_norm": …,
     "steps_per_s": …, "memory_mib": …, "eta_s": …,
     "points": [[step, loss, lr, gradient_norm], …, {"step", "steps_per_s", "memory_mib"}]}
    {"event": "alive", "phase": "caching", "done": 3, "total": 20}
    {"event": "validation", "step": 50, "loss": …, "stderr": …,
     "levels": [[level, loss, stderr], …]}
    {"event": "checkpoint", "step": 50, "path": …, "best": true}
    {"event": "sample", "step": 200, "path": …, "prompt": …, "seed": 0}
    {"event": "completed", "files": [{"name", "path"}], "loss_first", "loss_best", "best_step",
     "steps": 200, "ended": "steps" or "patience", "label"}
    {"event": "error", "code": "dataset.image", "message": …, "retryable": false}

`memory_mib` is the most that was in use so far, of the GPU's memory or of the process's. `best` of
a checkpoint is what is known by then; `best_step` is the choice. What the losses are: `evaluate`.

stdin takes orders: ``{"order": "checkpoint_now" | "sample_now" | "stop"}``, one per line.

`alive` comes where no steps are done: `loading`, `prior`, `caching`, `encoding`, `validating`,
`sampling`, `saving`, and `training` inside a step of several passes.

With several processes, one for each GPU, see `ranks`; the images of a step are shared out, so there
are never more of them than images in a step.

The exit status is 0 after `completed`; 75 after an ordered stop or SIGTERM (from the first step on
a checkpoint has been written); 1 after `error`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from gpu_agent.lora import ranks
from gpu_agent.lora.errors import TrainerError, TrainingError
from gpu_agent.lora.hush import hush_libraries, leave_out
from gpu_agent.lora.job import Job
from gpu_agent.lora.talk import Events, JsonLines, Orders, Pulse, mebibytes_touched

#: sysexits.h calls it EX_TEMPFAIL: come back later, nothing is lost.
STOPPED = 75


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_agent.lora")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    orders = Orders()
    # an agent that is gone can neither report nor upload: save and leave, as it would have ordered
    events = JsonLines.take_stdout(gone=lambda: orders.note("stop"))
    if asked.rank:
        ranks.follow_to_the_end(sys.stdin.buffer)
    else:
        orders.obey_sigterm()
        if sys.stdin is not None:
            orders.listen(sys.stdin.buffer)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    try:
        return 0 if _train(asked, events, orders) else STOPPED
    except TrainerError as error:
        return _fail(events, error)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the agent must be told
        traceback.print_exc()
        return _fail(events, _translate(error))


def _train(asked: argparse.Namespace, events: Events, orders: Orders) -> bool:
    hush_libraries()
    leave_out()
    from gpu_agent.lora import plan

    planned = plan.make(Job.read(asked.job))
    if orders.stop:
        return False
    recipe = planned.job.recipe
    count = min(asked.processes, recipe.batch_size * recipe.gradient_accumulation)
    rank, others = None, None
    if asked.rank:
        rank = ranks.Rank(asked.rank, count, asked.meeting)
        apart = planned.job.work_dir / f"rank-{asked.rank}"
        planned = replace(planned, job=replace(planned.job, work_dir=apart))
    elif count > 1:

        def fail(error: TrainerError) -> None:
            os._exit(_fail(events, error))

        again = ["--job", str(asked.job), "--processes", str(count)]
        others = ranks.Others(again, count, planned.job.work_dir, fail)
        rank = others.rank
    # torch and diffusers take seconds, on a slow disk many; a bad job never gets here
    with Pulse(events, orders).watched("loading", mebibytes_touched):
        from gpu_agent.lora import session
    try:
        return session.train(planned, events, orders, rank)
    except TrainerError:
        raise
    except Exception:
        if others is not None:
            others.hear()
        raise


def _translate(error: Exception) -> TrainerError:
    """What a library raised, in the customer's words."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return TrainingError(
            "trainer.oom",
            "the machine's memory is not enough; a smaller batch_size or resolution may help",
            retryable=True,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return TrainingError("host.disk_full", "the machine's disk is full", retryable=True)
    return TrainingError("trainer.internal", f"{type(error).__name__}: {error}", retryable=True)


def _fail(events: Events, error: TrainerError) -> int:
    events.emit("error", code=error.code, message=str(error), retryable=error.retryable)
    return 1


if __name__ == "__main__":
    # not sys.exit: daemon threads and torch's own clean-up have nothing left to do for us
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
