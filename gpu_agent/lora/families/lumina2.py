"""Lumina Image 2.0: a transformer of a straight flow, Gemma 2's text encoder, the VAE of FLUX.1.

Its time runs the other way: 0 is noise, 1 the image, and what it says points toward the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from gpu_agent.lora.families import family, naming, single_file
from gpu_agent.lora.families.base import ATTENTION, Conditions, Model, reading
from gpu_agent.lora.families.single_file import VAE, Part, Place, Source
from gpu_agent.lora.objective import Flow
from gpu_agent.recipe import Recipe

#: What sd-scripts trains: every linear layer of a JointTransformerBlock and of the FinalLayer.
FULL = [
    *ATTENTION,
    "feed_forward.linear_1",
    "feed_forward.linear_2",
    "feed_forward.linear_3",
    "norm1.linear",
    "norm_out.linear_1",
    "norm_out.linear_2",
]

#: What ComfyUI's files put before the text encoder's names.
GEMMA = ("text_encoders.gemma2_2b.transformer.model.",)
#: Channels of a head of Gemma 2, whatever its size.
_GEMMA_HEAD = 256
#: Tokens of a text, and what stands before it: as in diffusers' pipeline, from the authors' own.
_TOKENS = 256
_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)
_SHIFT = 6.0
_VAE_SCALE, _VAE_SHIFT = 0.3611, 0.1159


class Lumina2(Model):
    """A loaded Lumina Image 2.0. Conditions: `text` (n, 256, width), `mask` (n, 256)."""

    block_lists = ("context_refiner", "noise_refiner", "layers")
    sample_guidance = 4.0

    def __init__(self, *, tokenizer: Any, sample_shift: float, **parts: Any) -> None:
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.reads = tokenizer, _TOKENS - len(tokenizer(_SYSTEM).input_ids)
        self.sample_shift = sample_shift

    def targets(self, preset: str) -> list[str]:
        return FULL if preset == "full" else ATTENTION

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words = self.tokenizer(
            # nothing stands before no text: so it is in training and in guidance
            [_SYSTEM + text if text else "" for text in texts],
            padding="max_length",
            max_length=_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        said = self.text_encoders["text_encoder"](
            words.input_ids, attention_mask=words.attention_mask, output_hidden_states=True
        )
        return {"text": said.hidden_states[-2], "mask": words.attention_mask}

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return -self.denoiser(
            noisy, 1 - levels, conditions["text"], conditions["mask"], return_dict=False
        )[0]

    @property
    def side_factor(self) -> int:
        return self.latent_factor * int(self.denoiser.config["patch_size"])


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> Lumina2:
    """Load a diffusers folder, or a single file in the layout of the authors or of ComfyUI.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    parts = _components(base, device, dtype)
    model = Lumina2(
        denoiser=parts["transformer"],
        vae=parts["vae"],
        text_encoders={"text_encoder": parts["text_encoder"]},
        tokenizer=parts["tokenizer"],
        sample_shift=parts["scheduler"].config["shift"],
        objective=Flow(),
        device=device,
    )
    model.freeze()
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    if base.is_dir():
        return Lumina2Pipeline.from_pretrained(base, local_files_only=True)
    return Lumina2Pipeline(**_components(base, torch.device("cpu"), torch.float32))


