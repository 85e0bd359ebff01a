"""The LoRA itself: put into a frozen denoiser, taken out, put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from gpu_agent.lora.families.base import Model
from gpu_agent.recipe import Recipe

_ADAPTER = "default"


class Adapter:
    """The trainable part of a model, by the names that diffusers' LoRA files use."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=model.targets(recipe.targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model.denoiser.add_adapter(config, adapter_name=_ADAPTER)
        # half precision would round small updates away
        for parameter in model.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._denoiser = model.denoiser
        self._named = {
            f"{model.prefix}.{name.replace(f'.{_ADAPTER}.', '.')}": parameter
            for name, parameter in model.denoiser.named_parameters()
            if parameter.requires_grad
        }
        self.config: dict[str, Any] = model.denoiser.peft_config[_ADAPTER].to_dict()

    @property
    def parameters(self) -> list[Any]:
        return list(self._named.values())

    def tensors(self) -> dict[str, Any]:
        """Copies on the host."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._named.items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Any]) -> None:
        """Raises `ValueError`, and nothing happened, where tensors do not fit."""
        for name, parameter in self._named.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} is missing or of another shape")
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])
