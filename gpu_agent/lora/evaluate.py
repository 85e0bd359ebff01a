"""The validation loss: the one number by which checkpoints are compared.

A training loss is mostly the luck of its noise and noise levels. Here both are fixed. A *case* is a
picture at the middle of one of `LEVELS` equal strata of the family's density of noise levels, with
noise of its own, drawn from its content and the seed, taken with both signs. Two checkpoints thus
differ by what they learned and by nothing else, and so do two runs of the same recipe.

Losses at different levels are of different sizes, and those where the base loses most would decide
alone. So each level is weighted by the base model: its weight is the mean of the base's losses over
its loss at this level. The loss of step 0 is then the plain mean; that of any other is as many
times smaller as the losses are in the mean over the levels. The plain losses are told beside it.

The standard error comes from the spread of the cases within each level. It tells how far the number
may be from that of all noise on pictures like these; for two steps of one training see `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from gpu_agent.lora import draws
from gpu_agent.lora.cache import Sample, move, move_conditions
from gpu_agent.lora.choose import Validation, standard_error
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.objective import Density
from gpu_agent.recipe import Recipe

#: Noise levels.
LEVELS = 4
#: Validation may take this share of a training's time.
SHARE = 0.05
#: A training step of one image in forward passes of validation: 3.7 and 4.1 were measured on a CPU,
#: for small and large images.
STEP_COST = 3.5
#: No fewer rounds than this, however often there is a validation: one has no spread.
LEAST_ROUNDS = 2
#: No more than this, however seldom: errors fall with the root of their number.
MOST_ROUNDS = 16
#: Samples in one forward pass, where memory allows.
_BATCH = 16


def rounds(recipe: Recipe) -> int:
    """How many times the validation goes through the levels: what its share of time allows."""
    images = recipe.validation_every * recipe.batch_size * recipe.gradient_accumulation
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SHARE * STEP_COST * images) // (2 * LEVELS)))


@dataclass(frozen=True)
class _Pass:
    """One forward pass: a case with one sign of its noise. Cases are numbered level by level."""

    case: int
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
        samples: as many as `rounds` times `LEVELS` of them are looked at, each at one level; of
            fewer each is taken at several.
        encode: see `adapter.Trainable`.
        beat: told before each forward pass how many are done, and of how many; what it raises ends
            it.
        at_once: how many images a forward pass may have; None where memory does not matter.
    """

    def __init__(
        self,
        model: Model,
        samples: Sequence[Sample],
        recipe: Recipe,
        device: Any,
        autocast: Callable[[], Any],
        encode: Callable[[Sequence[str]], Conditions],
        beat: Callable[[int, int], None],
        at_once: Callable[[], int | None],
    ) -> None:
        self._model = model
        self._device = device
        self._autocast = autocast
        self._encode = encode
        self._beat = beat
        self._at_once = at_once
        self._rounds = rounds(recipe)
        passes = _passes(model, samples, recipe, self._rounds)
        self._levels = torch.stack([one.level for one in passes[::2]])
        self._passes = sorted(passes, key=lambda one: one.shape)

    @torch.no_grad()
    def measure(self, base: Validation | None) -> Validation:
        """`base` is what the untrained model lost; None where it is the one being measured."""
        size = min(_BATCH, self._at_once() or _BATCH)
        losses: list[Any] = []
        for _, same_shape in groupby(self._passes, key=lambda one: one.shape):
            same = list(same_shape)
            for start in range(0, len(same), size):
                self._beat(sum(map(len, losses)), len(self._passes))
                losses.append(self._losses(same[start : start + size]))
        cases = torch.zeros(LEVELS * self._rounds, dtype=torch.double)
        # a case and its mirror image in noise are one observation
        numbers = torch.tensor([one.case for one in self._passes])
        cases.index_add_(0, numbers, torch.cat(losses).cpu().double() / 2)
        plain = cases.view(LEVELS, self._rounds)
        means = plain.mean(dim=1)
        first = torch.tensor([one[1] for one in base.levels], dtype=means.dtype) if base else means
        weighted = (plain * (first.mean() / first)[:, None]).flatten()
        told = tuple(weighted.tolist())
        return Validation(
            loss=float(weighted.mean()),
            stderr=standard_error(told, LEVELS),
            levels=tuple(
                (float(level), float(mean), standard_error(tuple(some.tolist())))
                for level, mean, some in zip(
                    self._levels.view(LEVELS, -1).mean(dim=1), means, plain, strict=True
                )
            ),
            cases=told,
        )

    def _losses(self, some: Sequence[_Pass]) -> Any:
        with self._autocast():
            return self._model.losses(
                move([one.latents for one in some], self._device),
                move([one.noise for one in some], self._device),
                move([one.level for one in some], self._device),
                {
                    **move_conditions([one.conditions for one in some], self._device),
                    **self._encode([one.text for one in some]),
                },
                None if some[0].mask is None else move([one.mask for one in some], self._device),
            )


def _passes(model: Model, samples: Sequence[Sample], recipe: Recipe, count: int) -> list[_Pass]:
    """All passes of all cases; both signs of a case stand side by side."""
    chosen = sorted(samples, key=lambda sample: sample.digest)
    density = Density.of(recipe)
    quantiles = (torch.arange(LEVELS) + 0.5) / LEVELS
    passes = []
    for number in range(LEVELS * count):
        place, turn = divmod(number, count)
        # a round takes as many neighbours as there are levels; rounds begin far from each other
        sample = chosen[(place + turn * len(chosen) // count) % len(chosen)]
        latents = _mean_latents(model, sample)
        width, height = sample.bucket
        level = density.levels(quantiles[place : place + 1], width * height)[0]
        drawn = draws.generator(recipe.seed, "validation", sample.digest, place, turn)
        noise = torch.randn(latents.shape, generator=drawn)
        passes += [
            _Pass(
                case=number,
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
    return passes


def _mean_latents(model: Model, sample: Sample) -> Any:
    upright = sample.moments[:1]
    return model.draw_latents(upright, torch.zeros_like(upright.chunk(2, dim=1)[0]))[0]