def _components(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """By diffusers' names. Raises: ModelError."""
    with reading(base):
        parts = _read(base, device, dtype)
    return {
        name: single_file.placed(base, part, device, waits=name == "transformer")
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in parts.items()
    }


def _read(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    source = Source(base, family("lumina2").repository)
    denoiser, eyes, gemma = source.denoiser(), source.part(VAE), source.part(GEMMA)
    # Gemma's numbers are too large for fp16
    text_dtype = torch.float32 if dtype == torch.float16 else dtype
    return {
        "transformer": _transformer(denoiser, dtype)
        if denoiser
        else source.get(
            Lumina2Transformer2DModel.from_pretrained, "transformer", torch_dtype=dtype
        ),
        "vae": single_file.vae(eyes, scaling=_VAE_SCALE, shift=_VAE_SHIFT)
        if eyes
        else source.get(AutoencoderKL.from_pretrained, "vae", torch_dtype=torch.float32),
        "text_encoder": _gemma(gemma, text_dtype)
        if gemma
        else source.encoder(Gemma2Model, "text_encoder", text_dtype),
        # ComfyUI's files have one inside, but as a protocol buffer of sentencepiece's
        "tokenizer": source.words(GemmaTokenizer, "tokenizer", padding_side="right"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
        if denoiser
        else source.get(FlowMatchEulerDiscreteScheduler.from_pretrained, "scheduler"),
    }


# --- the authors' layout ------------------------------------------------------------------------

_ENDS = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.0": "cap_embedder.0",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_IN_BLOCK = {
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1": "attention_norm1",
    "norm1.norm": "attention_norm1",
    "norm1.linear": "adaLN_modulation.1",
    "norm2": "attention_norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}


def placing(groups: int) -> single_file.Placing:
    """Where diffusers' layers lie.

    Args:
        groups: query heads per head of keys; rows are counted in those of the keys.
    """
    together = {
        f"attn.to_{letter}": Place("attention.qkv", part, groups + 2)
        for letter, part in (("q", 0), ("k", groups), ("v", groups + 1))
    }

    def place(name: str) -> tuple[Place, str]:
        layer, leaf = name.rsplit(".", 1)
        if layer in _ENDS:
            return Place(_ENDS[layer]), leaf
        blocks, number, inner = layer.split(".", 2)
        found = together.get(inner) or Place(_IN_BLOCK[inner])
        return Place(f"{blocks}.{number}.{found.name}", found.part, found.of), leaf

    return place


def originals(transformer: Any) -> Iterator[tuple[str, Any]]:
    """The transformer's tensors as its authors name them."""
    heads, groups = transformer.config["num_kv_heads"], transformer.config["num_attention_heads"]
    return single_file.originals(transformer.state_dict(), placing(groups // heads), 0)


def _transformer(part: Part, dtype: Any) -> Any:
    config = transformer_config(part)
    groups = config["num_attention_heads"] // config["num_kv_heads"]
    return single_file.filled(
        lambda: Lumina2Transformer2DModel.from_config(config),
        single_file.read_placed(part, placing(groups), config["hidden_size"] // groups),
        torch.device("cpu"),
        dtype,
    )


def transformer_config(part: Part) -> dict[str, Any]:
    """Diffusers' configuration, read off the tensors of a file."""
    width, patch = part.shapes["x_embedder.weight"]
    head = part.shapes["layers.0.attention.q_norm.weight"][0]
    inner = part.shapes["layers.0.feed_forward.w1.weight"][0]
    keys = (part.shapes["layers.0.attention.qkv.weight"][0] - width) // 2
    return {
        # squares of 2x2
        "in_channels": patch // 4,
        "hidden_size": width,
        "num_layers": part.count("layers.{}."),
        "num_refiner_layers": part.count("noise_refiner.{}."),
        "num_attention_heads": width // head,
        "num_kv_heads": keys // head,
        "multiple_of": 256 if inner % 256 == 0 else inner,
        "axes_dim_rope": (head // 3,) * 3,
        "cap_feat_dim": part.shapes["cap_embedder.1.weight"][1],
    }


def _gemma(part: Part, dtype: Any) -> Any:
    words, width = part.shapes["embed_tokens.weight"]
    config = Gemma2Config(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=part.shapes["layers.0.mlp.gate_proj.weight"][0],
        num_hidden_layers=part.count("layers.{}."),
        num_attention_heads=part.shapes["layers.0.self_attn.q_proj.weight"][0] // _GEMMA_HEAD,
        num_key_value_heads=part.shapes["layers.0.self_attn.k_proj.weight"][0] // _GEMMA_HEAD,
    )
    cpu = torch.device("cpu")
    return single_file.filled(
        lambda: Gemma2Model(config), lambda name, shape: part.tensor(name), cpu, dtype
    )


# --- a LoRA by the authors' names -----------------------------------------------------------------


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """As sd-scripts writes it: `lora_unet_layers_0_attention_qkv.lora_down.weight`."""
    return single_file.kohya(tensors, alpha, *_counted(tensors))


def comfyui(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """`diffusion_model.layers.0.attention.qkv.lora_A.weight`, which diffusers reads as well.

    It does not read an alpha, which therefore is in B.
    """
    said = {}
    for layer, update in single_file.updates(tensors, alpha, *_counted(tensors)).items():
        name = f"diffusion_model.{layer}"
        said[f"{name}.lora_A.weight"] = update.down
        said[f"{name}.lora_B.weight"] = update.up * (update.alpha / len(update.down))
        if update.magnitudes is not None:
            said[f"{name}.dora_scale"] = update.magnitudes[:, None]
    return said


def _counted(tensors: Mapping[str, Any]) -> tuple[single_file.Placing, int]:
    """Where the layers of a LoRA lie, and the rows of keys, which these places count in."""
    queries, keys = (
        next(
            len(one)
            for name, one in tensors.items()
            if name.endswith(f".to_{letter}.lora_B.weight")
        )
        for letter in "qk"
    )
    return placing(queries // keys), keys


EXPORTS = {naming.KOHYA: kohya, naming.COMFYUI: comfyui}
