"""The trainer as a process.

::

    python -m gpu_agent.lora --job job.json

stdout carries one JSON object per line and nothing else::

    {"event": "started", "total": 200, "loss_first": 1.02, "parameters": …, "images": 5,
     "buckets": {"64x64": 5}, "label": "train-eval", "step": 0, "resume_refused": null, …}
    {"event": "progress", "step": 31, "total": 200, "loss": …, "lr": …, "steps_per_s": …,
     "eta_s": …, "points": [[step, loss, lr], …]}
    {"event": "alive", "phase": "caching", "done": 3, "total": 20}
    {"event": "validation", "step": 50, "loss": …, "stderr": …}
    {"event": "checkpoint", "step": 50, "path": …, "best": true}
    {"event": "sample", "step": 200, "path": …, "prompt": …}
    {"event": "completed", "files": [{"name", "path"}], "loss_first", "loss_best", "best_step",
     "label"}
    {"event": "error", "code": "dataset.image", "message": …, "retryable": false}

stdin takes orders: ``{"order": "checkpoint_now" | "sample_now" | "stop"}``, one per line.

`alive` comes where no steps are done: `loading`, `caching`, `encoding`, `validating`, `sampling`,
`saving`, and `training` inside a step of several passes.

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
from pathlib import Path

from gpu_agent.lora.errors import TrainerError, TrainingError
from gpu_agent.lora.hush import hush_libraries
from gpu_agent.lora.job import Job
from gpu_agent.lora.talk import Events, JsonLines, Orders, Pulse, mebibytes_touched

#: sysexits.h calls it EX_TEMPFAIL: come back later, nothing is lost.
STOPPED = 75


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_agent.lora")
    parser.add_argument("--job", type=Path, required=True)
    asked = parser.parse_args(arguments)
    orders = Orders()
    # an agent that is gone can neither report nor upload: save and leave, as it would have ordered
    events = JsonLines.take_stdout(gone=lambda: orders.note("stop"))
    orders.obey_sigterm()
    if sys.stdin is not None:
        orders.listen(sys.stdin.buffer)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    try:
        return 0 if _train(asked.job, events, orders) else STOPPED
    except TrainerError as error:
        return _fail(events, error)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the agent must be told
        traceback.print_exc()
        return _fail(events, _translate(error))


def _train(job_file: Path, events: Events, orders: Orders) -> bool:
    hush_libraries()
    from gpu_agent.lora import plan

    planned = plan.make(Job.read(job_file))
    if orders.stop:
        return False
    # torch and diffusers take seconds, on a slow disk many; a bad job never gets here
    with Pulse(events, orders).watched("loading", mebibytes_touched):
        from gpu_agent.lora import session

    return session.train(planned, events, orders)


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
