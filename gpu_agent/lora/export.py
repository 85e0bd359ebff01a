"""The result as files that other programs load.

========== =====================================================================================
adapter    files, and what was seen to read them
========== =====================================================================================
lora, dora `lora.safetensors`: diffusers' `load_lora_weights`. Its alpha is in the metadata; a
           reader that finds none takes alpha = rank. Beside it, for each of the family's `EXPORTS`,
           the same in another naming (kohya's, ComfyUI's), with a tensor per layer for alpha.
           diffusers drops the magnitudes (`dora_scale`) of kohya's naming, ComfyUI takes them.
lokr       `lora.safetensors`: `load_lora_adapter` of diffusers' denoisers, with the configuration
           from the metadata. `lora_lycoris.safetensors`: LyCORIS, and ComfyUI, which knows
           diffusers' layers of the families in `_LYCORIS` only.
oft        `oft/`: peft's `PeftModel.from_pretrained`. Nothing else reads it: peft turns the inputs
           of a layer, the `oft_blocks` of LyCORIS, sd-scripts and ComfyUI its outputs.
embedding  `embedding.safetensors`: AUTOMATIC1111, ComfyUI, diffusers' `load_textual_inversion`. The
           first two take the file's name for the word.
========== =====================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import tensor_file
from gpu_agent.lora.data import Picture
from gpu_agent.lora.errors import TrainingError
from gpu_agent.lora.families import Family
from gpu_agent.recipe import DIFFUSION, Recipe

DIFFUSERS = "lora.safetensors"
LYCORIS = "lora_lycoris.safetensors"
EMBEDDING = "embedding.safetensors"
#: A folder as peft writes it.
OFT = "oft"

#: What LyCORIS' names of a denoiser's layers begin with, where ComfyUI knows those of diffusers.
_LYCORIS = {
    "sd1": "lora_unet",
    "sd2": "lora_unet",
    "sdxl": "lora_unet",
    "sd3": "lycoris",
    "flux": "lycoris",
}
#: What a peft model calls the model inside it.
_PEFT_PREFIX = "base_model.model."
#: Metadata that are the digest of the tensors, and how each begins.
_DIGESTS = {"modelspec.hash_sha256": "0x"}
_KOHYA_DIGESTS = {**_DIGESTS, "sshs_model_hash": ""}


def write(
    folder: Path,
    tensors: Mapping[str, Any],
    *,
    family: Family,
    recipe: Recipe,
    configs: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Picture],
    steps: int,
) -> list[Path]:
    """Write the files; see above which.

    Args:
        tensors: by their name in a diffusers file, ``unet.….lora_A.weight``.
        configs: peft's, of each part of the model.
        pictures: those that were trained with.
        steps: after how many optimizer steps these tensors were taken.

    Raises:
        TrainingError: `training.diverged`; a weight is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError("training.diverged", f"the trained weights are not finite: {name}")
    spec = _modelspec(family, recipe)
    kohya = {**spec, **_ss(family, recipe, pictures, steps)}
    if recipe.adapter == "embedding":
        tensor_file.write(folder / EMBEDDING, tensors, spec, _DIGESTS)
        return [folder / EMBEDDING]
    if recipe.adapter == "oft":
        (prefix,) = configs
        return _write_peft(folder / OFT, tensors, prefix, configs[prefix], spec)
    diffusers = {**spec, **adapter_metadata(configs)}
    tensor_file.write(folder / DIFFUSERS, tensors, diffusers, _DIGESTS)
    files = [folder / DIFFUSERS]
    if recipe.adapter == "lokr":
        if family.name in _LYCORIS:
            renamed = lycoris(tensors, recipe.alpha, recipe.rank, _LYCORIS[family.name])
            tensor_file.write(folder / LYCORIS, renamed, kohya, _KOHYA_DIGESTS)
            files.append(folder / LYCORIS)
        return files
    for name, rename in family.exports().items():
        # empty where the other program has no words for it
        if renamed := rename(tensors, recipe.alpha):
            tensor_file.write(folder / name, renamed, kohya, _KOHYA_DIGESTS)
            files.append(folder / name)
    return files


def adapter_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """peft's configuration of each part of the model, where diffusers looks for it."""
    told = {
        f"{part}.{key}": _plain(value)
        for part, config in configs.items()
        for key, value in config.items()
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)}


