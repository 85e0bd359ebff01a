"""The validation loss: the one number by which checkpoints are compared.

A training loss is mostly the luck of its noise and noise levels. Here both are fixed: each picture
has its own noise, drawn from its content and the seed, taken with both signs, at the middles of
`LEVELS` equal strata of the family's density of noise levels. Two checkpoints thus differ by what
they learned and by nothing else, and so do two runs of the same recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from gpu_agent.lora import draws
from gpu_agent.lora.cache import Sample, move, move_conditions
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.objective import Density

#: Noise levels per picture.
LEVELS = 4
#: No more pictures than this are looked at, so that validation stays a small part of the time.
MOST_PICTURES = 16
#: Samples in one forward pass at most.
_BATCH = 16


@dataclass(frozen=True)
class Validation:
    """Mean loss and its standard error over pictures and noise levels."""

    loss: float
    stderr: float


@dataclass(frozen=True)
class _Case:
    shape: tuple[int, ...]
    latents: Any
    text: str
    conditions: Conditions
    mask: Any
    noise: Any
    level: Any


class Evaluator:
    """Measures a model on the same cases each time it is asked.

    Args:
        encode: see `adapter.Trainable`.
        beat: told before each forward pass how many of the cases are done; what it raises ends it.
    """

    def __init__(
        self,
        model: Model,
        samples: Sequence[Sample],
        density: Density,
        seed: int,
        device: Any,
        autocast: Callable[[], Any],
        encode: Callable[[Sequence[str]], Conditions],
        beat: Callable[[int, int], None],
    ) -> None:
        self._model = model
        self._device = device
        self._autocast = autocast
        self._encode = encode
        self._beat = beat
        chosen = sorted(samples, key=lambda sample: sample.digest)[:MOST_PICTURES]
        cases = [case for sample in chosen for case in _cases(model, sample, density, seed)]
        self._cases = sorted(cases, key=lambda case: case.shape)

    @torch.no_grad()
    def measure(self) -> Validation:
        losses: list[Any] = []
        for _, same_shape in groupby(self._cases, key=lambda case: case.shape):
            cases = list(same_shape)
            for start in range(0, len(cases), _BATCH):
                self._beat(sum(map(len, losses)), len(self._cases))
                losses.append(self._losses(cases[start : start + _BATCH]))
        # a case and its mirror image in noise are one observation
        pairs = torch.cat(losses).cpu().double().view(-1, 2).mean(dim=1)
        spread = float(pairs.std()) if len(pairs) > 1 else 0.0
        return Validation(loss=float(pairs.mean()), stderr=spread / math.sqrt(len(pairs)))

    def _losses(self, cases: Sequence[_Case]) -> Any:
        with self._autocast():
            return self._model.losses(
                move([case.latents for case in cases], self._device),
                move([case.noise for case in cases], self._device),
                move([case.level for case in cases], self._device),
                {
                    **move_conditions([case.conditions for case in cases], self._device),
                    **self._encode([case.text for case in cases]),
                },
                None
                if cases[0].mask is None
                else move([case.mask for case in cases], self._device),
            )


def _cases(model: Model, sample: Sample, density: Density, seed: int) -> list[_Case]:
    upright = sample.moments[:1]
    still = torch.zeros_like(upright.chunk(2, dim=1)[0])
    latents = model.draw_latents(upright, still)[0]
    width, height = sample.bucket
    levels = density.levels((torch.arange(LEVELS) + 0.5) / LEVELS, width * height)
    cases = []
    for number, level in enumerate(levels):
        place = draws.generator(seed, "validation", sample.digest, number)
        noise = torch.randn(latents.shape, generator=place)
        cases += [
            _Case(
                shape=tuple(latents.shape),
                latents=latents,
                text=sample.texts[0],
                conditions=sample.conditions[0],
                mask=None if sample.mask is None else sample.mask[0],
                noise=sign * noise,
                level=level,
            )
            for sign in (1, -1)
        ]
    return cases
