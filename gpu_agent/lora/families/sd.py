"""Stable Diffusion 1.x and 2.x: a UNet of noise or velocity, CLIP's text encoder, a VAE of 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_agent.lora.deep_convs import as_products
from gpu_agent.lora.families import ldm, naming
from gpu_agent.lora.families.base import ATTENTION, Conditions, Model, reading
from gpu_agent.lora.families.clip_words import (
    HUGGING_FACE_PAD,
    OPEN_CLIP_PAD,
    clip_reads,
    tokenizer_for,
)
from gpu_agent.lora.families.single_file import placed
from gpu_agent.lora.objective import Diffusion
from gpu_agent.recipe import Recipe

#: What sd-scripts trains: every linear layer and 1x1 convolution inside a Transformer2DModel.
FULL = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]

EXPORTS = {naming.KOHYA: naming.kohya}

_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
#: An SD 2.x file does not say what it predicts. ComfyUI tells by this tensor, whose deviation is
#: above this in the published models of velocity (`SD20.model_type` of its supported models).
_TELLTALE = f"{ldm.UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_VELOCITY_ABOVE = 0.09


class UNetModel(Model):
    """What SD 1.x, SD 2.x and SDXL share."""

    prefix = "unet"
    objective: Diffusion

    def __init__(self, *, tokenizers: Mapping[str, Any], **parts: Any) -> None:
        super().__init__(**parts)
        self.tokenizers = dict(tokenizers)
        self.reads = clip_reads(self.tokenizers["text_encoder"])

    def targets(self, preset: str) -> list[str]:
        return FULL if preset == "full" else ATTENTION

    def blocks(self) -> list[Any]:
        unet = self.denoiser
        return [
            block
            for part in (unet.down_blocks, unet.mid_block, unet.up_blocks)
            for block in part.modules()
            if isinstance(block, BasicTransformerBlock)
        ]

    def words(self, encoder: str, texts: Sequence[str]) -> Any:
        """The numbers of the texts' tokens, (n, 77), as this encoder takes them."""
        tokenizer = self.tokenizers[encoder]
        found = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return found.input_ids.to(self.device)


class StableDiffusion(UNetModel):
    """A loaded SD 1.x or 2.x model. Conditions: `text` (n, 77, width)."""

    adaptable_encoders = ("text_encoder",)
    sample_guidance = 7.5

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words = self.words("text_encoder", texts)
        return {"text": self.text_encoders["text_encoder"](words)[0]}

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(noisy, self.objective.times(levels), conditions["text"]).sample


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> StableDiffusion:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    model: StableDiffusion = read(base, work, dtype).model(StableDiffusion, recipe, device)
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    return diffusers_pipeline(StableDiffusionPipeline, base, work, safety_checker=None)


# --- what all families with LDM's files share -------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The components of a base on the CPU; `scheduler` is its configuration."""

    base: Path
    unet: Any
    vae: Any
    encoders: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    def model(self, kind: type[UNetModel], recipe: Recipe, device: Any) -> Any:
        beside = self.base if self.base.is_dir() else self.base.parent
        model = kind(
            denoiser=placed(self.base, self.unet, device),
            vae=placed(self.base, self.vae, device),
            text_encoders={
                name: placed(self.base, part, device) for name, part in self.encoders.items()
            },
            tokenizers={
                name: _tokenizer(name, part.config.to_dict(), beside)
                for name, part in self.encoders.items()
            },
            objective=Diffusion(self.scheduler, recipe.prediction, device),
            device=device,
        )
        model.freeze()
        if device.type == "cpu":
            as_products(model.denoiser)
        return model


def read(base: Path, work: Path, dtype: Any) -> Parts:
    """Read a single file or a diffusers folder; the UNet in `dtype`, what is used once in fp32.

    Raises:
        ModelError: weights are missing or of the wrong shape.
    """
    with reading(base):
        if base.is_dir():
            return _from_folder(base, dtype)
        return _from_file(base, work / "base_config", dtype)


