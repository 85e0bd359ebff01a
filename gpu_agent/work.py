"""The job itself: GPU, files, trainer, uploads. Raises what ends it; reports what it reaches."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_agent import pull
from gpu_agent.courier import MANIFEST, Courier
from gpu_agent.gpu import probe
from gpu_agent.halt import Fault, Halt
from gpu_agent.methods import Method, Paths
from gpu_agent.methods.process import Trainer
from gpu_agent.methods.requirements import install
from gpu_agent.push import Files, Gone, Upload
from gpu_agent.wire import Download, Fact, JobSpec, Order

log = logging.getLogger(__name__)
#: What the trainer (or pip) says goes here.
spoken = logging.getLogger("gpu_agent.trainer")

#: How a trainer ends that was told to stop and saved its state.
STOPPED = 75
#: The first file of a base that is a folder.
FOLDER_INDEXES = frozenset({"model_index.json", "modular_model_index.json"})
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_ABOUT = ("loss_first", "loss_best", "best_step", "label", "steps", "ended")

Report = Callable[[Fact, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is waited (seconds)."""

    #: Between tries of a download or an upload that bring nothing; then it is a fault.
    file_delays: Sequence[float] = pull.DELAYS
    #: From SIGTERM to SIGKILL, for a trainer that is not needed any more.
    stop_grace_s: float = 3.0
    #: For the last checkpoint to be uploaded after a trainer failed.
    salvage_s: float = 60.0
    #: For saving and uploading on a machine that is taken away. Containers get 10 s by custom, of
    #: which the last words take some.
    grace_s: float = 6.5
    #: Between looks at what else there is.
    tick_s: float = 0.1


