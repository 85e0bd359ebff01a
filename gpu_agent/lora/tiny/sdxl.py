"""A very small SDXL model."""

from __future__ import annotations

from pathlib import Path

from gpu_agent.lora.families import ldm
from gpu_agent.lora.tiny import latent_diffusion

#: Multiples of 64 (attention heads).
UNET_WIDTHS = (64, 128)
#: Different ones: that is how diffusers tells the encoders of a file apart.
TEXT_WIDTHS = {"text_encoder": 64, "text_encoder_2": 128}
#: Channels of each of the framing's six numbers.
_FRAMING = 32


def write(out: Path, seed: int) -> None:
    """Write the model; a file appears whole or not at all."""
    latent_diffusion.write(
        out,
        seed,
        ldm.SDXL,
        unet={
            "block_out_channels": UNET_WIDTHS,
            "attention_head_dim": [width // 64 for width in UNET_WIDTHS],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 1],
            "cross_attention_dim": sum(TEXT_WIDTHS.values()),
            "addition_time_embed_dim": _FRAMING,
            "projection_class_embeddings_input_dim": TEXT_WIDTHS["text_encoder_2"] + 6 * _FRAMING,
        },
        encoders=TEXT_WIDTHS,
        metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base"},
    )
