"""A very small Anima: a diffusers folder, or one file as ComfyUI has it with folders beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Of the transformer: heads of 16 channels, for rotations of three axes.
HEADS, HEAD = 4, 16
TEXT_WIDTH = 32
#: Log variance of the latents: an untrained VAE would drown the image in its own noise.
_LOG_VARIANCE = -8.0


def write(out: Path, seed: int) -> None:
    """Write the model.

    Args:
        out: a folder; or a name that ends in .safetensors, for a file beside which the folders of
            what it lacks will lie.
    """
    parts = _parts(seed)
    if out.suffix != ".safetensors":
        _pipeline(parts).save_pretrained(str(out), overwrite_modular_index=False)
        return
    from gpu_agent.lora import tensor_file
    from gpu_agent.lora.families import anima

    tensors = {
        f"net.{anima.original(f'{component}.{name}')}": tensor
        for component in ("transformer", "text_conditioner")
        for name, tensor in parts[component].state_dict().items()
    }
    for component in ("text_encoder", "vae", "tokenizer", "t5_tokenizer"):
        parts[component].save_pretrained(out.parent / component)
    tensor_file.write(out, tensors, {"format": "pt"})


def _pipeline(parts: dict[str, Any]) -> Any:
    from diffusers import AnimaAutoBlocks

    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(**parts)
    return pipeline


def _parts(seed: int) -> dict[str, Any]:
    import torch
    from diffusers import (
        AnimaTextConditioner,
        AutoencoderKLQwenImage,
        CosmosTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen3Config, Qwen3Model

    from gpu_agent.lora.tiny import parts

    tokenizer, t5_tokenizer = _tokenizer(), parts.t5_tokenizer(512)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = CosmosTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            num_layers=2,
            text_embed_dim=TEXT_WIDTH,
            adaln_lora_dim=16,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        )
        conditioner = AnimaTextConditioner(
            source_dim=TEXT_WIDTH,
            target_dim=TEXT_WIDTH,
            model_dim=TEXT_WIDTH,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=len(t5_tokenizer),
        )
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        )
        vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
        vae.quant_conv.weight[16:] = 0
        vae.quant_conv.bias[16:] = _LOG_VARIANCE
    return {
        "transformer": transformer,
        "text_conditioner": conditioner,
        "text_encoder": text_encoder,
        "vae": vae,
        "tokenizer": tokenizer,
        "t5_tokenizer": t5_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _tokenizer() -> Any:
    """Qwen's, with nothing but its bytes and the word for padding."""
    from transformers import Qwen2Tokenizer

    from gpu_agent.lora.families.clip_words import byte_vocabulary

    words = {word: number for word, number in byte_vocabulary().items() if number < 256}
    return Qwen2Tokenizer(vocab={**words, "<|endoftext|>": 256}, merges=[])
