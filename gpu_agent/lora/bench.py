"""Makes a base model with random weights for `stoker bench trainer`.

::

    python -m gpu_agent.lora.bench OUT --family sd1 --size tiny|full

OUT becomes a diffusers folder, which every trainer reads. `full` has the published geometry of the
denoiser: 860 M parameters for sd1, 2.6 billion for sdxl, 11.9 billion for flux (24 GB of disk). How
fast a step is does not depend on the weights' values, nor, but for sd1, on encoders that run once:
those of sdxl and flux have few layers of the published widths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_agent.lora import families, tiny_base
from gpu_agent.lora.families import ldm
from gpu_agent.lora.families.clip_words import BYTE_WORDS, tokenizer_for
from gpu_agent.lora.hush import hush_libraries
from gpu_agent.lora.tiny import latent_diffusion, sd1

_SD1_WIDTHS = (32, 64, 128, 128)
#: Families whose published configuration is known without a download.
FULL = ("sd1", "sdxl", "flux")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_agent.lora.bench", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--size", default="tiny", choices=["tiny", "full"])
    asked = parser.parse_args(arguments)
    hush_libraries()
    if asked.size == "tiny":
        tiny(asked.out, asked.family)
    elif asked.family in FULL:
        full(asked.out, asked.family)
    else:
        parser.error(f"full is known for {', '.join(FULL)}, not for {asked.family}")


def tiny(out: Path, family: str) -> None:
    """The tests' tiny model, as a folder; of SD 1.x one of 8.6 M parameters of UNet and 1.4 M of
    VAE, with heads not quite so small."""
    if family == "sd1":
        unet = {"block_out_channels": _SD1_WIDTHS, "cross_attention_dim": sd1.TEXT_WIDTH}
        encoders = {"text_encoder": sd1.TEXT_WIDTH}
        latent_diffusion.write(out, 0, ldm.SD1, unet=unet, encoders=encoders, metadata={})
        return
    module = import_module(f"gpu_agent.lora.families.{families.family(family).module}")
    with tempfile.TemporaryDirectory() as work:
        made = tiny_base.write(Path(work) / "tiny.safetensors", 0, family)
        if made.is_dir():
            made.rename(out)
        else:
            module.pipeline(made, Path(work) / "config").save_pretrained(out)


def full(out: Path, family: str) -> None:
    {"sd1": _full_sd1, "sdxl": _full_sdxl, "flux": _full_flux}[family](out)


def _full_sdxl(out: Path) -> None:
    encoders = {
        encoder.component: width
        for encoder, width in zip(ldm.SDXL.encoders, (768, 1280), strict=True)
    }
    latent_diffusion.write(out, 0, ldm.SDXL, unet={}, encoders=encoders, metadata={})


def _full_flux(out: Path) -> None:
    import torch

    from gpu_agent.lora.tiny import flux  # imports diffusers

    before = torch.get_default_dtype()
    # as it is published; in fp32 it would be 48 GB
    torch.set_default_dtype(torch.bfloat16)
    try:
        flux.write_of(out, 0, flux_transformer(), clip=768, t5=4096)
    finally:
        torch.set_default_dtype(before)


def flux_transformer() -> Any:
    """FLUX.1 dev's, by diffusers' own defaults."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _full_sd1(out: Path) -> None:
    """Stable Diffusion 1.5 as it is published, but untrained and with CLIP's bytes for words."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(folder: str) -> dict[str, Any]:
        return ldm.SD1.template(f"{folder}/config.json")

    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config("unet")).save_pretrained(out / "unet")
    AutoencoderKL.from_config(config("vae")).save_pretrained(out / "vae")
    text = CLIPTextConfig(**config("text_encoder"))
    CLIPTextModel(text).save_pretrained(out / "text_encoder")
    length = text.max_position_embeddings
    tokenizer_for(BYTE_WORDS, length, out).save_pretrained(out / "tokenizer")
    scheduler = DDIMScheduler.from_config(ldm.SD1.template("scheduler/scheduler_config.json"))
    scheduler.save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(ldm.SD1.template("model_index.json")))


if __name__ == "__main__":
    main()
