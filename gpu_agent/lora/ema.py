"""Which weights are validated, painted with, kept as the best and exported.

Those that are trained, or an average of them over the steps, which is steadier. The average is
taken aside: training goes on from its own weights, bit for bit, as if nobody had looked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gpu_agent.lora.adapter import Trainable
from gpu_agent.recipe import Recipe


def kept(trainable: Trainable, optimizer: Any, recipe: Recipe) -> Kept:
    """As the recipe wants them."""
    if recipe.optimizer == "schedule_free":
        return ScheduleFree(trainable, optimizer)
    if recipe.ema_decay > 0:
        return Ema(trainable, recipe.ema_decay)
    return Kept(trainable)


class Kept:
    """The trained weights themselves."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable

    def follow(self, step: int) -> None:
        """Called after each step, with the number of steps done."""

    def tensors(self) -> dict[str, Any]:
        """Copies on the host."""
        return self._trainable.tensors()

    def trained(self) -> dict[str, Any]:
        """What a checkpoint needs besides `tensors`: copies of the trained weights, if others."""
        return {}

    def resume(self, tensors: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises `ValueError` where they do not fit."""
        self._trainable.fill(trained or tensors)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the model works with them."""
        yield


class _Average(Kept):
    """Weights beside the trained ones."""

    def _values(self) -> list[Any]:
        """In the order of `parameters`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Any]:
        values = zip(self._trainable.named(), self._values(), strict=True)
        return {name: value.detach().cpu().clone() for name, value in values}

    def trained(self) -> dict[str, Any]:
        return self._trainable.tensors()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        parameters = self._trainable.parameters
        with torch.no_grad():
            own = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, self._values())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)


class Ema(_Average):
    """The exponential moving average.

    It begins with short memory, (1 + step) / (10 + step) as in TensorFlow's, so that the untrained
    weights are soon forgotten.
    """

    def __init__(self, trainable: Trainable, decay: float) -> None:
        super().__init__(trainable)
        self._decay = decay
        self._shadow = [parameter.detach().clone() for parameter in trainable.parameters]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._shadow, self._trainable.parameters, 1 - decay)

    def resume(self, tensors: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
        self._trainable.fill(tensors)
        with torch.no_grad():
            torch._foreach_copy_(self._shadow, self._trainable.parameters)
        super().resume(tensors, trained)

    def _values(self) -> list[Any]:
        return self._shadow


class ScheduleFree(_Average):
    """The average that schedule-free optimizers take themselves (arXiv:2405.15682).

    They train at y = (1 - beta) z + beta x, of which x is the average; it follows from y and z.
    """

    def __init__(self, trainable: Trainable, optimizer: Any) -> None:
        super().__init__(trainable)
        self._optimizer = optimizer

    @torch.no_grad()
    def _values(self) -> list[Any]:
        states, beta = self._optimizer.state, self._optimizer.param_groups[0]["betas"][0]
        return [
            parameter.lerp(states[parameter]["z"], 1 - 1 / beta)
            if "z" in states.get(parameter, {})
            else parameter
            for parameter in self._trainable.parameters
        ]
