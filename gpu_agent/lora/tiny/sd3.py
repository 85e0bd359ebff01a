"""A very small SD 3.5 medium: a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from gpu_agent.lora.families.clip_words import BYTE_WORDS, OPEN_CLIP_PAD, tokenizer_for
from gpu_agent.lora.tiny import parts

_HEAD = 32
_HEADS = 2
#: The CLIP encoders' widths must differ: by them readers tell the two apart.
_CLIP_L, _CLIP_G, _T5 = 32, 64, 128
_POSITIONS = 77
_LONGEST = 256


def write(out: Path, seed: int) -> None:
    """Write the model; the folder appears whole or not at all."""
    words = parts.t5_tokenizer(_LONGEST)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=parts.vae(scaling=1.5305, shift=0.0609),
            text_encoder=parts.clip(_CLIP_L, projected=True),
            tokenizer=tokenizer_for(BYTE_WORDS, _POSITIONS, out.parent),
            text_encoder_2=parts.clip(_CLIP_G, act="gelu", projected=True),
            tokenizer_2=tokenizer_for(BYTE_WORDS, _POSITIONS, out.parent, pad=OPEN_CLIP_PAD),
            text_encoder_3=parts.t5(_T5, len(words)),
            tokenizer_3=words,
            transformer=SD3Transformer2DModel(
                sample_size=8,
                num_layers=2,
                attention_head_dim=_HEAD,
                num_attention_heads=_HEADS,
                joint_attention_dim=_T5,
                caption_projection_dim=_HEADS * _HEAD,
                pooled_projection_dim=_CLIP_L + _CLIP_G,
                pos_embed_max_size=8,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
        )
        # as in the published models, whose pooled words of CLIP-L are not projected
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(_CLIP_L))
    parts.write(pipeline, out)
