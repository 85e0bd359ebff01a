"""Stable Diffusion 1.x and 2.x: a UNet of noise or velocity, CLIP's text encoder, a VAE of 8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import ldm, naming
from gpu_agent.lora.families.base import ATTENTION, Conditions, Model, check_whole, settle
from gpu_agent.lora.families.clip_words import tokenizer_for
from gpu_agent.lora.objective import Diffusion
from gpu_agent.recipe import Recipe

#: What sd-scripts trains: every linear layer and 1x1 convolution inside a Transformer2DModel.
FULL = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]

EXPORTS = {naming.KOHYA: naming.kohya}


class StableDiffusion(Model):
    """A loaded SD 1.x or 2.x model. Conditions: `text` (n, 77, width)."""

    prefix = "unet"
    adaptable_encoders = ("text_encoder",)
    sample_guidance = 7.5
    objective: Diffusion

    def __init__(self, *, tokenizer: Any, **parts: Any) -> None:
        super().__init__(**parts)
        self.tokenizer = tokenizer

    def targets(self, preset: str) -> list[str]:
        return FULL if preset == "full" else ATTENTION

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"text": self.text_encoders["text_encoder"](words.to(self.device))[0]}

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(noisy, self.objective.times(levels), conditions["text"]).sample


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> StableDiffusion:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    try:
        if base.is_dir():
            parts, beside = _from_folder(base, dtype), base
        else:
            parts, beside = _from_file(base, work / "base_config", dtype), base.parent
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError("model.unreadable", f"{base.name} cannot be loaded: {error}") from error
    unet, vae, text_encoder, scheduler = parts
    for part in (unet, vae, text_encoder):
        check_whole(base, part)
        settle(part)
    config = text_encoder.config
    model = StableDiffusion(
        denoiser=unet.to(device),
        vae=vae.to(device),
        text_encoders={"text_encoder": text_encoder.to(device)},
        tokenizer=tokenizer_for(config.vocab_size, config.max_position_embeddings, beside),
        objective=Diffusion(scheduler.config, recipe.prediction, device),
        device=device,
    )
    model.freeze()
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    if base.is_dir():
        return StableDiffusionPipeline.from_pretrained(
            base, local_files_only=True, safety_checker=None
        )
    header = ldm.read_header(base)
    text = ldm.configs(header)["text_encoder"]
    return StableDiffusionPipeline.from_single_file(
        str(base),
        config=str(ldm.write_folder(header, work)),
        tokenizer=tokenizer_for(text["vocab_size"], text["max_position_embeddings"], base.parent),
        local_files_only=True,
        safety_checker=None,
    )


def _from_file(base: Path, configs: Path, dtype: Any) -> tuple[Any, Any, Any, Any]:
    folder = str(ldm.write_folder(ldm.read_header(base), configs))
    tensors = load_file(base)
    ours = {"config": folder, "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(
        tensors, subfolder="unet", torch_dtype=dtype, **ours
    )
    vae = AutoencoderKL.from_single_file(
        tensors, subfolder="vae", torch_dtype=torch.float32, **ours
    )
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
    _fill(text_encoder, ldm.text_tensors(tensors))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return unet, vae, text_encoder, scheduler


def _fill(text_encoder: Any, tensors: dict[str, Any]) -> None:
    # transformers 4 says text_model.…, transformers 5 does not
    wrapped = any(name.startswith("text_model.") for name in text_encoder.state_dict())
    prefix = "text_model." if wrapped else ""
    text_encoder.load_state_dict(
        {prefix + name: tensor.float() for name, tensor in tensors.items()}, strict=True
    )


def _from_folder(base: Path, dtype: Any) -> tuple[Any, Any, Any, Any]:
    whole = {"local_files_only": True, "torch_dtype": torch.float32}
    text_encoder, told = CLIPTextModel.from_pretrained(
        base, subfolder="text_encoder", output_loading_info=True, **whole
    )
    if told["missing_keys"]:
        raise ValueError(f"the text encoder lacks {sorted(told['missing_keys'])[:3]}")
    return (
        UNet2DConditionModel.from_pretrained(
            base, subfolder="unet", local_files_only=True, torch_dtype=dtype
        ),
        AutoencoderKL.from_pretrained(base, subfolder="vae", **whole),
        text_encoder,
        DDIMScheduler.from_pretrained(base, subfolder="scheduler"),
    )
