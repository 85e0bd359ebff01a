"""A very small Lumina Image 2.0: a diffusers folder, or one file as ComfyUI has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Channels: of the transformer, four heads of 12 (rotations of three axes), and of the text.
WIDTH = 48
TEXT_WIDTH = 32


def write(out: Path, seed: int) -> None:
    """Write the model.

    Args:
        out: a folder; or a name that ends in .safetensors, for a file beside which the tokenizer's
            folder will lie.
    """
    from gpu_agent.lora.tiny import parts

    pipeline = _pipeline(seed)
    if out.suffix != ".safetensors":
        parts.write(pipeline, out)
        return
    from gpu_agent.lora import tensor_file
    from gpu_agent.lora.families import ldm, lumina2, single_file

    tensors = {
        single_file.DENOISER[0] + name: tensor
        for name, tensor in lumina2.originals(pipeline.transformer)
    }
    levels = len(pipeline.vae.config["block_out_channels"])
    for name, tensor in pipeline.vae.state_dict().items():
        # the original's attention is made of 1x1 convolutions
        convolution = ".attentions." in name and tensor.ndim == 2
        stored = tensor[:, :, None, None] if convolution else tensor
        tensors[f"vae.{ldm.vae_name(name, levels=levels)}"] = stored
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[lumina2.GEMMA[0] + name] = tensor
    tensor_file.write(out, tensors, {"format": "pt"})
    pipeline.tokenizer.save_pretrained(out.parent / "tokenizer")


def _pipeline(seed: int) -> Any:
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    from gpu_agent.lora.tiny import parts

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        transformer = Lumina2Transformer2DModel(
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            axes_dim_rope=(4, 4, 4),
            cap_feat_dim=TEXT_WIDTH,
        )
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
        )
        vae = parts.vae(scaling=0.3611, shift=0.1159)
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def _tokenizer() -> Any:
    """Gemma's, with nothing but its special words and bytes."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], add_bos_token=True
    )
