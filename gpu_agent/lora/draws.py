"""Randomness by place instead of by history.

Every draw comes from a generator that is seeded with where it is used: (seed, step, …). So there
is no random state to save, and a training that goes on after a kill draws what it would have drawn.
Draws are made on the CPU, which makes them the same on every device.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def generator(*place: int | str) -> Any:
    """A `torch.Generator` of its own for this place."""
    return torch.Generator().manual_seed(_number(place))


def shuffled(items: Sequence[Item], *place: int | str) -> list[Item]:
    mixed = list(items)
    random.Random(_number(place)).shuffle(mixed)
    return mixed


def _number(place: tuple[int | str, ...]) -> int:
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Batches:
    """Which samples go into which forward pass.

    Each epoch goes once through all samples: shuffled within their bucket, cut into batches of one
    bucket, the batches shuffled. The number of batches per epoch does not change, so the batch at
    any index can be told without the ones before it.
    """

    shapes: tuple[Any, ...]
    size: int
    seed: int

    def at(self, index: int) -> list[int]:
        """The numbers of the samples in batch `index` (from 0, over all epochs)."""
        per_epoch = sum(-(-len(members) // self.size) for members in self._members())
        epoch, position = divmod(index, per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for number, members in enumerate(self._members()):
            mixed = shuffled(members, self.seed, "epoch", epoch, "bucket", number)
            batches += [mixed[at : at + self.size] for at in range(0, len(mixed), self.size)]
        return shuffled(batches, self.seed, "epoch", epoch)

    def _members(self) -> list[list[int]]:
        grouped: dict[Any, list[int]] = {}
        for number, shape in enumerate(self.shapes):
            grouped.setdefault(shape, []).append(number)
        return list(grouped.values())
