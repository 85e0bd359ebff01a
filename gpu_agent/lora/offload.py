"""Blocks of the denoiser that wait on the host and visit the GPU when their turn comes.

The frozen weights of a block's linear layers, nearly all of it, lie in one piece of pinned memory.
The GPU has a few *slots* of the size of the largest block. A block that is used takes a slot, and
while it computes the next one in the direction of travel (up in the forward pass, down in the
backward pass) is copied into another on a stream of its own. Nothing is copied back, for frozen
weights do not change. What is trained stays on the GPU.

On a CPU the same moves are plain copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gpu_agent.lora.quantise import Frozen
from gpu_agent.needs import SLOTS

#: Weights in a slot begin at multiples of this, as an allocator's would.
_ALIGNED = 64


class Swap:
    """Takes the weights of `blocks` to the host, and fetches each for its turn.

    Args:
        blocks: in the order in which they run, their linear layers `Frozen`.
        device: where they compute.
    """

    def __init__(self, blocks: Sequence[Any], device: Any) -> None:
        self._layers = [
            [layer for layer in block.modules() if isinstance(layer, Frozen)] for block in blocks
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = [_packed(layers, pin=self._stream is not None) for layers in self._layers]
        largest = max(len(host) for host in self._host)
        self._slots = [
            torch.empty(largest, dtype=torch.uint8, device=device)
            for _ in range(min(SLOTS, len(blocks)))
        ]
        #: Which block is in each slot, and the event after which its copy is there.
        self._held: list[int | None] = [None] * len(self._slots)
        self._copied: list[Any] = [None] * len(self._slots)
        self._last = -1
        for number, layers in enumerate(self._layers):
            self._point(number, self._host[number])
            for layer in layers:
                layer.before_use = partial(self._use, number)

    @property
    def resident(self) -> int:
        """How many of the blocks are on the device."""
        return sum(held is not None for held in self._held)

    def release(self) -> None:
        """Let all weights be plain ones of the host again."""
        for number, layers in enumerate(self._layers):
            self._point(number, self._host[number])
            for layer in layers:
                layer.before_use = None

    def _use(self, number: int) -> None:
        if number == self._last:
            return
        ahead = number + (1 if number > self._last else -1)
        self._last = number
        slot = self._held.index(number) if number in self._held else self._load(number)
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied[slot])
        if len(self._slots) > 1 and 0 <= ahead < len(self._layers) and ahead not in self._held:
            self._load(ahead)

    def _load(self, number: int) -> int:
        """Copy a block into a slot that is free, or whose block is not in use; which."""
        free = [slot for slot, held in enumerate(self._held) if held is None]
        unused = [slot for slot, held in enumerate(self._held) if held != self._last]
        slot = (free or unused or [0])[0]
        evicted = self._held[slot]
        if evicted is not None:
            self._point(evicted, self._host[evicted])
        source = self._host[number]
        target = self._slots[slot][: len(source)]
        if self._stream is None:
            target.copy_(source)
        else:
            # what was in the slot may still be multiplied with
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                self._copied[slot] = self._stream.record_event()
        self._held[slot] = number
        self._point(number, target)
        return slot

    def _point(self, number: int, memory: Any) -> None:
        """Let the weights of a block be those in `memory`, packed as on the host."""
        at = 0
        for layer in self._layers[number]:
            size = layer.weight.numel() * layer.weight.element_size()
            part = memory[at : at + size].view(layer.weight.dtype)
            layer.weight.data = part.view(layer.weight.shape)
            at += _room(layer)


def _packed(layers: Sequence[Frozen], *, pin: bool) -> Any:
    """The weights of the layers in one piece of host memory."""
    packed = torch.empty(sum(map(_room, layers)), dtype=torch.uint8, pin_memory=pin)
    at = 0
    for layer in layers:
        raw = layer.weight.detach().contiguous().view(-1).view(torch.uint8)
        packed[at : at + len(raw)].copy_(raw)
        at += _room(layer)
    return packed


def _room(layer: Frozen) -> int:
    size = layer.weight.numel() * layer.weight.element_size()
    return -(-size // _ALIGNED) * _ALIGNED
