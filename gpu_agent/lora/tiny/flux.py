"""A very small FLUX.1 dev: a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from gpu_agent.lora.families.clip_words import BYTE_WORDS, tokenizer_for
from gpu_agent.lora.tiny import parts

#: Channels of a head, of which 4, 14 and 14 say where a token is.
_HEAD = 32
_HEADS = 2
_CLIP, _T5 = 32, 64
_POSITIONS = 77
_LONGEST = 512


def write(out: Path, seed: int) -> None:
    """Write the model; the folder appears whole or not at all."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=_HEAD,
            num_attention_heads=_HEADS,
            joint_attention_dim=_T5,
            pooled_projection_dim=_CLIP,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        )
    write_of(out, seed, transformer, clip=_CLIP, t5=_T5)


def write_of(out: Path, seed: int, transformer: Any, *, clip: int, t5: int) -> None:
    """Write a model of this transformer, whose encoders have these widths and few layers."""
    words = parts.t5_tokenizer(_LONGEST)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=parts.vae(scaling=0.3611, shift=0.1159),
            text_encoder=parts.clip(clip),
            tokenizer=tokenizer_for(BYTE_WORDS, _POSITIONS, out.parent),
            text_encoder_2=parts.t5(t5, len(words)),
            tokenizer_2=words,
            transformer=transformer,
        )
    parts.write(pipeline, out)
