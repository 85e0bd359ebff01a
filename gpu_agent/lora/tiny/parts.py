"""Very small components that several families have in common, with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from gpu_agent.lora.families.clip_words import BYTE_WORDS

_VAE_WIDTHS = (32, 32, 32, 64)
_LATENTS = 16
#: Log variance of the latents: an untrained VAE would drown the image in its own noise.
_LOG_VARIANCE = -8.0


def vae(*, scaling: float, shift: float) -> Any:
    """An `AutoencoderKL` of 16 channels and factor 8, as SD3 and FLUX.1 have."""
    made = AutoencoderKL(
        block_out_channels=_VAE_WIDTHS,
        down_block_types=["DownEncoderBlock2D"] * len(_VAE_WIDTHS),
        up_block_types=["UpDecoderBlock2D"] * len(_VAE_WIDTHS),
        layers_per_block=1,
        latent_channels=_LATENTS,
        sample_size=64,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    made.encoder.conv_out.weight[_LATENTS:] = 0
    made.encoder.conv_out.bias[_LATENTS:] = _LOG_VARIANCE
    return made


def clip(width: int, *, act: str = "quick_gelu", projected: bool = False) -> Any:
    """A CLIP text encoder of two layers, whose vocabulary is CLIP's without merges."""
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_attention_heads=max(1, width // 64),
        num_hidden_layers=2,
        hidden_act=act,
        vocab_size=BYTE_WORDS,
        bos_token_id=BYTE_WORDS - 2,
        eos_token_id=BYTE_WORDS - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int, words: int) -> Any:
    """A T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def t5_tokenizer(length: int) -> Any:
    """T5's tokenizer with a vocabulary of single ASCII characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(0x21, 0x7F)]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=length)


def write(pipeline: Any, out: Path) -> None:
    """Write a diffusers folder, which appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        whole = Path(scratch) / out.name
        pipeline.save_pretrained(whole)
        whole.rename(out)
