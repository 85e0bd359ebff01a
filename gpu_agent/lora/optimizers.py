"""The optimizers that a recipe can name, and the learning rate of each step.

All of them keep their state in `state_dict`, without code in it, and go on from it to the bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gpu_agent.recipe import Recipe

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def make(groups: Iterable[Mapping[str, Any]], recipe: Recipe, device: Any) -> Any:
    """An optimizer of parameter groups, each with its `rate`, the highest learning rate."""
    parts = [{**group, "lr": group["rate"]} for group in groups]
    decay = recipe.weight_decay
    if recipe.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # safeguard_warmup, or the estimate of the step size is thrown off by a low first rate
        return Prodigy(
            parts,
            lr=recipe.learning_rate,
            weight_decay=decay,
            use_bias_correction=True,
            safeguard_warmup=recipe.warmup_steps > 0,
        )
    if recipe.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # rates as they are said: relative to the weights, B would stand still at its first zero
        return Adafactor(
            parts,
            lr=recipe.learning_rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
        )
    if recipe.optimizer == "schedule_free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parts, lr=recipe.learning_rate, weight_decay=decay)
        # for good: `ema.ScheduleFree` computes what `eval` would put in the weights' place
        optimizer.train()
        return optimizer
    if recipe.optimizer == "adamw8bit":
        return AdamW8bit(parts, lr=recipe.learning_rate, weight_decay=decay)
    fused = device.type in {"cuda", "cpu"}
    return torch.optim.AdamW(parts, lr=recipe.learning_rate, weight_decay=decay, fused=fused)


def set_rates(optimizer: Any, recipe: Recipe, step: int) -> None:
    """Give each group its learning rate for the step after `step` done steps."""
    share = scheduled(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * share


def learning_rate(recipe: Recipe, step: int) -> float:
    """The denoiser's rate after `step` done steps."""
    return recipe.learning_rate * scheduled(recipe, step)


def scheduled(recipe: Recipe, step: int) -> float:
    """The share of the highest rate: linear warm-up, then constant, or cosine or linear to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.scheduler == "constant":
        return 1.0
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 1 - share if recipe.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * share))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments take a byte per weight (arXiv:2110.02861).

    Blocks of 256 weights share a scale and are rounded to a dynamic data type, which spends its
    codes on seven decades. Of the second moment the root is kept: so it has the range of the
    first, and none of a block's weights gets a first moment over a root that was rounded to 0.

    A group's weights are updated as one flat tensor: a LoRA is hundreds of small ones. The flat
    state is kept under the group's first parameter.
    """

    BLOCK = 256

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        params, rate = group["params"], group["lr"]
        gradient = self._flat(
            [torch.zeros_like(one) if one.grad is None else one.grad for one in params]
        )
        state = self.state[params[0]]
        if not state:
            state["step"] = 0
            for name in _SIGNED:
                self._round(state, name, torch.zeros_like(gradient))
        state["step"] += 1
        mean = self._load(state, "mean").lerp_(gradient, 1 - _BETAS[0])
        root = self._load(state, "root")
        square = root.square_().lerp_(gradient.square(), 1 - _BETAS[1])
        root = square.sqrt_()
        self._round(state, "mean", mean)
        self._round(state, "root", root)
        count = state["step"]
        spread = root.div_(math.sqrt(1 - _BETAS[1] ** count)).add_(_EPSILON)
        update = mean.div_(spread).mul_(-rate / (1 - _BETAS[0] ** count))
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_add_(params, self._parted(update, params))

    def _flat(self, tensors: list[Any]) -> Any:
        # a block never holds weights of two tensors
        pad = torch.nn.functional.pad
        return torch.cat(
            [pad(one.flatten().float(), (0, -one.numel() % self.BLOCK)) for one in tensors]
        )

    def _parted(self, flat: Any, like: list[Any]) -> list[Any]:
        sizes = [one.numel() + -one.numel() % self.BLOCK for one in like]
        return [
            part[: one.numel()].view_as(one)
            for part, one in zip(flat.split(sizes), like, strict=True)
        ]

    def _load(self, state: dict[str, Any], name: str) -> Any:
        # `load_state_dict` makes floats of them
        codes = state[name].int()
        values, _ = _codes(_SIGNED[name], codes.device)
        shares = values.index_select(0, codes).view(-1, self.BLOCK)
        return (shares * state[f"{name}_scale"][:, None]).flatten()

    def _round(self, state: dict[str, Any], name: str, values: Any) -> None:
        blocks = values.view(-1, self.BLOCK)
        scale = blocks.abs().amax(dim=1)
        shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        _, nearest = _codes(_SIGNED[name], values.device)
        state[name] = nearest.index_select(0, _half_bits(shares.flatten().half()))
        state[f"{name}_scale"] = scale


#: Whether a moment has two signs.
_SIGNED = {"mean": True, "root": False}


@functools.cache
def _codes(signed: bool, device: Any) -> tuple[Any, Any]:
    """The 256 values, and the code that is nearest to each number of half precision.

    Looking a code up by the bits of a half is much faster on a CPU than searching for it, and
    halves are finer than the codes are.
    """
    values = _dynamic(signed=signed)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    nearest = torch.bucketize(halves.float(), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return values.to(device), nearest.to(device)


def _half_bits(halves: Any) -> Any:
    """Places in `_codes`' table, from 0 to 65,535."""
    return halves.view(torch.int16).int() + 2**15


def _dynamic(*, signed: bool) -> Any:
    """The 256 values of the dynamic data type from -1 or 0 to 1 (arXiv:2110.02861, section 2.2).

    Each decade up to 1 has twice as many evenly spaced values as the one below it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        bounds = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)
