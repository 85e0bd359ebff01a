"""A very small SD 2.x model of velocity."""

from __future__ import annotations

from pathlib import Path

from gpu_agent.lora.families import ldm
from gpu_agent.lora.tiny import latent_diffusion

#: Multiples of 32 (normalisation groups); an attention head has at most 64.
UNET_WIDTHS = (32, 64, 64, 64)
TEXT_WIDTH = 64


def write(out: Path, seed: int) -> None:
    """Write the model; a file appears whole or not at all."""
    latent_diffusion.write(
        out,
        seed,
        ldm.SD2,
        unet={
            "block_out_channels": UNET_WIDTHS,
            "down_block_types": ["CrossAttnDownBlock2D"] + ["DownBlock2D"] * 3,
            "up_block_types": ["UpBlock2D"] * 3 + ["CrossAttnUpBlock2D"],
            "attention_head_dim": [1, 1, 1, 1],
            "cross_attention_dim": TEXT_WIDTH,
        },
        encoders={"text_encoder": TEXT_WIDTH},
        metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"},
        prediction="v_prediction",
    )