def diffusers_pipeline(kind: Any, base: Path, work: Path, **more: Any) -> Any:
    """The base as a pipeline of this class."""
    if base.is_dir():
        return kind.from_pretrained(
            base, local_files_only=True, variant=_variant(base / "unet"), **more
        )
    header = ldm.read_header(base)
    configs = ldm.configs(header)
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): _tokenizer(name, config, base.parent)
        for name, config in configs.items()
        if name.startswith("text_encoder")
    }
    config = str(ldm.write_folder(header, work))
    # diffusers knows how many layers SD 2.x does without only for the real one
    encoders = _file_encoders(config, load_file(base)) if _is_sd2(header) else {}
    return kind.from_single_file(
        str(base), config=config, local_files_only=True, **tokenizers, **encoders, **more
    )


def _is_sd2(header: ldm.Header) -> bool:
    return ldm.layout_of(header.shapes) is ldm.SD2


def _tokenizer(encoder: str, config: Mapping[str, Any], beside: Path) -> Any:
    # OpenAI's CLIP is told from OpenCLIP's by its activation
    openai = config["hidden_act"] == "quick_gelu"
    return tokenizer_for(
        config["vocab_size"],
        config["max_position_embeddings"],
        beside,
        folder=encoder.replace("text_encoder", "tokenizer"),
        pad=HUGGING_FACE_PAD if openai else OPEN_CLIP_PAD,
    )


def _from_file(base: Path, configs: Path, dtype: Any) -> Parts:
    header = ldm.read_header(base)
    folder = str(ldm.write_folder(header, configs))
    tensors = load_file(base)
    ours = {"config": folder, "local_files_only": True}
    scheduler = dict(DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config)
    if _is_sd2(header) and float(tensors[_TELLTALE].float().std()) > _VELOCITY_ABOVE:
        scheduler["prediction_type"] = "v_prediction"
    return Parts(
        base=base,
        unet=UNet2DConditionModel.from_single_file(
            tensors, subfolder="unet", torch_dtype=dtype, **ours
        ),
        vae=AutoencoderKL.from_single_file(
            tensors, subfolder="vae", torch_dtype=torch.float32, **ours
        ),
        encoders=_file_encoders(folder, tensors),
        scheduler=scheduler,
    )


def _file_encoders(folder: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for encoder in ldm.layout_of(tensors).encoders:
        config = CLIPTextConfig.from_pretrained(folder, subfolder=encoder.component)
        part = _ENCODERS[encoder.component](config)
        said = ldm.text_tensors(tensors, encoder)
        # transformers 4 says text_model.…, transformers 5 does not everywhere
        wanted = {name: name.removeprefix("text_model.") for name in part.state_dict()}
        part.load_state_dict({name: said[plain].float() for name, plain in wanted.items()})
        found[encoder.component] = part
    return found


def _variant(component: Path) -> str | None:
    """`fp16` where nothing but the files of half precision was fetched, as SDXL's often are."""
    weights = [file.name for file in component.glob("*.safetensors")]
    return "fp16" if weights and all(".fp16." in name for name in weights) else None


def _from_folder(base: Path, dtype: Any) -> Parts:
    whole = {"local_files_only": True, "torch_dtype": torch.float32}
    encoders = {}
    for name, kind in _ENCODERS.items():
        if not (base / name).is_dir():
            continue
        encoders[name], told = kind.from_pretrained(
            base, subfolder=name, variant=_variant(base / name), output_loading_info=True, **whole
        )
        if told["missing_keys"]:
            raise ValueError(f"the {name} lacks {sorted(told['missing_keys'])[:3]}")
    return Parts(
        base=base,
        unet=UNet2DConditionModel.from_pretrained(
            base,
            subfolder="unet",
            variant=_variant(base / "unet"),
            local_files_only=True,
            torch_dtype=dtype,
        ),
        vae=AutoencoderKL.from_pretrained(
            base, subfolder="vae", variant=_variant(base / "vae"), **whole
        ),
        encoders=encoders,
        scheduler=dict(DDIMScheduler.from_pretrained(base, subfolder="scheduler").config),
    )
