"""Uploads while the training goes on: checkpoints to resume from, samples to look at."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.push import Files, Stored, Upload
from gpu_agent.wire import Fact

log = logging.getLogger(__name__)

Report = Callable[[Fact, Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Parcel:
    """A file, or a checkpoint's folder, and what is to be reported when it is in storage."""

    fact: Fact
    path: Path
    said: Mapping[str, Any]


class Courier:
    """One thread, one upload after the other. Of waiting checkpoints only the newest is taken.

    A parcel that cannot be delivered is logged and left: the training is worth more.
    """

    def __init__(self, files: Callable[[], Files], *, report: Report, halt: Halt) -> None:
        self._files, self._report, self._halt = files, report, halt
        self._parcels: deque[_Parcel] = deque()
        self._change = threading.Condition()
        self._busy = False
        self._samples: list[Stored] = []
        self._thread: threading.Thread | None = None

    def checkpoint(self, folder: Path, said: Mapping[str, Any]) -> None:
        """Upload all files of `folder`, then report `training.checkpoint`."""
        self._add(_Parcel(Fact.TRAINING_CHECKPOINT, folder, said))

    def sample(self, path: Path, said: Mapping[str, Any]) -> None:
        """Upload an image, then report `training.sample`."""
        self._add(_Parcel(Fact.TRAINING_SAMPLE, path, said))

    def finish(self) -> list[Stored]:
        """Deliver the samples that wait, drop the checkpoints; all samples that were stored.

        Raises:
            Halted: the work was told to end.
        """
        with self._change:
            self._drop_checkpoints()
            while self._parcels or self._busy:
                self._change.wait(0.2)
                self._halt.check()
            return list(self._samples)

    def _add(self, parcel: _Parcel) -> None:
        with self._change:
            if parcel.fact is Fact.TRAINING_CHECKPOINT:
                self._drop_checkpoints()
            self._parcels.append(parcel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _drop_checkpoints(self) -> None:
        waiting = [item for item in self._parcels if item.fact is not Fact.TRAINING_CHECKPOINT]
        self._parcels = deque(waiting)

    def _run(self) -> None:
        files = self._files()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._parcels)
                parcel, self._busy = self._parcels.popleft(), True
            try:
                self._deliver(files, parcel)
            except Halted:
                return
            except (Fault, OSError) as error:
                log.warning("%s is not uploaded: %s", parcel.path.name, error)
            finally:
                with self._change:
                    self._busy = False
                    self._change.notify_all()

    def _deliver(self, files: Files, parcel: _Parcel) -> None:
        if parcel.fact is Fact.TRAINING_SAMPLE:
            stored = files.upload(Upload(name=f"samples/{parcel.path.name}", path=parcel.path))
            self._samples.append(stored)
            self._report(parcel.fact, {**parcel.said, **stored.to_dict()})
            return
        # a name of its own for every try: storage never overwrites
        folder = f"checkpoints/{parcel.said.get('step', 0)}-{secrets.token_hex(3)}"
        paths = sorted(
            item for item in parcel.path.rglob("*") if item.is_file() and item.stat().st_size
        )
        names = [f"{folder}/{path.relative_to(parcel.path).as_posix()}" for path in paths]
        done = [
            files.upload(Upload(name=name, path=path))
            for name, path in zip(names, paths, strict=True)
        ]
        self._report(parcel.fact, {**parcel.said, "files": [item.to_dict() for item in done]})