def lycoris(tensors: Mapping[str, Any], alpha: float, rank: int, prefix: str) -> dict[str, Any]:
    """``unet.a.b.lokr_w1`` → ``PREFIX_a_b.lokr_w1``, and an alpha per layer.

    Its readers scale by alpha / rank only where a factor is stored as the product of two; where
    both are whole, that is put into one of them.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layer, leaf = name.rsplit(".", 1)
        layers.setdefault(layer, {})[leaf] = tensor
    renamed = {}
    for layer, leaves in layers.items():
        theirs = f"{prefix}_{layer.split('.', 1)[1].replace('.', '_')}"
        whole = "lokr_w1" in leaves and "lokr_w2" in leaves
        scale = alpha / rank if whole else 1.0
        for leaf, tensor in leaves.items():
            renamed[f"{theirs}.{leaf}"] = tensor * scale if leaf == "lokr_w1" else tensor
        renamed[f"{theirs}.alpha"] = torch.tensor(float(rank) if whole else alpha)
    return renamed


def _write_peft(
    folder: Path,
    tensors: Mapping[str, Any],
    prefix: str,
    config: Mapping[str, Any],
    spec: Mapping[str, str],
) -> list[Path]:
    folder.mkdir(exist_ok=True)
    weights, told = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    renamed = {_PEFT_PREFIX + name.removeprefix(f"{prefix}."): t for name, t in tensors.items()}
    tensor_file.write(weights, renamed, spec, _DIGESTS)
    told.write_text(
        json.dumps({key: _plain(value) for key, value in config.items()}, indent=1, sort_keys=True),
        encoding="utf-8",
    )
    return [weights, told]


def _modelspec(family: Family, recipe: Recipe) -> dict[str, str]:
    """(github.com/Stability-AI/ModelSpec, 1.0.1); without a date, for equal seeds, equal files."""
    kind = "textual-inversion" if recipe.adapter == "embedding" else "lora"
    said = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.trigger or "LoRA",
        "modelspec.trigger_phrase": recipe.trigger,
        "modelspec.resolution": f"{recipe.resolution}x{recipe.resolution}",
    }
    if family.name in DIFFUSION and recipe.prediction != "auto":
        said["modelspec.prediction_type"] = (
            "v" if recipe.prediction == "v_prediction" else "epsilon"
        )
    return said


def _ss(family: Family, recipe: Recipe, pictures: Sequence[Picture], steps: int) -> dict[str, str]:
    """What sd-scripts writes of these; web pages and user interfaces show it."""
    arguments = {"algo": "lokr", "factor": "-1"} if recipe.adapter == "lokr" else {}
    if recipe.adapter == "dora":
        arguments = {"dora_wd": "True"}
    said: dict[str, Any] = {
        "network_module": "lycoris.kohya" if recipe.adapter == "lokr" else "networks.lora",
        "network_dim": recipe.rank,
        "network_alpha": recipe.alpha,
        "base_model_version": family.kohya_version,
        "v2": family.name == "sd2",
        "resolution": f"({recipe.resolution}, {recipe.resolution})",
        "learning_rate": recipe.learning_rate,
        "unet_lr": recipe.learning_rate,
        "text_encoder_lr": recipe.text_encoder_rate or None,
        "optimizer": recipe.optimizer,
        "lr_scheduler": recipe.scheduler,
        "lr_warmup_steps": recipe.warmup_steps,
        "max_grad_norm": recipe.max_grad_norm,
        "batch_size_per_device": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "max_train_steps": recipe.steps,
        "steps": steps,
        "seed": recipe.seed,
        "min_snr_gamma": recipe.min_snr_gamma,
        "debiased_estimation": recipe.debiased,
        "noise_offset": recipe.noise_offset or None,
        "caption_dropout_rate": recipe.caption_dropout,
        "shuffle_caption": recipe.caption_shuffle,
        "keep_tokens": recipe.keep_tokens,
        "flip_aug": recipe.flip,
        "enable_bucket": True,
        "num_train_images": len(pictures),
        "num_reg_images": 0,
    }
    folder = recipe.trigger or "images"
    tags = Counter(
        tag.strip() for picture in pictures for tag in picture.caption.split(",") if tag.strip()
    )
    buckets = Counter(picture.bucket for picture in pictures)
    told = {
        "network_args": arguments,
        "dataset_dirs": {folder: {"n_repeats": 1, "img_count": len(pictures)}},
        "tag_frequency": {folder: dict(sorted(tags.items()))},
        "bucket_info": {
            "buckets": {
                str(number): {"resolution": list(bucket), "count": count}
                for number, (bucket, count) in enumerate(sorted(buckets.items()))
            }
        },
    }
    # its readers want the text None where there is nothing
    return {
        **{f"ss_{key}": str(value) for key, value in said.items()},
        **{f"ss_{key}": json.dumps(value) for key, value in told.items()},
    }


def _plain(value: Any) -> Any:
    """A value of peft's configuration as JSON keeps it."""
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, (str, int, float, bool, list, dict, type(None))):
        return value
    return str(value)
