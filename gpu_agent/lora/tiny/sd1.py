"""A very small SD 1.x model: one safetensors in the LDM layout that Civitai serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_agent.lora import tensor_file
from gpu_agent.lora.families import ldm
from gpu_agent.lora.families.clip_words import BYTE_WORDS

#: Multiples of 32 (normalisation groups) and of 8 (attention heads).
UNET_WIDTHS = (32, 64, 64, 64)
VAE_WIDTHS = (32, 32, 64, 64)
TEXT_WIDTH = 64
#: Log variance of the latents: an untrained VAE would drown the image in its own noise.
_LOG_VARIANCE = -8.0


def write(out: Path, seed: int) -> None:
    """Write the model; the file appears whole or not at all."""
    # the notes that Civitai's own files carry, so that readers of them meet them here too
    metadata = {"format": "pt", "modelspec.architecture": "stable-diffusion-v1"}
    tensor_file.write(out, dict(_tensors(seed)), metadata)


def _tensors(seed: int) -> Iterator[tuple[str, Any]]:
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        unet, vae, text = _unet(), _vae(), _text_encoder()
    layers = unet.config["layers_per_block"]
    attends = tuple("CrossAttn" in kind for kind in unet.config["up_block_types"])
    for name, tensor in unet.state_dict().items():
        yield ldm.UNET + ldm.unet_name(name, layers=layers, attends=attends), tensor
    for name, tensor in vae.state_dict().items():
        # LDM's VAE attention is made of 1x1 convolutions
        convolution = ".attentions." in name and tensor.ndim == 2
        stored = tensor[:, :, None, None] if convolution else tensor
        yield ldm.VAE + ldm.vae_name(name, levels=len(VAE_WIDTHS)), stored
    for name, tensor in text.state_dict().items():
        plain = name.removeprefix("text_model.")
        yield f"{ldm.TEXT}text_model.{plain}", tensor


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    config = ldm.template("unet/config.json")
    config.update(block_out_channels=UNET_WIDTHS, cross_attention_dim=TEXT_WIDTH)
    return UNet2DConditionModel.from_config(config)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    config = ldm.template("vae/config.json")
    config.update(block_out_channels=VAE_WIDTHS)
    vae = AutoencoderKL.from_config(config)
    channels = config["latent_channels"]
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = _LOG_VARIANCE
    return vae


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = ldm.template("text_encoder/config.json")
    config.update(
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_attention_heads=1,
        num_hidden_layers=2,
        vocab_size=BYTE_WORDS,
        bos_token_id=BYTE_WORDS - 2,
        eos_token_id=BYTE_WORDS - 1,
    )
    return CLIPTextModel(CLIPTextConfig(**config))
