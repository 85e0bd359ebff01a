"""Frozen 3x3 convolutions of few pixels and many weights, on a CPU: as a matrix product.

For each call oneDNN brings the weights into an order of its own. Where there are many times more
weights than pixels, as deep in Stable Diffusion's UNet, that takes as long as the arithmetic does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Fewer weights are brought into order in no time.
_MANY_WEIGHTS = 4_000_000
#: Pixels of a batch between which a product is faster: below, PyTorch takes one itself.
_FEW, _MANY = 16, 64


def as_products(module: nn.Module) -> int:
    """Let such layers compute products where that is faster; how many layers were found."""
    found = [
        layer
        for layer in module.modules()
        if type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= _MANY_WEIGHTS
        and layer.bias is not None
        and not layer.weight.requires_grad
    ]
    for layer in found:
        layer.forward = _forward(layer)
    return len(found)


def _forward(layer: nn.Conv2d) -> Callable[[Any], Any]:
    plain = layer.forward

    def forward(inputs: Any) -> Any:
        """(n, in, h, w) → (n, out, h, w)."""
        count, _, height, width = inputs.shape
        if not _FEW < count * height * width <= _MANY:
            return plain(inputs)
        columns = functional.unfold(inputs, 3, padding=1)
        weights = layer.weight.flatten(1).expand(count, -1, -1)
        bias = layer.bias[:, None].expand(count, -1, height * width)
        return torch.baddbmm(bias, weights, columns).view(count, -1, height, width)

    return forward
