"""FLUX.1 dev and schnell: a rectified flow of 2x2 packed latents, CLIP's pooled words and T5's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, naming, single_file, t5
from gpu_agent.lora.families.base import ATTENTION, JOINT, Conditions, Model, reading
from gpu_agent.lora.families.clip_words import tokenizer_for
from gpu_agent.lora.families.single_file import CLIP_L, VAE, Part, Place, Source
from gpu_agent.lora.objective import Flow, flux_shift
from gpu_agent.recipe import Recipe

#: What the distilled guidance of the dev model is told in sample images, as in diffusers.
_SAMPLE_GUIDANCE = 3.5
#: Words of T5 that the two models were trained with.
_WORDS_DEV, _WORDS_SCHNELL = 512, 256
_VAE_SCALING, _VAE_SHIFT = 0.3611, 0.1159

#: Every linear layer inside the blocks, which is what sd-scripts trains.
_FULL = (
    r"(single_)?transformer_blocks\.\d+\.("
    r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"norm1?(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


class Flux(Model):
    """A loaded FLUX.1. Conditions: `text` (n, 512 or 256, width) and `pooled` (n, width)."""

    block_lists = ("transformer_blocks", "single_transformer_blocks")
    adaptable_encoders = ("text_encoder",)
    objective: Flow

    def __init__(self, *, tokenizer: Any, tokenizer_2: Any, recipe: Recipe, **parts: Any) -> None:
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self._distilled = bool(self.denoiser.config["guidance_embeds"])
        self._guidance = recipe.guidance
        self._length = _WORDS_DEV if self._distilled else _WORDS_SCHNELL
        self.reads = tokenizer_2, self._length - 1  # the last one says that it ends
        # schnell was distilled for levels at equal distances
        self.sample_shift = flux_shift(recipe.resolution**2) if self._distilled else 1.0

    def targets(self, preset: str) -> list[str] | str:
        return _FULL if preset == "full" else [*ATTENTION, *JOINT]

    @property
    def side_factor(self) -> int:
        return 2 * self.latent_factor

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        pooled = self.text_encoders["text_encoder"](words.to(self.device)).pooler_output
        long = t5.encode(
            self.text_encoders["text_encoder_2"], self.tokenizer_2, texts, self._length, self.device
        )
        return {"text": long, "pooled": pooled}

    def losses(
        self, latents: Any, noise: Any, levels: Any, conditions: Conditions, mask: Any = None
    ) -> Any:
        told = {**conditions, "guidance": torch.full_like(levels, self._guidance)}
        return super().losses(latents, noise, levels, told, mask)

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        """As in `Model`; who trains says the guidance among the conditions."""
        guidance = conditions.get("guidance", torch.full_like(levels, _SAMPLE_GUIDANCE))
        height, width = noisy.shape[-2:]
        said = self.denoiser(
            hidden_states=packed(noisy),
            timestep=levels,
            guidance=guidance if self._distilled else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["text"],
            txt_ids=torch.zeros((conditions["text"].shape[1], 3), device=noisy.device),
            img_ids=_places(height // 2, width // 2, noisy.device),
        ).sample
        return unpacked(said, height, width)


def packed(latents: Any) -> Any:
    """(n, c, h, w) → (n, h/2 · w/2, 4 c): squares of 2x2 in one token."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpacked(tokens: Any, height: int, width: int) -> Any:
    """What `packed` did, undone."""
    count, _, channels = tokens.shape
    squares = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, height, width)


def _places(rows: int, columns: int, device: Any) -> Any:
    """Of each token, (rows · columns, 3): 0, its row, its column."""
    grid = torch.meshgrid(
        torch.zeros(1, device=device),
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack(grid, dim=-1).view(-1, 3)


# --- loading ------------------------------------------------------------------------------------


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> Flux:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    parts = _parts(base, device, dtype)
    model = Flux(
        denoiser=parts["transformer"],
        vae=parts["vae"],
        text_encoders={name: parts[name] for name in ("text_encoder", "text_encoder_2")},
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer_2"],
        recipe=recipe,
        objective=Flow(),
        device=device,
    )
    model.freeze()
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    if base.is_dir():
        return FluxPipeline.from_pretrained(base, local_files_only=True)
    parts = _parts(base, torch.device("cpu"), torch.float32)
    dynamic = parts["transformer"].config["guidance_embeds"]
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic
    )
    return FluxPipeline(scheduler=scheduler, **parts)


