"""Uploads while the training goes on: checkpoints to resume from, samples to look at."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.push import Files, Stored, Upload
from gpu_agent.wire import Fact

log = logging.getLogger(__name__)

#: What a checkpoint's last file is called: once it is in storage, the checkpoint is whole.
MANIFEST = "manifest.json"

Report = Callable[[Fact, Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Parcel:
    """A file, or a checkpoint's own folder, and what is reported when it is in storage."""

    fact: Fact
    path: Path
    said: Mapping[str, Any]


class Courier:
    """One thread, one upload after the other. Of waiting checkpoints only the newest is taken.

    A parcel that cannot be delivered is logged and left: the training is worth more.

    Args:
        outbox: a folder of its own on the trainer's disk.
        about: what a manifest says of its origin: `job` and `attempt`.
    """

    def __init__(
        self,
        files: Callable[[], Files],
        outbox: Path,
        *,
        about: Mapping[str, Any],
        report: Report,
        halt: Halt,
    ) -> None:
        self._files, self._outbox, self._about = files, outbox, about
        self._report, self._halt = report, halt
        shutil.rmtree(outbox, ignore_errors=True)
        self._parcels: deque[_Parcel] = deque()
        self._change = threading.Condition()
        self._busy = False
        self._samples: list[Stored] = []
        self._thread: threading.Thread | None = None

    def checkpoint(self, folder: Path, said: Mapping[str, Any]) -> None:
        """Upload all files of `folder`, then a manifest, then report `training.checkpoint`.

        The files are those of now: what the trainer deletes later stays here under another name.
        """
        # a name of its own for every checkpoint: storage never overwrites
        kept = self._outbox / f"{said.get('step', 0)}-{secrets.token_hex(3)}"
        try:
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink() and path.stat().st_size:
                    _link(path, kept / path.relative_to(folder))
        except OSError as error:
            log.warning("%s is not uploaded: %s", folder.name, error)
            return
        self._add(_Parcel(Fact.TRAINING_CHECKPOINT, kept, said))

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
        self.settle()
        return list(self._samples)

    def settle(self, seconds: float = math.inf) -> None:
        """Wait until all is delivered, but no longer than this.

        Raises:
            Halted: the work was told to end.
        """
        deadline = time.monotonic() + seconds
        with self._change:
            while (self._parcels or self._busy) and time.monotonic() < deadline:
                self._change.wait(0.1)
                self._halt.check()

    def _add(self, parcel: _Parcel) -> None:
        with self._change:
            if parcel.fact is Fact.TRAINING_CHECKPOINT:
                self._drop_checkpoints()
                self._parcels.appendleft(parcel)  # worth more than any sample
            else:
                self._parcels.append(parcel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _drop_checkpoints(self) -> None:
        for item in [*self._parcels]:
            if item.fact is Fact.TRAINING_CHECKPOINT:
                self._parcels.remove(item)
                shutil.rmtree(item.path, ignore_errors=True)

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
        try:
            self._deliver_checkpoint(files, parcel)
        finally:
            shutil.rmtree(parcel.path, ignore_errors=True)

    def _deliver_checkpoint(self, files: Files, parcel: _Parcel) -> None:
        folder, prefix = parcel.path, f"checkpoints/{parcel.path.name}/"
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        done = [
            files.upload(Upload(name=prefix + path.relative_to(folder).as_posix(), path=path))
            for path in paths
        ]
        manifest = {
            **self._about,
            "step": parcel.said.get("step"),
            "files": [{**item.to_dict(), "name": item.name.removeprefix(prefix)} for item in done],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))
        done.append(files.upload(Upload(name=prefix + MANIFEST, path=folder / MANIFEST)))
        self._report(parcel.fact, {**parcel.said, "files": [item.to_dict() for item in done]})


def _link(path: Path, goal: Path) -> None:
    """The same file under a second name; a copy where the disk knows no second names."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, goal)
    except OSError:
        shutil.copyfile(path, goal)
