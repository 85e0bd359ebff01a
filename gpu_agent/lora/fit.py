"""Fits a training into the memory that is there, before its first step.

`gpu_agent.needs` lists the ways to run a training, the fastest first, and estimates what each
takes. The first that should fit is set up and tried: one pass forward and back at the largest
bucket's real shape. Where memory runs out all the same, the next way that takes less follows, and
so once more in the middle of a training. Ways differ in rounding at most, not in what is learned.

Without a meter (on a CPU) nothing is tried, and the fastest way that the recipe allows is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from gpu_agent import needs
from gpu_agent.lora.errors import TrainingError
from gpu_agent.lora.families.base import Model
from gpu_agent.lora.offload import Swap
from gpu_agent.lora.quantise import Frozen, quantise
from gpu_agent.needs import Way
from gpu_agent.recipe import Recipe

_log = logging.getLogger(__name__)

_GIB = 2**30
#: Another way must be expected to take no more than this share of what ran out, to be tried.
_LESS = 0.9


class Meter(Protocol):
    """The memory of a device. GiB."""

    def room(self) -> float:
        """What the training may take in all, what it has already included."""

    def watch(self) -> AbstractContextManager[None]:
        """Around what `peak` is to tell of. Raises: torch.OutOfMemoryError, from within."""

    def peak(self) -> float:
        """The most that was taken while it was last watched."""


class CudaMeter:
    """Of an NVIDIA GPU, which others may use besides."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def room(self) -> float:
        free, _ = torch.cuda.mem_get_info(self._device)
        return float(free + torch.cuda.memory_reserved(self._device)) / _GIB

    @contextmanager
    def watch(self) -> Iterator[None]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        torch.cuda.synchronize(self._device)

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated(self._device) / _GIB


class Fit:
    """The way in which a model is trained, chosen and carried out.

    Attributes:
        way: the present one.
    """

    def __init__(self, model: Model, recipe: Recipe, family: str, meter: Meter | None) -> None:
        self._model = model
        self._recipe = recipe
        self._meter = meter
        self._geometry = _geometry(model, family)
        self._ways = needs.ways(recipe, self._geometry)
        self._swap: Swap | None = None
        self._measured: float | None = None
        self._begun = self._stepped = False
        self.way = self._ways[0] if meter is None else self._best(meter.room() / needs.FRAGMENTED)

    def place(self) -> None:
        """Bring the denoiser to the device, in the present way. May be called again."""
        model, way = self._model, self.way
        if self._swap is not None:
            self._swap.release()
            self._swap = None
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        blocks = model.blocks()
        # spread out, so that the blocks between give time to fetch the next
        waits = {number * len(blocks) // way.swapped for number in range(way.swapped)}
        waiting: list[Any] = []
        for number, block in enumerate(blocks):
            if number in waits:
                waiting.append(block)
            if way.base != "same" or number in waits:
                _move(block, model.device)
                quantise([block], way.base)
            for layer in block.modules() if number in waits else ():
                if isinstance(layer, Frozen):
                    layer.weight.data = layer.weight.data.cpu()
        _move(model.denoiser, model.device, but=waiting)
        if waiting:
            self._swap = Swap(waiting, model.device)
        if way.checkpointing:
            model.checkpoint_gradients()
        painting = self._standing() + self._geometry.decode * self._recipe.resolution**2 / 2**20
        if self._meter is not None and painting > self._meter.room() / needs.FRAGMENTED:
            model.vae.enable_tiling()

    def try_out(self, step: Callable[[], None]) -> None:
        """Run a training pass, and step down until it fits.

        Raises:
            TrainingError: `trainer.oom`, and what would fit.
        """
        while self._meter is not None and not self._fits(step, self._meter):
            self._step_down()
        self._begun = True

    def step_down(self) -> None:
        """Take a way that needs less, for memory ran out in the middle of the training.

        Raises:
            TrainingError: `trainer.oom`; it did so before, or there is no such way.
        """
        if self._stepped:
            raise self._out_of_memory()
        self._stepped = True
        self._step_down()

    def told(self) -> dict[str, Any]:
        """The decision, for people; GiB."""
        way = self.way
        return {
            "images": way.images,
            "gradient_checkpointing": way.checkpointing,
            "base_precision": way.base,
            "block_swap": way.swapped,
            "estimated": round(self._takes(way), 3),
            "measured": None if self._measured is None else round(self._measured, 3),
            "room": None if self._meter is None else round(self._meter.room(), 3),
        }

    @property
    def validated(self) -> int | None:
        """Images of a validation pass, which keeps no activations and so fits where a training
        pass of as many does; None where memory does not matter."""
        return None if self._meter is None else self.way.images

    def _fits(self, step: Callable[[], None], meter: Meter) -> bool:
        try:
            with meter.watch():
                step()
        except torch.OutOfMemoryError:
            return False
        self._measured = meter.peak()
        return self._measured <= meter.room()

    def _step_down(self) -> None:
        less = _LESS * self._takes(self.way)
        way = next((way for way in self._ways if self._takes(way) <= less), None)
        if way is None:
            raise self._out_of_memory()
        _log.warning("out of memory with %s; from now on %s", self.way, way)
        self.way = way
        self.place()

    def _best(self, room: float) -> Way:
        """The fastest way that should fit; if none should, the one that takes least may yet."""
        fits = (way for way in self._ways if self._takes(way) <= room)
        return next(fits, min(self._ways, key=self._takes))

    def _takes(self, way: Way) -> float:
        return needs.training(self._recipe, self._geometry, way)

    def _standing(self) -> float:
        return needs.standing(self._recipe, self._geometry, self.way) + self._geometry.vae

    def _out_of_memory(self) -> TrainingError:
        room = self._meter.room() if self._meter is not None else 0.0
        # the estimate was too low, if it let this way be tried
        wrong = max(1.0, room / self._takes(self.way))
        cheapest = needs.of_a_card(wrong * min(map(self._takes, self._ways)))
        text = (
            f"the GPU's {room:.1f} GiB are too little, with {self.way} too; "
            f"a GPU of {max(cheapest, room) + 1:.0f} GiB would do"
        )
        for side in range(self._recipe.resolution - 64, 0, -64):
            smaller = replace(self._recipe, resolution=side)
            least = min(needs.training(smaller, self._geometry, way) for way in self._ways)
            if wrong * least < _LESS * room:
                text += f", or a resolution of {side}"
                break
        return TrainingError("trainer.oom", text, retryable=self._begun)


def _geometry(model: Model, family: str) -> needs.Geometry:
    """Of the network that was loaded."""
    blocks = model.blocks()
    linear = sum(
        layer.weight.numel()
        for block in blocks
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    )
    count = sum(parameter.numel() for parameter in model.denoiser.parameters())
    return needs.GEOMETRIES[family].resized(count / 1e9, linear / count, len(blocks))


def _move(module: Any, device: Any, but: list[Any] | None = None) -> None:
    """Move a module's tensors in place, but for the weights that wait in the blocks `but`."""
    stay = {
        id(layer.weight)
        for block in but or ()
        for layer in block.modules()
        if isinstance(layer, Frozen)
    }
    for parameter in module.parameters():
        if id(parameter) not in stay:
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
