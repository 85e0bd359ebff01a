"""Stable Diffusion 3 and 3.5: a rectified flow, told by two CLIP text encoders and T5."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, naming, single_file, t5
from gpu_agent.lora.families.base import ATTENTION, JOINT, Conditions, Model, reading
from gpu_agent.lora.families.clip_words import (
    HUGGING_FACE_PAD,
    OPEN_CLIP_PAD,
    clip_reads,
    tokenizer_for,
)
from gpu_agent.lora.families.single_file import CLIP_G, CLIP_L, T5, VAE, Part, Place, Source
from gpu_agent.lora.objective import Flow
from gpu_agent.recipe import Recipe

#: Words of T5, as the pipeline has by default; CLIP's 77 come before them.
_WORDS = 256
#: Shift of the levels in sample images, as in the models' schedulers.
_SHIFT = 3.0
_VAE_SCALING, _VAE_SHIFT = 1.5305, 0.0609
#: Channels per attention head where no norm of queries shows it.
_HEAD = 64

#: Every linear layer inside the blocks, which is what sd-scripts trains.
_FULL = (
    r"transformer_blocks\.\d+\.("
    r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))"
)


class StableDiffusion3(Model):
    """A loaded SD 3 or 3.5. Conditions: `text` (n, 77 + 256, width) and `pooled` (n, width).

    Without T5 its share of `text` is zeros, as the model was trained to take.
    """

    block_lists = ("transformer_blocks",)
    adaptable_encoders = ("text_encoder", "text_encoder_2")
    sample_guidance = 7.0
    sample_shift = _SHIFT
    objective: Flow

    def __init__(self, *, tokenizers: Sequence[Any], **parts: Any) -> None:
        super().__init__(**parts)
        self._tokenizers = tokenizers
        long = tokenizers[2]
        self.reads = (long, _WORDS - 1) if long is not None else clip_reads(tokenizers[0])

    def targets(self, preset: str) -> list[str] | str:
        return _FULL if preset == "full" else [*ATTENTION, *JOINT]

    @property
    def side_factor(self) -> int:
        return int(self.denoiser.config["patch_size"]) * self.latent_factor

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        short = [
            self._clip(self.text_encoders[name], tokenizer, texts)
            for name, tokenizer in zip(self.adaptable_encoders, self._tokenizers, strict=False)
        ]
        long = self._t5(texts)
        words = torch.cat([words for words, _ in short], dim=-1)
        words = functional.pad(words, (0, long.shape[-1] - words.shape[-1])).to(long.dtype)
        return {
            "text": torch.cat([words, long], dim=1),
            "pooled": torch.cat([pooled for _, pooled in short], dim=-1),
        }

    def _clip(self, encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Any, Any]:
        words = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        said = encoder(words.to(self.device), output_hidden_states=True)
        return said.hidden_states[-2], said.text_embeds

    def _t5(self, texts: Sequence[str]) -> Any:
        if "text_encoder_3" in self.text_encoders:
            encoder = self.text_encoders["text_encoder_3"]
            return t5.encode(encoder, self._tokenizers[2], texts, _WORDS, self.device)
        width = self.denoiser.config["joint_attention_dim"]
        return torch.zeros((len(texts), _WORDS, width), device=self.device)

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(
            hidden_states=noisy,
            timestep=levels * 1000,
            encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
        ).sample


# --- loading ------------------------------------------------------------------------------------


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> StableDiffusion3:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    parts = _parts(base, device, dtype)
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    model = StableDiffusion3(
        denoiser=parts["transformer"],
        vae=parts["vae"],
        text_encoders={name: parts[name] for name in encoders if parts[name] is not None},
        tokenizers=[parts[name] for name in ("tokenizer", "tokenizer_2", "tokenizer_3")],
        objective=Flow(),
        device=device,
    )
    model.freeze()
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    if base.is_dir():
        # diffusers wants to be told that a folder comes without T5
        missing = () if (base / "text_encoder_3").is_dir() else ("text_encoder_3", "tokenizer_3")
        return StableDiffusion3Pipeline.from_pretrained(
            base, local_files_only=True, **dict.fromkeys(missing)
        )
    parts = _parts(base, torch.device("cpu"), torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
    return StableDiffusion3Pipeline(scheduler=scheduler, **parts)


def _parts(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """By diffusers' names of components; None for T5 where the model comes without it.

    Raises:
        ModelError: as `load`.
    """
    with reading(base):
        parts = _read(base, dtype)
    if parts["transformer"].config["in_channels"] != parts["vae"].config["latent_channels"]:
        raise ModelError("model.family", "denoiser and VAE do not fit each other")
    return {
        name: single_file.placed(base, part, device, waits=name == "transformer")
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in parts.items()
    }


def _read(base: Path, dtype: Any) -> dict[str, Any]:
    source = Source(base, family("sd3").repository)
    denoiser, eyes = source.denoiser(), source.part(VAE)
    first = _clip(source, CLIP_L, "text_encoder")
    second = _clip(source, CLIP_G, "text_encoder_2")
    with_t5 = _has_t5(source)
    return {
        "transformer": _transformer(denoiser, dtype)
        if denoiser
        else source.get(SD3Transformer2DModel.from_pretrained, "transformer", torch_dtype=dtype),
        "vae": single_file.vae(eyes, scaling=_VAE_SCALING, shift=_VAE_SHIFT)
        if eyes
        else source.get(AutoencoderKL.from_pretrained, "vae", torch_dtype=torch.float32),
        "text_encoder": first,
        "tokenizer": _words(first, source, "tokenizer", HUGGING_FACE_PAD),
        "text_encoder_2": second,
        "tokenizer_2": _words(second, source, "tokenizer_2", OPEN_CLIP_PAD),
        "text_encoder_3": t5.encoder(source, "text_encoder_3", dtype) if with_t5 else None,
        "tokenizer_3": t5.tokenizer(source, "tokenizer_3") if with_t5 else None,
    }


def _has_t5(source: Source) -> bool:
    """Whether it comes with T5; some folders, and files that hold the CLIP encoders, do not."""
    if source.part(T5) or (source.folder / "text_encoder_3").is_dir():
        return True
    return not source.base.is_dir() and source.part(CLIP_L) is None


def _clip(source: Source, prefixes: tuple[str, ...], component: str) -> Any:
    part = source.part(prefixes)
    if part:
        return single_file.clip(part, projected=True)
    return source.encoder(CLIPTextModelWithProjection, component, torch.float32)


def _words(encoder: Any, source: Source, component: str, pad: str) -> Any:
    config = encoder.config
    return tokenizer_for(
        config.vocab_size,
        config.max_position_embeddings,
        source.folder,
        folder=component,
        pad=pad,
    )


def _transformer(part: Part, dtype: Any) -> Any:
    config = transformer_config(part)
    return single_file.filled(
        lambda: SD3Transformer2DModel.from_config(config),
        single_file.read_placed(part, placing, config["caption_projection_dim"]),
        torch.device("cpu"),
        dtype,
    )


def transformer_config(part: Part) -> dict[str, Any]:
    """Diffusers' configuration, read off the tensors of an original file."""
    shapes = part.shapes
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shapes[norm][0] if norm in shapes else _HEAD
    layers = part.count("joint_blocks.{}.")
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": [
            n for n in range(layers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes
        ],
        "qk_norm": "rms_norm" if norm in shapes else None,
    }


