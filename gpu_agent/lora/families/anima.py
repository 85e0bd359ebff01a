"""Anima: the Cosmos Predict2 transformer of a straight flow, told what Qwen 3 makes of a text.

A small conditioner turns Qwen's states, asked by the numbers of T5's tokens, into what the
transformer attends to. Latents count frames, of which there is one.

A single file has the transformer and the conditioner, as ComfyUI knows them. The rest comes from
folders beside it, or from the family's repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from torch.nn import functional
from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast

from gpu_agent.lora.families import family, naming
from gpu_agent.lora.families.base import ATTENTION, Conditions, Model, image_of, pixels_of, reading
from gpu_agent.lora.families.single_file import Part, Source, filled, placed
from gpu_agent.lora.objective import Flow
from gpu_agent.recipe import Recipe

#: What sd-scripts trains where it is not told otherwise: of each block all linear layers but those
#: of its modulation; nor the embedders and the final layer (`exclude_patterns` of its lora_anima).
FULL = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]

#: What stands before the transformer's names in the published files, and in ComfyUI's.
_PREFIXES = ("net.", "model.diffusion_model.")
_KINDS = {"transformer": CosmosTransformer3DModel, "text_conditioner": AnimaTextConditioner}
_CONDITIONER = "llm_adapter."
#: Tokens of a text at most, as in diffusers' pipeline.
_TOKENS = 512
#: The published model has it in its scheduler; a single file does not say.
_SHIFT = 3.0


def _resize(mask: Any, size: list[int], interpolation: str) -> Any:
    return functional.interpolate(mask, size=size, mode=interpolation)


if not is_torchvision_available():
    # diffusers uses this one function of torchvision, which is not a dependency of ours: its wheel
    # is built for CUDA, and beside a CPU's torch no pipeline can be imported any more
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=_resize),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )


class Anima(Model):
    """A loaded Anima. Conditions: `text` (n, 512, width). Latents: (n, c, 1, h, w)."""

    block_lists = ("transformer_blocks",)
    adaptable_encoders = ("text_conditioner",)
    sample_guidance = 4.0

    def __init__(
        self, *, tokenizer: Any, t5_tokenizer: Any, sample_shift: float, **parts: Any
    ) -> None:
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.sample_shift = sample_shift
        self.reads = (tokenizer, _TOKENS)
        config = self.vae.config
        normal = torch.tensor([config["latents_mean"], config["latents_std"]])
        #: Mean and deviation of each channel of the VAE's latents, (2, 1, c, 1, 1, 1).
        self._normal = normal.view(2, 1, -1, 1, 1, 1).to(self.device)

    def targets(self, preset: str) -> list[str]:
        return FULL if preset == "full" else ATTENTION

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words, mask = self._words(self.tokenizer, texts)
        asked, asked_mask = self._words(self.t5_tokenizer, texts)
        said = self.text_encoders["text_encoder"](input_ids=words, attention_mask=mask)
        states = said.last_hidden_state * mask[..., None].to(said.last_hidden_state)
        conditioner = self.text_encoders["text_conditioner"]
        return {
            "text": conditioner(
                source_hidden_states=states.to(conditioner.dtype),
                target_input_ids=asked,
                target_attention_mask=asked_mask,
                source_attention_mask=mask,
            )
        }

    def _words(self, tokenizer: Any, texts: Sequence[str]) -> tuple[Any, Any]:
        found = tokenizer(
            list(texts), padding="longest", max_length=_TOKENS, truncation=True, return_tensors="pt"
        )
        words, mask = found.input_ids.long(), found.attention_mask.long()
        if not words.shape[1]:
            # nothing was said, and Qwen has no word for the beginning or the end
            words = mask = torch.zeros((len(texts), 1), dtype=torch.long)
        return words.to(self.device), mask.to(self.device)

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(
            noisy,
            levels,
            conditions["text"],
            padding_mask=noisy.new_zeros((1, 1, *noisy.shape[-2:])),
            return_dict=False,
        )[0]

    @property
    def latent_factor(self) -> int:
        return int(2 ** len(self.vae.config["temperal_downsample"]))

    @property
    def side_factor(self) -> int:
        return self.latent_factor * int(self.denoiser.config["patch_size"][1])

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        factor = self.latent_factor
        return (int(self.vae.config["z_dim"]), 1, height // factor, width // factor)

    @torch.no_grad()
    def encode_image(self, image: Any) -> Any:
        pixels = pixels_of(image)[:, :, None].to(self.device)
        return self.vae.encode(pixels).latent_dist.parameters[0].cpu()

    @torch.no_grad()
    def decode(self, latents: Any) -> Any:
        self.vae.to(self.device)
        said = self.vae.decode(self._unscaled(latents)).sample
        self.vae.to("cpu")
        return image_of(said[0, :, 0])

    def _scaled(self, latents: Any) -> Any:
        mean, spread = self._normal.to(latents.device)
        return (latents - mean) / spread

    def _unscaled(self, latents: Any) -> Any:
        mean, spread = self._normal.to(latents.device)
        return latents * spread + mean

    def release_encoders(self, *, texts: bool) -> None:
        super().release_encoders(texts=texts)
        # decoding counts the encoder's layers
        self.vae.encoder = torch.nn.Module()


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> Anima:
    """Load a diffusers folder, or a single file beside which, or on the hub, the rest is.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    parts = _components(base, dtype)
    names = ("transformer", "vae", "text_encoder", "text_conditioner")
    ready = {name: placed(base, parts[name], device, waits=name == "transformer") for name in names}
    model = Anima(
        denoiser=ready["transformer"],
        vae=ready["vae"],
        text_encoders={name: ready[name] for name in ("text_encoder", "text_conditioner")},
        tokenizer=parts["tokenizer"],
        t5_tokenizer=parts["t5_tokenizer"],
        sample_shift=parts["scheduler"].config["shift"],
        objective=Flow(),
        device=device,
    )
    model.freeze()
    return model


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it: the modular pipeline."""
    blocks = AnimaAutoBlocks().init_pipeline()
    blocks.update_components(**_components(base, torch.float32))
    return blocks


def _components(base: Path, dtype: Any) -> dict[str, Any]:
    source = Source(base, family("anima").repository)
    with reading(base):
        made = _transformer(source, dtype)
        made["text_encoder"] = source.encoder(Qwen3Model, "text_encoder", dtype)
        made["vae"] = source.get(
            AutoencoderKLQwenImage.from_pretrained, "vae", torch_dtype=torch.float32
        )
        made["tokenizer"] = source.words(Qwen2Tokenizer, "tokenizer")
        made["t5_tokenizer"] = source.words(T5TokenizerFast, "t5_tokenizer")
        made["scheduler"] = _scheduler(base)
    return made


def _scheduler(base: Path) -> Any:
    if (base / "scheduler").is_dir():
        return FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    return FlowMatchEulerDiscreteScheduler(shift=_SHIFT)


def _transformer(source: Source, dtype: Any) -> dict[str, Any]:
    part = source.part(_PREFIXES) or source.denoiser()
    if part is None:
        return {
            name: source.get(kind.from_pretrained, name, torch_dtype=dtype)
            for name, kind in _KINDS.items()
        }
    configs = {
        "transformer": transformer_config(part),
        "text_conditioner": conditioner_config(part),
    }
    return {name: _filled(part, name, config, dtype) for name, config in configs.items()}


def _filled(part: Part, component: str, config: Mapping[str, Any], dtype: Any) -> Any:
    def read(name: str, shape: tuple[int, ...]) -> Any:
        return part.tensor(original(f"{component}.{name}"))

    return filled(lambda: _KINDS[component](**config), read, torch.device("cpu"), dtype)


def transformer_config(part: Part) -> dict[str, Any]:
    """Of the transformer in a file; those of Cosmos Predict2's that show in no tensor are its own.

    Raises:
        KeyError: a tensor is missing.
    """
    shapes = part.shapes
    width, patch = shapes["x_embedder.proj.1.weight"]
    head = shapes["blocks.0.self_attn.q_norm.weight"][0]
    return {
        # patches of 2 x 2 pixels, and the padding's mask
        "in_channels": patch // 4 - 1,
        "out_channels": shapes["final_layer.linear.weight"][0] // 4,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": part.count("blocks.{}.self_attn."),
        "mlp_ratio": shapes["blocks.0.mlp.layer1.weight"][0] / width,
        "text_embed_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
        "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }


def conditioner_config(part: Part) -> dict[str, Any]:
    """Of the conditioner in a file. Raises: KeyError, where a tensor is missing."""
    shapes = part.shapes
    words, target = shapes[f"{_CONDITIONER}embed.weight"]
    first = f"{_CONDITIONER}blocks.0."
    width, _ = shapes[f"{first}self_attn.q_proj.weight"]
    head = shapes[f"{first}self_attn.q_norm.weight"][0]
    return {
        "source_dim": shapes[f"{first}cross_attn.k_proj.weight"][1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": part.count(f"{_CONDITIONER}blocks.{{}}.self_attn."),
        "num_attention_heads": width // head,
        "mlp_ratio": shapes[f"{first}mlp.0.weight"][0] / width,
        "target_vocab_size": words,
    }


# --- names ------------------------------------------------------------------------------------

_ENDS = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "norm1": "adaln_modulation_self_attn",
    "norm2": "adaln_modulation_cross_attn",
    "norm3": "adaln_modulation_mlp",
    "ff": "mlp",
}
_LAYERS = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "linear_1": "1",
    "linear_2": "2",
    "net.0.proj": "layer1",
    "net.2": "layer2",
}
_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(\w+)\.([\w.]+)")


def original(name: str) -> str:
    """The published file's name (without prefix) of a diffusers tensor."""
    component, inner = name.split(".", 1)
    module, leaf = inner.rsplit(".", 1)
    if component == "text_conditioner":
        return _CONDITIONER + inner
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    found = _IN_BLOCK.fullmatch(module)
    if found is None:
        raise KeyError(name)
    number, part, layer = found.groups()
    return f"blocks.{number}.{_BLOCK[part]}.{_LAYERS[layer]}.{leaf}"


def _layer(layer: str) -> str:
    return original(f"{layer}.weight").removesuffix(".weight")


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """As sd-scripts names them, the conditioner's layers among the transformer's."""
    return naming.renamed(
        tensors, alpha, lambda layer: f"lora_unet_{_layer(layer).replace('.', '_')}"
    )


def comfyui(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """As ComfyUI names them, and diffusers reads it back.

    diffusers refuses a file with a tensor for alpha. So B has alpha / rank in it.
    """
    said: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layer, leaf = naming.split(name)
        theirs = f"diffusion_model.{_layer(layer)}"
        if leaf == "lora_B.weight":
            said[f"{theirs}.{leaf}"] = tensor * (alpha / tensor.shape[1])
        elif leaf == "lora_A.weight":
            said[f"{theirs}.{leaf}"] = tensor
        else:
            said[f"{theirs}.dora_scale"] = tensor[:, None]
    return said


EXPORTS = {naming.KOHYA: kohya, naming.COMFYUI: comfyui}
