"""What is trained: put into a frozen model, taken out, put back.

An adapter is peft's: in the denoiser, and where the recipe wants it in the text encoders too. All
of its parameters are fp32, whatever the base is in: half precision would round small updates away.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, OFTConfig

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.recipe import Recipe

_NAME = "default"
#: What diffusers' scripts and sd-scripts both train of a text encoder.
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Trainable(ABC):
    """The parameters that a training changes.

    Attributes:
        configs: peft's configuration of each part of the model, by diffusers' name for the part.
    """

    configs: Mapping[str, Mapping[str, Any]] = {}

    @abstractmethod
    def named(self) -> Mapping[str, Any]:
        """The parameters, by the names under which they are exported."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: `params`, and `rate`, the highest learning rate."""

    @property
    def trains_texts(self) -> bool:
        """Whether `encode` has anything to say, for which it needs the text encoders."""
        return False

    def encode(self, texts: Sequence[str]) -> Conditions:
        """What takes the place of the texts' cached conditions, (n, …), with the graph behind it.

        Nothing where the texts' encoding is not trained.
        """
        return {}

    def settle(self) -> None:  # noqa: B027 -- most have nothing to settle
        """Called after each step of the optimizer."""

    @property
    def parameters(self) -> list[Any]:
        return list(self.named().values())

    def tensors(self) -> dict[str, Any]:
        """Copies on the host."""
        return {name: value.detach().cpu().clone() for name, value in self.named().items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Any]) -> None:
        """Raises `ValueError`, and nothing happened, where tensors do not fit."""
        named = self.named()
        for name, parameter in named.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} is missing or of another shape")
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


class Adapter(Trainable):
    """LoRA, DoRA, LoKr or OFT, by the names that diffusers' and peft's files use."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self._model = model
        self._recipe = recipe
        parts = {model.prefix: (model.denoiser, _config(recipe, model.targets(recipe.targets)))}
        if recipe.text_encoder_rate > 0:
            for name in model.adaptable_encoders:
                parts[name] = (model.text_encoders[name], _config(recipe, TEXT_TARGETS))
        self._named: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft says so where OFT's blocks do not divide a layer, and takes the nearest that do
            warnings.filterwarnings("ignore", "Invalid `oft_block_size`")
            torch.manual_seed(recipe.seed)
            for name, (module, config) in parts.items():
                try:
                    module.add_adapter(config, adapter_name=_NAME)
                except ValueError as error:  # peft found no layer of these names
                    raise ModelError(
                        "model.targets", f"{name} cannot be adapted: {error}"
                    ) from None
                self._named |= _trained(module, name)
        self.configs = {
            name: module.peft_config[_NAME].to_dict() for name, (module, _) in parts.items()
        }

    def named(self) -> Mapping[str, Any]:
        return self._named

    def groups(self) -> list[dict[str, Any]]:
        """Those of B apart (LoRA+); DoRA's magnitudes are not decayed, for 0 is no place to be."""
        members: dict[tuple[float, bool], list[Any]] = {}
        for name, parameter in self._named.items():
            of_text = not name.startswith(f"{self._model.prefix}.")
            rate = self._recipe.text_encoder_rate if of_text else self._recipe.learning_rate
            if name.endswith(".lora_B.weight"):
                rate *= self._recipe.lora_plus
            members.setdefault((rate, "lora_magnitude_vector" in name), []).append(parameter)
        return [
            {"params": params, "rate": rate, **({"weight_decay": 0.0} if magnitudes else {})}
            for (rate, magnitudes), params in members.items()
        ]

    @property
    def trains_texts(self) -> bool:
        return self._recipe.text_encoder_rate > 0

    def encode(self, texts: Sequence[str]) -> Conditions:
        return self._model.encode_texts(texts) if self.trains_texts else {}


def _config(recipe: Recipe, targets: list[str] | str) -> Any:
    if recipe.adapter == "lokr":
        return LoKrConfig(r=recipe.rank, alpha=recipe.alpha, target_modules=targets)
    if recipe.adapter == "oft":
        return OFTConfig(r=0, oft_block_size=recipe.rank, target_modules=targets)
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
        use_dora=recipe.adapter == "dora",
    )


def _trained(module: Any, prefix: str) -> dict[str, Any]:
    # transformers 5 dropped this level of CLIPTextModel, files and their other readers did not
    dropped = prefix.startswith("text_encoder") and not hasattr(module, "text_model")
    prefix = f"{prefix}.text_model" if dropped else prefix
    named = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            said = ".".join(part for part in name.split(".") if part != _NAME)
            # peft's files name DoRA's magnitudes without it
            named[f"{prefix}.{said.replace('_magnitude_vector.weight', '_magnitude_vector')}"] = (
                parameter
            )
    return named
