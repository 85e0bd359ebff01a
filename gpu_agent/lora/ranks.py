"""Several GPUs: a process for each, which share out the images of every step.

The process that the agent started is the first. It starts the others, in its own process group,
and they do the same job with it by `accelerate`, on one machine and without a port: they meet at a
file. The first one alone talks to the agent. Of what the others say it passes on an error, which is
the whole trainer's. They hear no orders, not even SIGTERM, because the first must have their help
until it has saved; they end when it does, however it does.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from gpu_agent.lora.errors import TrainingError

#: How long the others wait for the first, which may validate, paint and save: they end with it.
_WAIT = timedelta(days=7)
#: How long a failure of the first waits for a word from the others, whose failure may be its cause.
_WORD_S = 5.0


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is, from 0, and the file where they meet."""

    number: int
    count: int
    meeting: Path

    def join(self, backend: str) -> None:
        """Wait for the others. `accelerate` finds itself in company from then on."""
        from torch import distributed

        # what `accelerate launch` would have set
        os.environ.update(
            RANK=str(self.number),
            LOCAL_RANK=str(self.number),
            WORLD_SIZE=str(self.count),
            LOCAL_WORLD_SIZE=str(self.count),
        )
        if backend == "nccl":
            from accelerate.utils import check_cuda_p2p_ib_support

            if not check_cuda_p2p_ib_support():
                os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
        else:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            if sys.platform == "linux":
                # the name of a rented machine need not have an address
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            backend,
            init_method=self.meeting.absolute().as_uri(),
            rank=self.number,
            world_size=self.count,
            timeout=_WAIT,
        )


class Others:
    """The processes besides the first, as it sees them.

    Args:
        arguments: of the trainer.
        on_failure: called once, with the first error that any of them met.
    """

    def __init__(
        self,
        arguments: list[str],
        count: int,
        folder: Path,
        on_failure: Callable[[TrainingError], None],
    ) -> None:
        # never the name of an earlier attempt, whose file would be met at
        meeting = folder / f"meeting-{secrets.token_hex(4)}"
        self.rank = Rank(0, count, meeting)
        self._on_failure = on_failure
        self._failed = threading.Lock()
        self._words = [self._start(arguments, number) for number in range(1, count)]

    def _start(self, arguments: list[str], number: int) -> threading.Thread:
        place = ["--rank", str(number), "--meeting", str(self.rank.meeting)]
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_agent.lora", *arguments, *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        name = f"rank-{number}"
        watcher = threading.Thread(target=self._watch, args=(process, name), name=name, daemon=True)
        watcher.start()
        return watcher

    def _watch(self, process: subprocess.Popen[bytes], name: str) -> None:
        error = None
        for line in process.stdout or ():
            event = json.loads(line)
            if event["event"] == "error":
                error = TrainingError(event["code"], event["message"], retryable=event["retryable"])
        status = process.wait()
        if status != 0 and self._failed.acquire(blocking=False):
            told = TrainingError("trainer.internal", f"{name} ended with {status}", retryable=True)
            self._on_failure(error or told)

    def hear(self) -> None:
        """Give those that failed the time to say so."""
        for watcher in self._words:
            watcher.join(_WORD_S)


def follow_to_the_end(stdin: IO[bytes]) -> None:
    """For all but the first: end as soon as it does, and not before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        stdin.read()
        os._exit(1)

    threading.Thread(target=wait, name="leader", daemon=True).start()


def share(accelerator: Any, value: Any) -> Any:
    """The value of the first process, in all."""
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]
