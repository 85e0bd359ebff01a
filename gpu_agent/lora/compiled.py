"""The denoiser's repeated blocks, compiled one by one.

Blocks of one kind share their code, so that compiling them takes seconds where the whole network
takes minutes; each image shape costs that once. What is compiled stays in the work folder, for a
training that goes on there. Only training passes are compiled: validations and sample images come
in other shapes, and too seldom to pay for that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora.families.base import Model
from gpu_agent.needs import Way
from gpu_agent.recipe import Recipe

_log = logging.getLogger(__name__)

#: `auto` compiles where so many passes wait for each shape. A guess: half a minute for a shape, a
#: fifth of a pass of 0.2 to 1 s won.
_PAYS = 500
#: Variants of one code that are kept compiled: widths of a UNet's levels times shapes.
_VARIANTS = 64


def pays(recipe: Recipe, way: Way, device: Any, shapes: int) -> bool:
    """Whether to compile, for a training with images of so many shapes."""
    if recipe.compile != "auto":
        return recipe.compile == "on"
    passes = recipe.steps * recipe.gradient_accumulation
    plain = way.base == "same" and not way.swapped
    return bool(device.type == "cuda" and plain and passes >= _PAYS * shapes)


def compile_blocks(model: Model, work: Path, way: Way) -> bool:
    """From their next training passes on, in a cache below `work`.

    A failure is logged, and the block that failed goes on as it was.

    Returns:
        False where nothing is compiled, because blocks wait on the host.
    """
    if way.swapped:
        _log.warning("not compiled: blocks wait on the host")
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "compiled"))
    import torch._dynamo  # a second, for those who compile

    torch._dynamo.config.recompile_limit = _VARIANTS
    for block in model.blocks():
        block._compiled_call_impl = _Compiled(block._call_impl)
    return True


class _Compiled:
    """Stands where `torch.nn.Module.compile` puts what it compiled."""

    def __init__(self, eager: Callable[..., Any]) -> None:
        self._eager = eager
        self._compiled: Callable[..., Any] | None = torch.compile(eager, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None or not torch.is_grad_enabled():
            return self._eager(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _log.warning("not compiled: %s", error)
            self._compiled = None
            return self._eager(*args, **kwargs)
