"""A very small HunyuanImage 2.1: a diffusers folder, or its transformer in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Channels: of the transformer, of the text, of the letters.
WIDTH = 32
TEXT_WIDTH = 32
LETTER_WIDTH = 32
#: Of each halving but the first (normalisation groups of 32); the last is twice the latents'.
VAE_WIDTHS = (32, 32, 32, 32, 32, 32)
LATENT_CHANNELS = 16
#: Of the text with its template, and of letters; the real ones would take most of the time.
TOKENS, LETTERS = 192, 32


def write(out: Path, seed: int) -> None:
    """Write the model.

    Args:
        out: a folder; or a name that ends in .safetensors, for a file beside which the other
            components' folders will lie.
    """
    from gpu_agent.lora.tiny import parts

    pipeline = _pipeline(seed)
    if out.suffix != ".safetensors":
        parts.write(pipeline, out)
        return
    from gpu_agent.lora import tensor_file
    from gpu_agent.lora.families import hunyuanimage

    tensor_file.write(out, dict(hunyuanimage.originals(pipeline.transformer)), {"format": "pt"})
    for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        getattr(pipeline, name).save_pretrained(out.parent / name)


def _pipeline(seed: int) -> Any:
    import torch
    from diffusers import (
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        T5Config,
        T5EncoderModel,
    )

    tokenizer, tokenizer_2 = _tokenizer(), ByT5Tokenizer(model_max_length=LETTERS)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = HunyuanImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=1,
            attention_head_dim=WIDTH,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=LETTER_WIDTH,
            rope_axes_dim=(WIDTH // 2, WIDTH // 2),
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": TEXT_WIDTH,
                    "intermediate_size": TEXT_WIDTH,
                    "num_hidden_layers": 3,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e6,
                        "mrope_section": [4, 6, 6],
                    },
                    **heads,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": TEXT_WIDTH,
                    "intermediate_size": TEXT_WIDTH,
                    "out_hidden_size": TEXT_WIDTH,
                    "num_heads": 2,
                    "fullatt_block_indexes": [0],
                },
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=LETTER_WIDTH,
                d_kv=LETTER_WIDTH,
                d_ff=LETTER_WIDTH,
                num_layers=1,
                num_heads=1,
                feed_forward_proj="gated-gelu",
            )
        )
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=VAE_WIDTHS,
            layers_per_block=1,
            spatial_compression_ratio=32,
            sample_size=384,
            scaling_factor=0.75289,
        )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )


def _tokenizer() -> Any:
    """Qwen's, with nothing but its special words and bytes."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    from gpu_agent.lora.families.clip_words import byte_vocabulary

    letters = [word for word in byte_vocabulary() if len(word) == 1]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate([*letters, *special])},
        merges=[],
        model_max_length=TOKENS,
    )
    tokenizer.add_tokens([AddedToken(word, special=True) for word in special])
    return tokenizer
