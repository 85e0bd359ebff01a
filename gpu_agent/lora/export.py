"""The result as files: the same LoRA in diffusers' naming and in what else its family is read in.

Alpha is not among the tensors of a diffusers file. It is in the file's metadata, and a reader that
finds none takes alpha = rank. Kohya's naming has a tensor per layer for it. Both are written, so
alpha / rank survives either way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import tensor_file
from gpu_agent.lora.errors import TrainingError
from gpu_agent.lora.families import Family
from gpu_agent.recipe import Recipe

DIFFUSERS = "lora.safetensors"


def write(
    folder: Path,
    tensors: Mapping[str, Any],
    *,
    family: Family,
    recipe: Recipe,
    configs: Mapping[str, Mapping[str, Any]],
    steps: int,
) -> list[Path]:
    """Write the diffusers file, and one for each of the family's `EXPORTS`.

    Args:
        tensors: by name in a diffusers file, ``unet.….lora_A.weight``.
        configs: peft's, of each part of the model.
        steps: after how many optimizer steps these tensors were taken.

    Raises:
        TrainingError: `training.diverged`; a weight is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError("training.diverged", f"the trained weights are not finite: {name}")
    said = _modelspec(family, recipe)
    config = {
        f"{part}.{key}": _plain(value)
        for part, config in configs.items()
        for key, value in config.items()
    }
    diffusers = {**said, "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    tensor_file.write(folder / DIFFUSERS, tensors, diffusers)
    files = [folder / DIFFUSERS]
    for name, rename in family.exports().items():
        others = {**said, **_ss(family, recipe, steps)}
        tensor_file.write(folder / name, rename(tensors, recipe.alpha), others)
        files.append(folder / name)
    return files


def _modelspec(family: Family, recipe: Recipe) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.trigger or "LoRA",
        "modelspec.trigger_phrase": recipe.trigger,
        "modelspec.resolution": f"{recipe.resolution}x{recipe.resolution}",
    }


def _ss(family: Family, recipe: Recipe, steps: int) -> dict[str, str]:
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.alpha),
        "ss_base_model_version": family.kohya_version,
        "ss_v2": "False",
        "ss_resolution": f"({recipe.resolution}, {recipe.resolution})",
        "ss_learning_rate": str(recipe.learning_rate),
        "ss_optimizer": recipe.optimizer,
        "ss_lr_scheduler": recipe.scheduler,
        "ss_lr_warmup_steps": str(recipe.warmup_steps),
        "ss_batch_size_per_device": str(recipe.batch_size),
        "ss_gradient_accumulation_steps": str(recipe.gradient_accumulation),
        "ss_max_train_steps": str(recipe.steps),
        "ss_steps": str(steps),
        "ss_seed": str(recipe.seed),
        "ss_min_snr_gamma": str(recipe.min_snr_gamma),
        "ss_enable_bucket": "True",
    }


def _plain(value: Any) -> Any:
    """A value of peft's configuration as JSON keeps it."""
    if isinstance(value, set):
        return sorted(value)
    return (
        value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    )
