"""Which of the validated steps is kept, and when there is nothing more to hope for.

All validations of a training look at the same cases with the same noise. So most of the spread that
`Validation.stderr` tells, between pictures and draws, is the same in two steps and says nothing of
which is better. What does is the standard error of the *differences*, case by case: a later step
takes the place of the best one only where its loss is lower by more than that. Of steps that cannot
be told apart the earliest is kept, which has learned its pictures by heart the least.

A single lucky step is not trusted either: a step counts for the worse of its own loss and of the
median of itself and its two neighbours. The last step has no later neighbour and counts for itself
until it has; so besides the best step the last one may still be chosen, and both are kept.

Everything follows from the validations alone: a training that goes on elsewhere chooses alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Validation:
    """What one step lost on the cases of `evaluate`.

    Attributes:
        loss: the mean over all cases, each noise level weighted by what the base model lost there.
        stderr: its standard error, from the spread of the cases of each level.
        levels: noise level in (0, 1), mean loss there without that weight, and its standard error.
        cases: the weighted loss of each case, level by level, always in the same order.
    """

    loss: float
    stderr: float
    levels: tuple[tuple[float, float, float], ...] = ()
    cases: tuple[float, ...] = ()


def best_step(validations: Mapping[int, Validation]) -> int | None:
    """The trained step to keep if the training ended now; 0, the base model, is none."""
    return _chosen(validations, _trained(validations))


def candidates(validations: Mapping[int, Validation]) -> set[int]:
    """The steps of which one will be the best, unless it is a step that is still to come."""
    trained = _trained(validations)
    settled = _chosen(validations, trained[:-1])
    return {step for step in (settled, *trained[-1:]) if step is not None}


def waited(validations: Mapping[int, Validation]) -> int:
    """How many validations have followed the one with the lowest loss, the base's included."""
    if not validations:
        return 0
    steps = sorted(validations)
    lowest = min(steps, key=lambda step: (validations[step].loss, step))
    return len(steps) - 1 - steps.index(lowest)


def standard_error(values: tuple[float, ...], strata: int = 1) -> float:
    """Of the mean of values, as many in a row of each stratum; what differs between strata by
    design is no error (Cochran, Sampling Techniques, 5.5). 0 for a single value."""
    size = len(values) // strata
    if size < 2:
        return 0.0
    parts = (values[start : start + size] for start in range(0, len(values), size))
    return math.sqrt(sum(statistics.variance(part) / size for part in parts)) / strata


def _trained(validations: Mapping[int, Validation]) -> list[int]:
    return sorted(step for step in validations if step > 0)


def _chosen(validations: Mapping[int, Validation], steps: list[int]) -> int | None:
    best = None
    for step in steps:
        if best is None:
            best = step
            continue
        lower = _counted(validations, best) - _counted(validations, step)
        if lower > _paired_error(validations[step], validations[best]):
            best = step
    return best


def _counted(validations: Mapping[int, Validation], step: int) -> float:
    """The loss that a step counts for."""
    steps, own = sorted(validations), validations[step].loss
    place = steps.index(step)
    if place in (0, len(steps) - 1):
        return own
    around = (validations[near].loss for near in steps[place - 1 : place + 2])
    return max(own, statistics.median(around))


def _paired_error(one: Validation, other: Validation) -> float:
    apart = tuple(here - there for here, there in zip(one.cases, other.cases, strict=True))
    return standard_error(apart, max(1, len(one.levels)))