def _parts(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """By diffusers' names of components. Raises: ModelError."""
    with reading(base):
        parts = _read(base, dtype)
    taken, made = parts["transformer"].config["in_channels"], parts["vae"].config["latent_channels"]
    if taken != 4 * made:
        raise ModelError(
            "model.family",
            "the denoiser takes more than latents: fill, depth and canny models are not trained",
        )
    return {
        name: single_file.placed(base, part, device, waits=name == "transformer")
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in parts.items()
    }


def _read(base: Path, dtype: Any) -> dict[str, Any]:
    source = Source(base, family("flux").repository)
    denoiser, eyes, short = source.denoiser(), source.part(VAE), source.part(CLIP_L)
    text_encoder = (
        single_file.clip(short, projected=False)
        if short
        else source.encoder(CLIPTextModel, "text_encoder", torch.float32)
    )
    words = text_encoder.config
    return {
        "transformer": _transformer(denoiser, dtype)
        if denoiser
        else source.get(FluxTransformer2DModel.from_pretrained, "transformer", torch_dtype=dtype),
        "vae": single_file.vae(eyes, scaling=_VAE_SCALING, shift=_VAE_SHIFT)
        if eyes
        else source.get(AutoencoderKL.from_pretrained, "vae", torch_dtype=torch.float32),
        "text_encoder": text_encoder,
        "text_encoder_2": t5.encoder(source, "text_encoder_2", dtype),
        "tokenizer": tokenizer_for(words.vocab_size, words.max_position_embeddings, source.folder),
        "tokenizer_2": t5.tokenizer(source, "tokenizer_2"),
    }


def _transformer(part: Part, dtype: Any) -> Any:
    config = transformer_config(part)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return single_file.filled(
        lambda: FluxTransformer2DModel.from_config(config),
        single_file.read_placed(part, placing, width),
        torch.device("cpu"),
        dtype,
    )


def transformer_config(part: Part) -> dict[str, Any]:
    """Diffusers' configuration, read off the tensors of an original file."""
    shapes = part.shapes
    width, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": part.count("double_blocks.{}."),
        "num_single_layers": part.count("single_blocks.{}."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        # 16, 56, 56 of 128
        "axes_dims_rope": (head // 8, 7 * head // 16, 7 * head // 16),
    }


# --- names of Black Forest Labs' code -------------------------------------------------------------

_ENDS = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "time_text_embed.timestep_embedder.linear_1": Place("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": Place("time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": Place("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": Place("vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": Place("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": Place("guidance_in.out_layer"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", pair=True),
    "proj_out": Place("final_layer.linear"),
}
_BLOCKS = {
    "transformer_blocks": {
        "norm1.linear": Place("double_blocks.{}.img_mod.lin"),
        "norm1_context.linear": Place("double_blocks.{}.txt_mod.lin"),
        "attn.to_q": Place("double_blocks.{}.img_attn.qkv", 0, 3),
        "attn.to_k": Place("double_blocks.{}.img_attn.qkv", 1, 3),
        "attn.to_v": Place("double_blocks.{}.img_attn.qkv", 2, 3),
        "attn.add_q_proj": Place("double_blocks.{}.txt_attn.qkv", 0, 3),
        "attn.add_k_proj": Place("double_blocks.{}.txt_attn.qkv", 1, 3),
        "attn.add_v_proj": Place("double_blocks.{}.txt_attn.qkv", 2, 3),
        "attn.norm_q": Place("double_blocks.{}.img_attn.norm.query_norm"),
        "attn.norm_k": Place("double_blocks.{}.img_attn.norm.key_norm"),
        "attn.norm_added_q": Place("double_blocks.{}.txt_attn.norm.query_norm"),
        "attn.norm_added_k": Place("double_blocks.{}.txt_attn.norm.key_norm"),
        "attn.to_out.0": Place("double_blocks.{}.img_attn.proj"),
        "attn.to_add_out": Place("double_blocks.{}.txt_attn.proj"),
        "ff.net.0.proj": Place("double_blocks.{}.img_mlp.0"),
        "ff.net.2": Place("double_blocks.{}.img_mlp.2"),
        "ff_context.net.0.proj": Place("double_blocks.{}.txt_mlp.0"),
        "ff_context.net.2": Place("double_blocks.{}.txt_mlp.2"),
    },
    "single_transformer_blocks": {
        "norm.linear": Place("single_blocks.{}.modulation.lin"),
        "attn.to_q": Place("single_blocks.{}.linear1", 0, 7),
        "attn.to_k": Place("single_blocks.{}.linear1", 1, 7),
        "attn.to_v": Place("single_blocks.{}.linear1", 2, 7),
        "proj_mlp": Place("single_blocks.{}.linear1", 3, 7),
        "attn.norm_q": Place("single_blocks.{}.norm.query_norm"),
        "attn.norm_k": Place("single_blocks.{}.norm.key_norm"),
        "proj_out": Place("single_blocks.{}.linear2"),
    },
}
_IN_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")


def placing(name: str) -> tuple[Place, str]:
    """See `single_file.Placing`."""
    layer, leaf = name.rsplit(".", 1)
    inside = _IN_BLOCK.fullmatch(layer)
    place = _BLOCKS[inside[1]][inside[3]].numbered(inside[2]) if inside else _ENDS[layer]
    return place, "scale" if place.name.endswith("_norm") else leaf


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """See `single_file.kohya`."""
    return single_file.kohya(tensors, alpha, placing)


#: ComfyUI reads sd-scripts' names too.
EXPORTS = {naming.KOHYA: kohya}
