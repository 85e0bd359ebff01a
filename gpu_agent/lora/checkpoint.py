"""Stopping anywhere and going on as if nothing had happened.

A checkpoint is a folder that appears whole (written beside, synced, renamed)::

    step-00000200/
        lora.safetensors    the LoRA at this step, in diffusers naming: usable as it is; where the
                            recipe averages the weights, the average
        best.safetensors    the best LoRA so far, where that is another one
        state.pt            optimizer, gradient scaler, losses so far, the trained weights where
                            the LoRA is their average (no code in it)
        about.json          step, what it belongs to, validations, size and SHA-256 of each file

There is no random state and no place in the data's order in it, because nothing draws by history
(see `draws`): both follow from the step, as the learning rate does. So saving at any moment changes
nothing, and what goes on from here is what would have gone on.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gpu_agent.lora import choose
from gpu_agent.lora.choose import Validation

_log = logging.getLogger(__name__)

LORA = "lora.safetensors"
_STATE = "state.pt"
_ABOUT = "about.json"
_FORMAT = 3


#: What reading a broken checkpoint can raise.
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Belongs:
    """What a checkpoint can be continued with: the same recipe, pictures and base alone."""

    recipe: str
    dataset: str
    base: str


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        step: optimizer steps done.
        lora: tensors by their name in a diffusers LoRA file.
        state: optimizer, scaler, losses, what was painted, and the trained weights where `lora` is
            their average, as `torch.save` keeps them.
        validations: by step; 0 is the untrained model.
    """

    step: int
    lora: Mapping[str, Any]
    state: Mapping[str, Any]
    validations: Mapping[int, Validation]

    @property
    def best_step(self) -> int | None:
        """The trained step that would be kept if this were the end."""
        return choose.best_step(self.validations)


class Unusable(Exception):
    """A checkpoint cannot be continued; the text says why."""


class Checkpoints:
    """The checkpoints of one training, in a folder of their own."""

    def __init__(self, folder: Path, belongs: Belongs, keep: int) -> None:
        self._folder = folder
        self._belongs = belongs
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            shutil.rmtree(left)

    def clear(self) -> None:
        """Forget what an earlier training left in the same folder."""
        for folder in self._all():
            shutil.rmtree(folder)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, then drop those that are neither the last two nor among the best.

        One that cannot be written leaves nothing behind. Raises: OSError.
        """
        target = self._folder / _name(progress.step)
        part = target.with_name(target.name + ".part")
        try:
            self._write(progress, part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(target)
        part.replace(target)
        _sync([self._folder])
        self._rotate(progress)
        return target

    def _write(self, progress: Progress, part: Path) -> None:
        part.mkdir()
        # by way of memory: what the libraries raise of a full disk cannot be told from other faults
        (part / LORA).write_bytes(save(dict(progress.lora)))
        state = io.BytesIO()
        torch.save(dict(progress.state), state)
        (part / _STATE).write_bytes(state.getbuffer())
        for step in choose.candidates(progress.validations) - {progress.step}:
            shutil.copyfile(self._file_of(step), part / _carried(step))
        about = {
            "format": _FORMAT,
            "step": progress.step,
            **asdict(self._belongs),
            "validations": {str(step): asdict(seen) for step, seen in progress.validations.items()},
            "files": {file.name: _describe(file) for file in sorted(part.iterdir())},
        }
        (part / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        _sync([*part.iterdir(), part])

    def best_lora(self, progress: Progress) -> dict[str, Any]:
        """The tensors of the best step; the present ones where nothing was validated yet."""
        best = progress.best_step
        if best in {None, progress.step}:
            return dict(progress.lora)
        return load_file(self._file_of(best))

    def adopt(self, found: Path) -> Progress:
        """Go on from a checkpoint of an earlier attempt, whose best weights become ours.

        Later ones are forgotten: they could not be used.

        Raises:
            Unusable: it is broken, or of another training.
        """
        progress = _read(found, self._belongs)
        here = self._folder / _name(progress.step)
        if found.resolve() != here.resolve():
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(found, here)
        for folder in self._all():
            if folder.name > here.name:
                shutil.rmtree(folder)
        return progress

    def _file_of(self, step: int) -> Path:
        """The file with the LoRA of a step that may be the one to keep.

        It is that step's own checkpoint, or every checkpoint since then carries it.
        """
        own = self._folder / _name(step) / LORA
        if own.is_file():
            return own
        return self._all()[-1] / _carried(step)

    def _rotate(self, progress: Progress) -> None:
        folders = self._all()
        kept_loss = {
            step: seen.loss
            for step, seen in progress.validations.items()
            if self._folder / _name(step) in folders
        }
        best = sorted(kept_loss, key=lambda step: (kept_loss[step], step))[: self._keep]
        # of the last two, because the very last may turn out to be broken
        keep = {*(_name(step) for step in best), *(folder.name for folder in folders[-2:])}
        for folder in folders:
            if folder.name not in keep:
                shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-" + "[0-9]" * 8))


class Saver:
    """Writes checkpoints beside the training, one after the other.

    Args:
        on_saved: called on the writing thread with each checkpoint and its folder.
    """

    def __init__(
        self, checkpoints: Checkpoints, on_saved: Callable[[Progress, Path], None]
    ) -> None:
        self._checkpoints, self._on_saved = checkpoints, on_saved
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, progress: Progress) -> None:
        """Begin to write; first waits for the one before. Raises what that one met."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(progress,), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until all is on the disk. Raises what writing met, a full disk for instance."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, progress: Progress) -> None:
        try:
            self._on_saved(progress, self._checkpoints.save(progress))
        except Exception as error:  # noqa: BLE001 -- raised again by whoever waits
            self._error = error


def candidates(folder: Path) -> list[Path]:
    """The checkpoints at `folder`, which is one itself or holds several; the newest first."""
    if (folder / _ABOUT).is_file():
        return [folder]
    found = [file.parent for file in folder.glob(f"*/{_ABOUT}")]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    """The step of a checkpoint; one that does not even say that is older than all."""
    try:
        return int(json.loads((folder / _ABOUT).read_bytes())["step"])
    except _BROKEN:
        return -1


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read(folder: Path, belongs: Belongs) -> Progress:
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        if about["format"] != _FORMAT:
            raise Unusable(f"{folder.name} has format {about['format']}")
        for key, wanted in asdict(belongs).items():
            if about[key] != wanted:
                raise Unusable(f"{folder.name} was made with another {key}")
        for name, told in about["files"].items():
            if _describe(folder / name) != told:
                raise Unusable(f"{folder.name}/{name} is not what was written")
        step, state = int(about["step"]), torch.load(folder / _STATE, weights_only=True)
        if len(state["losses"]) != step:
            raise Unusable(f"{folder.name} says step {step}, its state {len(state['losses'])}")
        return Progress(
            step=step,
            lora=load_file(folder / LORA),
            state=state,
            validations={
                int(step): _validation(seen) for step, seen in about["validations"].items()
            },
        )
    except _BROKEN as error:
        raise Unusable(f"{folder.name} cannot be read: {error}") from error


def _validation(seen: Mapping[str, Any]) -> Validation:
    levels = tuple((level, loss, stderr) for level, loss, stderr in seen["levels"])
    return Validation(seen["loss"], seen["stderr"], levels, tuple(seen["cases"]))


def _carried(step: int) -> str:
    return f"best-{step:08d}.safetensors"


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
