"""SDXL: Stable Diffusion's scheme with a larger UNet, two text encoders and a framing.

The framing tells the UNet how large a picture was, where it was cut, and how large it is now
(arXiv:2307.01952, section 2.2). Its VAE overflows in fp16 and runs in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from gpu_agent.lora.families import ldm, naming
from gpu_agent.lora.families.base import Conditions
from gpu_agent.lora.families.sd import UNetModel, diffusers_pipeline, read
from gpu_agent.recipe import Recipe

_KOHYA_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


class StableDiffusionXL(UNetModel):
    """A loaded SDXL model.

    Conditions: `text` (n, 77, widths of both encoders), `pooled` (n, width of the second), and
    `framing` (n, 6).
    """

    adaptable_encoders = ("text_encoder", "text_encoder_2")
    sample_guidance = 6.0

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        said = []
        for name, encoder in self.text_encoders.items():
            told = encoder(self.words(name, texts), output_hidden_states=True)
            # the last layer is left out
            said.append(told.hidden_states[-2])
        return {"text": torch.cat(said, dim=-1), "pooled": told.text_embeds}

    def framing(self, original: tuple[int, int], bucket: tuple[int, int]) -> Conditions:
        """Size, place and new size of the middle that is cut out, each height first."""
        scale = max(bucket[0] / original[0], bucket[1] / original[1])
        left, top = (
            max(0, round((before * scale - after) / 2))
            for before, after in zip(original, bucket, strict=True)
        )
        numbers = [*reversed(original), top, left, *reversed(bucket)]
        return {"framing": torch.tensor(numbers, dtype=torch.float32)}

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(
            noisy,
            self.objective.times(levels),
            conditions["text"],
            added_cond_kwargs={
                "text_embeds": conditions["pooled"],
                "time_ids": conditions["framing"],
            },
        ).sample


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> StableDiffusionXL:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    model: StableDiffusionXL = read(base, work, dtype).model(StableDiffusionXL, recipe, device)
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    return diffusers_pipeline(StableDiffusionXLPipeline, base, work)


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """As sd-scripts names them: blocks as LDM counts them, the text encoders numbered."""

    def layer_name(layer: str) -> str:
        part, rest = layer.split(".", 1)
        if part == "unet":
            # the upsamplers' places, which depend on `attends`, have no layers that are trained
            theirs = ldm.unet_name(f"{rest}.weight", layers=2, attends=(True, True, False))
            return f"lora_unet_{theirs.removesuffix('.weight').replace('.', '_')}"
        inside = rest.removeprefix("text_model.").replace(".", "_")
        return f"{_KOHYA_ENCODERS[part]}_text_model_{inside}"

    return naming.renamed(tensors, alpha, layer_name)


EXPORTS = {naming.KOHYA: kohya}
