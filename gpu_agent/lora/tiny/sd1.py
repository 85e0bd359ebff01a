"""A very small SD 1.x model."""

from __future__ import annotations

from pathlib import Path

from gpu_agent.lora.families import ldm
from gpu_agent.lora.tiny import latent_diffusion

#: Multiples of 32 (normalisation groups) and of 8 (attention heads).
UNET_WIDTHS = (32, 64, 64, 64)
TEXT_WIDTH = 64


def write(out: Path, seed: int) -> None:
    """Write the model; a file appears whole or not at all."""
    latent_diffusion.write(
        out,
        seed,
        ldm.SD1,
        unet={"block_out_channels": UNET_WIDTHS, "cross_attention_dim": TEXT_WIDTH},
        encoders={"text_encoder": TEXT_WIDTH},
        # the notes that Civitai's own files carry, so that readers of them meet them here too
        metadata={"modelspec.architecture": "stable-diffusion-v1"},
    )