# --- names of Stability AI's code ---------------------------------------------------------------

_ENDS = {
    "pos_embed.proj": Place("x_embedder.proj"),
    "context_embedder": Place("context_embedder"),
    "time_text_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": Place("y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": Place("y_embedder.mlp.2"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", pair=True),
    "proj_out": Place("final_layer.linear"),
}
_IMAGE, _TEXT = "joint_blocks.{}.x_block.", "joint_blocks.{}.context_block."
_BLOCK = {
    "norm1.linear": Place(_IMAGE + "adaLN_modulation.1"),
    # the last block's text goes no further, so it has a shift and a scale only
    "norm1_context.linear": Place(_TEXT + "adaLN_modulation.1", pair=True),
    "attn.to_q": Place(_IMAGE + "attn.qkv", 0, 3),
    "attn.to_k": Place(_IMAGE + "attn.qkv", 1, 3),
    "attn.to_v": Place(_IMAGE + "attn.qkv", 2, 3),
    "attn.add_q_proj": Place(_TEXT + "attn.qkv", 0, 3),
    "attn.add_k_proj": Place(_TEXT + "attn.qkv", 1, 3),
    "attn.add_v_proj": Place(_TEXT + "attn.qkv", 2, 3),
    "attn.norm_q": Place(_IMAGE + "attn.ln_q"),
    "attn.norm_k": Place(_IMAGE + "attn.ln_k"),
    "attn.norm_added_q": Place(_TEXT + "attn.ln_q"),
    "attn.norm_added_k": Place(_TEXT + "attn.ln_k"),
    "attn.to_out.0": Place(_IMAGE + "attn.proj"),
    "attn.to_add_out": Place(_TEXT + "attn.proj"),
    "attn2.to_q": Place(_IMAGE + "attn2.qkv", 0, 3),
    "attn2.to_k": Place(_IMAGE + "attn2.qkv", 1, 3),
    "attn2.to_v": Place(_IMAGE + "attn2.qkv", 2, 3),
    "attn2.norm_q": Place(_IMAGE + "attn2.ln_q"),
    "attn2.norm_k": Place(_IMAGE + "attn2.ln_k"),
    "attn2.to_out.0": Place(_IMAGE + "attn2.proj"),
    "ff.net.0.proj": Place(_IMAGE + "mlp.fc1"),
    "ff.net.2": Place(_IMAGE + "mlp.fc2"),
    "ff_context.net.0.proj": Place(_TEXT + "mlp.fc1"),
    "ff_context.net.2": Place(_TEXT + "mlp.fc2"),
}
_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def placing(name: str) -> tuple[Place, str]:
    """See `single_file.Placing`."""
    if name == "pos_embed.pos_embed":
        return Place("pos_embed"), ""
    layer, leaf = name.rsplit(".", 1)
    inside = _IN_BLOCK.fullmatch(layer)
    return (_BLOCK[inside[2]].numbered(inside[1]) if inside else _ENDS[layer]), leaf


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """See `single_file.kohya`."""
    return single_file.kohya(tensors, alpha, placing)


#: ComfyUI reads sd-scripts' names too; diffusers does not.
EXPORTS = {naming.KOHYA: kohya}