class Side:
    """Work on a thread beside the main one; puts itself into `ended` when it is over."""

    def __init__(self, name: str, work: Callable[[], Any], ended: queue.SimpleQueue[Side]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._work, self._ended = work, ended
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # noqa: BLE001 -- raised again by whoever waits
            self.error = error
        self._ended.put(self)


class Work:
    """One attempt, from `gpu.ready` to `weights.uploaded`.

    Args:
        home: a folder for everything; what an earlier run of the agent left there is used.
        moved: called with a number whenever something went forward.
        files: makes a `Files`; each thread takes one of its own.
        log_tail: the last lines of the log, the trainer's among them.
    """

    def __init__(
        self,
        spec: JobSpec,
        home: Path,
        method: Method,
        *,
        report: Report,
        halt: Halt,
        moved: Callable[[int], None],
        files: Callable[[], Files],
        log_tail: Callable[[], list[str]],
        patience: Patience,
    ) -> None:
        self._log_tail = log_tail
        self._spec, self._home, self._method = spec, home, method
        self._report, self._halt, self._files = report, halt, files
        self._moved, self._patience = moved, patience
        self._line = pull.Line(
            least=spec.min_download_mbps, most=_imitated_mbps(os.environ), moved=moved
        )
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._result: dict[str, Any] | None = None
        self._courier = Courier(
            files,
            home / "outbox",
            about={"job": spec.job, "attempt": spec.attempt},
            report=report,
            halt=halt,
        )
        self._refused: list[str] = []
        self._gpus = 0
        self._step = 0
        self._doing: dict[str, Any] = {}
        self.phase = "starting"

    @property
    def status(self) -> dict[str, Any]:
        """What a heartbeat says of the work."""
        return {"phase": self.phase, **self._doing}

    def obey(self, order: Order) -> None:
        """Pass an order to the trainer as soon as there is one. May be called by any thread."""
        self._orders.put(order)

    def do(self) -> None:
        """Do it all.

        Raises:
            Fault: it cannot go on.
            Halted: it was told to end.
        """
        about = probe(self._home)
        self._gpus = about.get("gpus") or 0
        log.info("this machine: %s", about)
        self._report(Fact.GPU_READY, about)
        paths = self._prepare()
        self._result = self._kept_result()
        if self._result is None:
            self._enter("training")
            self._train(paths)
        self._enter("uploading")
        self._report(Fact.WEIGHTS_UPLOADED, self._beside([("upload", self._upload)])[0])
        self._enter("done")

    def _enter(self, phase: str) -> None:
        log.info("%s", phase)
        self.phase, self._doing = phase, {}

    # --- files ---------------------------------------------------------------------------------

    def _prepare(self) -> Paths:
        """Everything that the trainer needs, all of it at the same time."""
        self._enter("preparing")
        spec, home = self._spec, self._home
        work, output = home / "work", home / "output"
        for folder in (work, output):
            folder.mkdir(exist_ok=True)
        resumed = sum(item.bytes for item in spec.resume)
        pull.check_space(
            home,
            2 * spec.dataset.bytes
            + sum(item.bytes for item in (spec.base, *spec.base_parts))
            + resumed,
        )
        images, base, resume, _ = self._beside(
            [
                ("images", self._pull_images),
                ("base", self._pull_base),
                ("resume", self._pull_resume),
                ("requirements", self._install),
            ]
        )
        return Paths(base=base, images=images, output=output, work=work, resume=resume)

    def _beside(self, works: Sequence[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """The results of `works`, done at the same time. The first that fails ends the wait."""
        ended: queue.SimpleQueue[Side] = queue.SimpleQueue()
        sides = [Side(name, work, ended) for name, work in works]
        for _ in sides:
            while True:
                try:
                    side = ended.get(timeout=self._patience.tick_s)
                    break
                except queue.Empty:
                    # not waited for: a thread may hang in a read for half a minute
                    self._halt.check()
            if side.error is not None:
                raise side.error
        return [side.result for side in sides]

    def _pull(
        self,
        what: str,
        download: Download,
        path: Path,
        mismatch: str,
        fact: Fact | None,
        *,
        before: int = 0,
        of: int | None = None,
    ) -> Path:
        """`before` bytes of `of` were pulled as other files of the same thing."""
        files = self._files()

        def progress(done: int, total: int) -> None:
            if fact is not None:
                self._report(fact, {"bytes": before + done, "bytes_total": of or total})

        path.parent.mkdir(parents=True, exist_ok=True)
        return pull.pull(
            download,
            path,
            fresh=lambda: files.fresh(what),
            halt=self._halt,
            progress=progress,
            mismatch=mismatch,
            line=self._line,
            moved=self._moved,
            delays=self._patience.file_delays,
        )

    def _pull_images(self) -> Path:
        images = self._home / "images"
        if images.exists():  # it appears only when it is whole
            self._report(Fact.IMAGES_READY, {})
            return images
        began = time.monotonic()
        archive = self._pull(
            "dataset",
            self._spec.dataset,
            self._home / "dataset.zip",
            "dataset.corrupt",
            Fact.IMAGES_PROGRESS,
        )
        count = pull.unpack(
            archive,
            images,
            halt=self._halt,
            progress=lambda done, total: self._report(
                Fact.IMAGES_PROGRESS, {"files": done, "files_total": total}
            ),
            moved=self._moved,
        )
        archive.unlink()
        size = self._spec.dataset.bytes
        self._report(Fact.IMAGES_READY, {"images": count, "bytes": size, **self._speed(began)})
        return images

    def _speed(self, began: float) -> dict[str, Any]:
        """How long a file took, and how fast all downloads together were until then."""
        return {"seconds": round(time.monotonic() - began, 1), "mbps": self._line.mbps}

    def _pull_base(self) -> Path:
        """A single file, what it lacks beside it; or a folder."""
        main, parts = self._spec.base, self._spec.base_parts
        folder, began = self._home / "base", time.monotonic()
        paths = {"base": (main, folder / _base_name(main.name))}
        for part in parts:
            if not _NAME.fullmatch(part.name):
                raise Fault("model.unsafe", f"{part.name!r} is no name for a file", retryable=False)
            paths[f"base/{part.name}"] = (part, folder / part.name)
        total, done, tensors = sum(item.bytes for item in (main, *parts)), 0, 0
        for what, (download, path) in paths.items():
            self._pull(
                what, download, path, "model.checksum", Fact.MODEL_PROGRESS, before=done, of=total
            )
            if path.suffix == ".safetensors":
                tensors += pull.check_safetensors(path)
            done += path.stat().st_size
        self._report(Fact.MODEL_READY, {"bytes": done, "tensors": tensors, **self._speed(began)})
        return folder if main.name in FOLDER_INDEXES else folder / _base_name(main.name)

    def _pull_resume(self) -> Path | None:
        """A folder of checkpoints: this machine's own after a restart, else the spec's.

        One that cannot be had whole is left out: that costs its steps, not the job.
        """
        kept = self._home / "checkpoint"
        if kept.exists() and (own := Path(kept.read_text())).is_dir():
            return own.parent
        folder = self._home / "resume"
        offered = [item.name.split("/")[1] for item in self._spec.resume if "/" in item.name]
        for name in dict.fromkeys(offered):
            try:
                self._pull_checkpoint(folder, name)
            except Fault as fault:
                if fault.code != "checkpoint.corrupt" and not isinstance(fault, Gone):
                    raise
                shutil.rmtree(folder / name, ignore_errors=True)
                log.warning("checkpoint %s is not used: %s", name, fault.message)
                self._refused.append(f"{name}: {fault.message}")
        return folder if folder.is_dir() and any(folder.iterdir()) else None

    def _pull_checkpoint(self, folder: Path, name: str) -> None:
        """Raises: Fault `checkpoint.corrupt`, `Gone`, and as `pull.pull`."""
        prefix = f"checkpoints/{name}/"
        items = [item for item in self._spec.resume if item.name.startswith(prefix)]
        for item in items:
            if not _NAME.fullmatch(item.name):
                raise _corrupt(f"{item.name!r} is no name for a file")
            path = folder / item.name.removeprefix("checkpoints/")
            self._pull(item.name, item, path, "checkpoint.corrupt", None)
        try:
            manifest = json.loads((folder / name / MANIFEST).read_bytes())
            promised = {(file["name"], file["sha256"]) for file in manifest["files"]}
            origin = manifest["job"], str(manifest["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _corrupt(f"its manifest cannot be read: {error!r}") from None
        got = {(item.name.removeprefix(prefix), item.sha256) for item in items}
        if {file for file in got if file[0] != MANIFEST} != promised:
            raise _corrupt("its manifest lists other files")
        if origin != (self._spec.job, name.partition("-")[0]):
            raise _corrupt("its manifest is of another job or step")

    def _install(self) -> None:
        install(
            self._method.requirements,
            work=self._home / "work",
            halt=self._halt,
            on_text=lambda line: spoken.info("%s", line),
            moved=self._moved,
        )

    # --- training ------------------------------------------------------------------------------

    def _train(self, paths: Paths) -> None:
        launch = self._method.launch(self._spec, paths, self._gpus)
        self._report(
            Fact.FILES_POSITIONED,
            {"resumed": paths.resume is not None, "refused": self._refused},
        )
        trainer = Trainer(self._method, launch, cwd=paths.work, on_text=spoken.info)
        try:
            code = self._follow(trainer)
            if self._result is None or code != 0:
                raise _crash(code, self._log_tail())
        except Fault as fault:
            if fault.retryable:
                # what was saved last may still be on its way, and somebody will go on from it
                self._courier.settle(self._patience.salvage_s)
                if self._halt.warned:
                    self._halt.leave()
            raise
        finally:
            # who was warned had its time
            trainer.stop(0.0 if self._halt.warned else self._patience.stop_grace_s)
        (self._home / "result.json").write_text(json.dumps(self._result))
        self._report(Fact.TRAINING_COMPLETED, _about(self._result))

    def _follow(self, trainer: Trainer) -> int:
        """Take what the trainer says until it has ended; its exit code."""
        while True:
            self._halt.check()
            while not self._orders.empty():
                trainer.order(str(self._orders.get()))
            event = trainer.next(self._patience.tick_s)
            if event is not None:
                self._take(event)
            elif (code := trainer.exit_code) is not None:
                return code

    def _take(self, event: Mapping[str, Any]) -> None:
        """Turn one event into a fact. Whatever does not fit goes to the log."""
        said = {key: value for key, value in event.items() if key not in ("event", "path")}
        match event["event"]:
            case "started":
                self._report(Fact.TRAINING_STARTED, said)
            case "progress":
                self._forward(said.get("step"))
                self._report(Fact.TRAINING_PROGRESS, said)
            case "alive":
                self._doing = {"doing": said.get("phase"), **_counted(said)}
                self._moved(1)
            case "validation":
                self._report(Fact.TRAINING_PROGRESS, _validation(said))
            case "checkpoint" if (path := self._own(event.get("path"))) and path.is_dir():
                (self._home / "checkpoint").write_text(str(path))
                self._courier.checkpoint(path, said)
            case "sample" if (path := self._own(event.get("path"))) and path.is_file():
                self._courier.sample(path, said)
            case "completed":
                self._result = dict(event)
            case "error":
                raise Fault(
                    str(event.get("code") or "trainer.crashed")[:100],
                    str(event.get("message") or "the trainer failed")[:2000],
                    retryable=event.get("retryable") is not False,
                )
            case _:
                spoken.info("%s", json.dumps(event))

    def _forward(self, step: object) -> None:
        """Steps are progress, saying the same one again is not."""
        self._doing = {}
        if isinstance(step, int) and step > self._step:
            self._moved(step - self._step)
            self._step = step

    def _own(self, text: object) -> Path | None:
        """A path below the trainer's folders, or None."""
        if not isinstance(text, str) or "\x00" in text:
            return None
        path = Path(text).resolve()
        homes = ((self._home / name).resolve() for name in ("work", "output"))
        return path if any(path.is_relative_to(home) for home in homes) else None

    # --- uploads -------------------------------------------------------------------------------

    def _kept_result(self) -> dict[str, Any] | None:
        """What the trainer left before the agent was started again."""
        try:
            return dict(json.loads((self._home / "result.json").read_text()))
        except (OSError, ValueError):
            return None

    def _upload(self) -> dict[str, Any]:
        """What `weights.uploaded` says, once it is true."""
        result = self._result or {}
        files = self._files()
        # samples went up while training; the trainer's list may name them again
        stored = {item.name: item for item in self._courier.finish()}
        for item in self._uploads(result):
            if item.name not in stored:
                stored[item.name] = files.upload(item)
        if log_file := self._log_copy():
            try:
                stored[log_file.name] = files.upload(log_file)
            except Fault as fault:
                log.warning("the log is not uploaded: %s", fault.message)
        return {"files": [item.to_dict() for item in stored.values()], **_about(result)}

    def _uploads(self, result: Mapping[str, Any]) -> list[Upload]:
        """Raises: Fault, when the trainer's list is nonsense."""
        listed = result.get("files")
        uploads = []
        for item in listed if isinstance(listed, list) else []:
            name = item.get("name") if isinstance(item, dict) else None
            path = self._own(item.get("path")) if isinstance(item, dict) else None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise _no_result(f"{name!r} is no name for a file")
            if path is None or not path.is_file() or path.stat().st_size == 0:
                raise _no_result(f"{name} is not there")
            uploads.append(Upload(name=name, path=path))
        if not uploads:
            raise _no_result("it named no files")
        return uploads

    def _log_copy(self) -> Upload | None:
        """The log as it is now: it grows on while it is being uploaded."""
        source, copy = self._home / "agent.log", self._home / "training.log"
        if not source.exists() or not source.stat().st_size:
            return None
        shutil.copyfile(source, copy)
        return Upload(name="training.log", path=copy)


def _imitated_mbps(env: Mapping[str, str]) -> float:
    """How fast the line is that a sandbox's machine pretends to have; 0 on a real one."""
    return float(env.get("STOKER_SANDBOX_DOWNLOAD_MBPS", "0")) * (env.get("STOKER_SANDBOX") == "1")


def _no_result(why: str) -> Fault:
    return Fault("trainer.crashed", f"the trainer's result cannot be used: {why}", retryable=True)


def _about(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in _ABOUT if key in result}


def _validation(said: Mapping[str, Any]) -> dict[str, Any]:
    """A validation as progress: its latest values, and a point of the series."""
    keys = [key for key in ("loss", "stderr", "levels") if key in said]
    latest = {f"validation_{key}": said[key] for key in keys}
    return {**latest, "points": [{"step": said.get("step"), **latest}]}


def _counted(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in ("done", "total") if key in said}


def _corrupt(why: str) -> Fault:
    return Fault("checkpoint.corrupt", why, retryable=False)


def _crash(code: int, last_lines: Sequence[str]) -> Fault:
    """A trainer's end without a result."""
    said = "\n".join(last_lines).lower()
    if "out of memory" in said or "outofmemory" in said:
        return Fault("trainer.oom", "the trainer ran out of memory", retryable=True)
    if pull.NO_SPACE in said:
        return pull.disk_full()
    if code == -9:
        why = "was killed (signal 9); perhaps the machine ran out of memory"
    elif code < 0:
        why = f"was killed (signal {-code})"
    elif code == STOPPED:
        why = "stopped before it was done"
    elif code == 0:
        why = "ended without a result"
    else:
        why = f"ended with {code}"
    return Fault("trainer.crashed", f"the trainer {why}", retryable=True)


def _base_name(name: str) -> str:
    if name in FOLDER_INDEXES:
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:].lstrip(".") or "base"
    return plain.removesuffix(".safetensors") + ".safetensors"
