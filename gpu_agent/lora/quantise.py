"""Frozen linear layers that take less memory: rounded to 8 or 4 bits, or fetched from the host.

A frozen weight is needed to compute a layer's output, and once more to carry a gradient through
it. PyTorch would keep what it was multiplied with until then, which for a rounded weight is its
wide copy, and for one that waits on the host the very memory that was to be saved. So these layers
keep nothing, and make the wide weight again.

In plain PyTorch, so that it works on every device:

- `int8`: each row is a scale and whole numbers from -127 to 127.
- `nf4`: each 64 numbers are a scale and indices of 16 levels, the quantiles of a normal
  distribution (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E), two in a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Table of appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_BLOCK = 64
_INT8 = 127


class Frozen(nn.Linear):
    """A linear layer that learns nothing; peft takes it for the linear layer that it is.

    Attributes:
        base: `same`, `int8` or `nf4`.
        dtype: of the weight when it is used, and of the output.
        before_use: called before each use of the weight, in either direction.
    """

    weight: Any
    scale: Any
    pairs: Any

    def __init__(self, layer: nn.Linear, base: str) -> None:
        # not nn.Linear's own, which would make a weight to throw away
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base = base
        self.dtype = layer.weight.dtype
        self.before_use: Callable[[], None] | None = None
        weight, scale = _ROUND[base](layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = layer.bias
        if base == "nf4":
            levels = torch.tensor(NF4, dtype=self.dtype, device=weight.device)
            #: What each byte stands for, (256, 2).
            pairs = torch.cartesian_prod(levels, levels)
            self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, x: Any) -> Any:
        return _Product.apply(x.to(self.dtype), self)

    def dense(self) -> Any:
        """The weight, (out, in), in `dtype`; rounded once."""
        if self.before_use is not None:
            self.before_use()
        if self.base == "same":
            return self.weight
        if self.base == "int8":
            return self.weight.to(self.dtype) * self.scale
        blocks = self.pairs[self.weight.flatten().int()].view(-1, _BLOCK) * self.scale
        return blocks.view(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, layer: Frozen) -> Any:
        ctx.layer = layer
        return functional.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.layer.dense() if ctx.needs_input_grad[0] else None, None


def quantise(blocks: Sequence[Any], base: str) -> int:
    """Make the frozen linear layers of `blocks` `Frozen` ones of `base`; how many there are.

    What is rounded already is rounded further. nf4 leaves layers alone whose inputs are no
    multiple of its block.
    """
    count = 0
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if not isinstance(layer, nn.Linear) or layer.weight.requires_grad:
                    continue
                count += 1
                known = layer.base if isinstance(layer, Frozen) else None
                if known == base or (base == "nf4" and layer.in_features % _BLOCK):
                    continue
                setattr(parent, name, Frozen(_widened(layer), base))
    return count


def _widened(layer: nn.Linear) -> nn.Linear:
    if not isinstance(layer, Frozen):
        return layer
    wide = nn.Linear(1, 1, device="meta")
    wide.in_features, wide.out_features = layer.in_features, layer.out_features
    wide.weight = nn.Parameter(layer.dense(), requires_grad=False)
    wide.bias = layer.bias
    return wide


def _as_is(weight: Any) -> tuple[Any, None]:
    return weight, None


def _to_int8(weight: Any) -> tuple[Any, Any]:
    """Weight (out, in) → (out, in) int8, scale (out, 1) of the weight's type."""
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    # of a row of zeros nothing is left to scale; the scale as it will be used, so rounded first
    scale = (largest / _INT8).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    return (weight.float() / scale.float()).round().clamp(-_INT8, _INT8).to(torch.int8), scale


def _to_nf4(weight: Any) -> tuple[Any, Any]:
    """Weight (out, in) → (out, in / 2) uint8, scale (out · in / 64, 1) of the weight's type."""
    blocks = weight.float().reshape(-1, _BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    levels = torch.tensor(NF4, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    indices = torch.bucketize(blocks / scale.float(), middles).to(torch.uint8).view(-1, 2)
    return (indices[:, 0] << 4 | indices[:, 1]).view(len(weight), -1), scale


_ROUND: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "same": _as_is,
    "int8": _to_int8,
    "nf4": _to_nf4,
}
