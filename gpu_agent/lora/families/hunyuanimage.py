"""HunyuanImage 2.1: a straight flow in latents of 32 pixels, told by Qwen2.5-VL and, letter by
letter, by a ByT5 of what is to be written in the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text
from torch.utils.checkpoint import checkpoint
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5EncoderModel,
)

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, naming, single_file
from gpu_agent.lora.families.base import Conditions, Model, reading
from gpu_agent.lora.families.single_file import Part, Place, Source
from gpu_agent.lora.objective import Flow
from gpu_agent.recipe import Recipe

#: The blocks' attentions; those of the text's refiner are in no LoRA of sd-scripts.
ATTENTION = (
    r"(single_)?transformer_blocks\.\d+\.attn\."
    r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
)
#: What sd-scripts trains: every linear layer of both kinds of blocks.
FULL = (
    r"(single_)?transformer_blocks\.\d+\.("
    r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"norm1?(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)

#: As in diffusers' pipeline, from the authors' own: what stands around a text, how many of its
#: tokens come before the text, and how many are kept of the text and of what is to be written.
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>"
)
_BEFORE = 34
_TOKENS, _LETTERS = 1000, 128
#: Of the scheduler, where a single file says nothing.
_SHIFT = 5.0
#: Noise levels as the denoiser counts them.
_LEVELS = 1000


class HunyuanImage(Model):
    """A loaded HunyuanImage 2.1.

    Conditions: `text` (n, 1000, width) and `mask` (n, 1000) of Qwen, `letters` (n, 128, width) and
    `letters_mask` (n, 128) of ByT5; fewer where a tokenizer says so.
    """

    block_lists = ("transformer_blocks", "single_transformer_blocks")
    sample_guidance = 3.5

    def __init__(
        self, *, tokenizer: Any, tokenizer_2: Any, sample_shift: float, **parts: Any
    ) -> None:
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self._length = min(_TOKENS + _BEFORE, tokenizer.model_max_length)
        self._letter_length = min(_LETTERS, tokenizer_2.model_max_length)
        around = len(tokenizer(_TEMPLATE.format("")).input_ids)
        self.reads = tokenizer, self._length - around
        self.sample_shift = sample_shift

    def targets(self, preset: str) -> str:
        return FULL if preset == "full" else ATTENTION

    @property
    def latent_factor(self) -> int:
        return int(self.vae.config["spatial_compression_ratio"])

    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        words = self.tokenizer(
            [_TEMPLATE.format(text) for text in texts],
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # without the head, whose answer would be as wide as the vocabulary
        said = self.text_encoders["text_encoder"].model(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            output_hidden_states=True,
        )
        letters, letters_mask = zip(*(self._letters(text) for text in texts), strict=True)
        return {
            "text": said.hidden_states[-3][:, _BEFORE:],
            "mask": words.attention_mask[:, _BEFORE:],
            "letters": torch.stack(letters),
            "letters_mask": torch.stack(letters_mask),
        }

    def _letters(self, text: str) -> tuple[Any, Any]:
        """Of what is in quotes, as above without n; zeros where nothing is."""
        encoder = self.text_encoders["text_encoder_2"]
        written = extract_glyph_text(text)
        if written is None:
            width = encoder.config.d_model
            return (
                torch.zeros(self._letter_length, width, device=self.device, dtype=encoder.dtype),
                torch.zeros(self._letter_length, device=self.device, dtype=torch.int64),
            )
        letters = self.tokenizer_2(
            written,
            padding="max_length",
            max_length=self._letter_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = letters.attention_mask
        return encoder(input_ids=letters.input_ids, attention_mask=mask.float())[0][0], mask[0]

    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        return self.denoiser(
            noisy,
            levels * _LEVELS,
            conditions["text"],
            conditions["mask"],
            encoder_hidden_states_2=conditions["letters"],
            encoder_attention_mask_2=conditions["letters_mask"],
            return_dict=False,
        )[0]

    def checkpoint_gradients(self) -> None:
        # diffusers 0.42.1's own does not take the arguments that this transformer gives it by name
        self.denoiser.enable_gradient_checkpointing(_checkpointed)


def _checkpointed(block: Any, *told: Any, **named: Any) -> Any:
    return checkpoint(block.__call__, *told, use_reentrant=False, **named)


# --- loading ------------------------------------------------------------------------------------


def load(base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> HunyuanImage:
    """Load a diffusers folder, or a transformer as its authors or ComfyUI name it.

    Raises:
        ModelError: weights are missing, of the wrong shape, not finite, or those of the distilled
            model.
    """
    parts = _components(base, device, dtype)
    model = HunyuanImage(
        denoiser=parts["transformer"],
        vae=parts["vae"],
        text_encoders={name: parts[name] for name in ("text_encoder", "text_encoder_2")},
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer_2"],
        sample_shift=parts["scheduler"].config["shift"],
        objective=Flow(),
        device=device,
    )
    model.freeze()
    return model


class _WithLora(HunyuanImagePipeline):
    """Diffusers' pipeline, which cannot load a LoRA; its transformer can."""

    def load_lora_weights(self, folder: str, **where: Any) -> None:
        self.transformer.load_lora_adapter(folder, **where)

    def unload_lora_weights(self) -> None:
        self.transformer.unload_lora()


def pipeline(base: Path, work: Path) -> Any:
    """The base as users of diffusers load it."""
    if base.is_dir():
        return _WithLora.from_pretrained(base, local_files_only=True)
    parts = _components(base, torch.device("cpu"), torch.float32)
    return _WithLora(
        guider=AdaptiveProjectedMixGuidance(), ocr_guider=AdaptiveProjectedMixGuidance(), **parts
    )


def _components(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """By diffusers' names. Raises: ModelError."""
    with reading(base):
        parts = _read(base, device, dtype)
    config = parts["transformer"].config
    if config["guidance_embeds"] or config["use_meanflow"]:
        raise ModelError(
            "model.distilled",
            f"{base.name} is the distilled model, whose few steps a LoRA would undo; train on "
            f"{family('hunyuanimage').repository}, and use the LoRA with either",
        )
    return {
        name: single_file.placed(base, part, device, waits=name == "transformer")
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in parts.items()
    }


def _read(base: Path, device: Any, dtype: Any) -> dict[str, Any]:
    source = Source(base, family("hunyuanimage").repository)
    denoiser = source.denoiser()
    # Qwen's and T5's numbers are too large for fp16
    text_dtype = torch.float32 if dtype == torch.float16 else dtype
    return {
        "transformer": _transformer(denoiser, dtype)
        if denoiser
        else source.get(
            HunyuanImageTransformer2DModel.from_pretrained, "transformer", torch_dtype=dtype
        ),
        "vae": source.get(
            AutoencoderKLHunyuanImage.from_pretrained, "vae", torch_dtype=torch.float32
        ),
        "text_encoder": source.encoder(
            Qwen2_5_VLForConditionalGeneration, "text_encoder", text_dtype
        ),
        "text_encoder_2": source.encoder(T5EncoderModel, "text_encoder_2", text_dtype),
        "tokenizer": source.words(Qwen2Tokenizer, "tokenizer"),
        "tokenizer_2": source.get(ByT5Tokenizer.from_pretrained, "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
        if denoiser
        else source.get(FlowMatchEulerDiscreteScheduler.from_pretrained, "scheduler"),
    }


# --- the authors' layout ------------------------------------------------------------------------

_ENDS = {
    "x_embedder.proj": Place("img_in.proj"),
    "context_embedder.proj_in": Place("txt_in.input_embedder"),
    "context_embedder.time_text_embed.timestep_embedder.linear_1": Place("txt_in.t_embedder.mlp.0"),
    "context_embedder.time_text_embed.timestep_embedder.linear_2": Place("txt_in.t_embedder.mlp.2"),
    "context_embedder.time_text_embed.text_embedder.linear_1": Place("txt_in.c_embedder.linear_1"),
    "context_embedder.time_text_embed.text_embedder.linear_2": Place("txt_in.c_embedder.linear_2"),
    "context_embedder_2.norm": Place("byt5_in.layernorm"),
    "context_embedder_2.linear_1": Place("byt5_in.fc1"),
    "context_embedder_2.linear_2": Place("byt5_in.fc2"),
    "context_embedder_2.linear_3": Place("byt5_in.fc3"),
    "time_guidance_embed.timestep_embedder.linear_1": Place("time_in.mlp.0"),
    "time_guidance_embed.timestep_embedder.linear_2": Place("time_in.mlp.2"),
    "time_guidance_embed.timestep_embedder_r.linear_1": Place("time_r_in.mlp.0"),
    "time_guidance_embed.timestep_embedder_r.linear_2": Place("time_r_in.mlp.2"),
    "time_guidance_embed.guidance_embedder.linear_1": Place("guidance_in.mlp.0"),
    "time_guidance_embed.guidance_embedder.linear_2": Place("guidance_in.mlp.2"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", pair=True),
    "proj_out": Place("final_layer.linear"),
}
_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_BLOCKS = {
    "context_embedder.token_refiner.refiner_blocks": {
        "norm1": Place(_REFINER + "norm1"),
        "norm2": Place(_REFINER + "norm2"),
        "attn.to_q": Place(_REFINER + "self_attn_qkv", 0, 3),
        "attn.to_k": Place(_REFINER + "self_attn_qkv", 1, 3),
        "attn.to_v": Place(_REFINER + "self_attn_qkv", 2, 3),
        "attn.to_out.0": Place(_REFINER + "self_attn_proj"),
        "ff.net.0.proj": Place(_REFINER + "mlp.fc1"),
        "ff.net.2": Place(_REFINER + "mlp.fc2"),
        "norm_out.linear": Place(_REFINER + "adaLN_modulation.1"),
    },
    "transformer_blocks": {
        "norm1.linear": Place("double_blocks.{}.img_mod.linear"),
        "norm1_context.linear": Place("double_blocks.{}.txt_mod.linear"),
        "attn.to_q": Place("double_blocks.{}.img_attn_qkv", 0, 3),
        "attn.to_k": Place("double_blocks.{}.img_attn_qkv", 1, 3),
        "attn.to_v": Place("double_blocks.{}.img_attn_qkv", 2, 3),
        "attn.add_q_proj": Place("double_blocks.{}.txt_attn_qkv", 0, 3),
        "attn.add_k_proj": Place("double_blocks.{}.txt_attn_qkv", 1, 3),
        "attn.add_v_proj": Place("double_blocks.{}.txt_attn_qkv", 2, 3),
        "attn.norm_q": Place("double_blocks.{}.img_attn_q_norm"),
        "attn.norm_k": Place("double_blocks.{}.img_attn_k_norm"),
        "attn.norm_added_q": Place("double_blocks.{}.txt_attn_q_norm"),
        "attn.norm_added_k": Place("double_blocks.{}.txt_attn_k_norm"),
        "attn.to_out.0": Place("double_blocks.{}.img_attn_proj"),
        "attn.to_add_out": Place("double_blocks.{}.txt_attn_proj"),
        "ff.net.0.proj": Place("double_blocks.{}.img_mlp.fc1"),
        "ff.net.2": Place("double_blocks.{}.img_mlp.fc2"),
        "ff_context.net.0.proj": Place("double_blocks.{}.txt_mlp.fc1"),
        "ff_context.net.2": Place("double_blocks.{}.txt_mlp.fc2"),
    },
    "single_transformer_blocks": {
        "norm.linear": Place("single_blocks.{}.modulation.linear"),
        "attn.to_q": Place("single_blocks.{}.linear1", 0, 7),
        "attn.to_k": Place("single_blocks.{}.linear1", 1, 7),
        "attn.to_v": Place("single_blocks.{}.linear1", 2, 7),
        "proj_mlp": Place("single_blocks.{}.linear1", 3, 7),
        "attn.norm_q": Place("single_blocks.{}.q_norm"),
        "attn.norm_k": Place("single_blocks.{}.k_norm"),
        "proj_out": Place("single_blocks.{}.linear2"),
    },
}
_IN_BLOCK = re.compile(f"({'|'.join(map(re.escape, _BLOCKS))})" + r"\.(\d+)\.(.+)")
#: ComfyUI reads the authors' names, but its own code has others, and so have files that it saves.
_COMFYUI = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"[._]q_norm\.weight", ".norm.query_norm.scale"),
        (r"[._]k_norm\.weight", ".norm.key_norm.scale"),
        (r"_attn_(qkv|proj)\b", r"_attn.\1"),
        (r"(_in|embedder)\.(mlp\.0|linear_1)\b", r"\1.in_layer"),
        (r"(_in|embedder)\.(mlp\.2|linear_2)\b", r"\1.out_layer"),
        (r"mlp\.fc1\b", "mlp.0"),
        (r"mlp\.fc2\b", "mlp.2"),
        (r"(mod|modulation)\.linear\b", r"\1.lin"),
    )
]


def placing(name: str) -> tuple[Place, str]:
    """See `single_file.Placing`."""
    layer, leaf = name.rsplit(".", 1)
    inside = _IN_BLOCK.fullmatch(layer)
    return _BLOCKS[inside[1]][inside[3]].numbered(inside[2]) if inside else _ENDS[layer], leaf


def comfyui_placing(name: str) -> tuple[Place, str]:
    """As `placing`, in ComfyUI's code."""
    place, leaf = placing(name)
    layer, leaf = _comfyui_name(f"{place.name}.{leaf}").rsplit(".", 1)
    return replace(place, name=layer), leaf


def _comfyui_name(name: str) -> str:
    for pattern, theirs in _COMFYUI:
        name = pattern.sub(theirs, name)
    return name


def originals(
    transformer: Any, placing: single_file.Placing = placing
) -> Iterator[tuple[str, Any]]:
    """The transformer's tensors as its authors name them."""
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return single_file.originals(transformer.state_dict(), placing, width)


def _transformer(part: Part, dtype: Any) -> Any:
    config = transformer_config(part)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return single_file.filled(
        lambda: HunyuanImageTransformer2DModel.from_config(config),
        single_file.read_placed(part, _placing_of(part), width),
        torch.device("cpu"),
        dtype,
    )


def transformer_config(part: Part) -> dict[str, Any]:
    """Diffusers' configuration, read off the tensors of a file."""
    place = _placing_of(part)

    def name(layer: str) -> str:
        found, leaf = place(f"{layer}.weight")
        return f"{found.name}.{leaf}"

    width, channels = part.shapes[name("x_embedder.proj")][:2]
    head = part.shapes[name("transformer_blocks.0.attn.norm_q")][0]
    return {
        "in_channels": channels,
        "out_channels": part.shapes[name("proj_out")][0],
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": part.count("double_blocks.{}."),
        "num_single_layers": part.count("single_blocks.{}."),
        "num_refiner_layers": part.count(_REFINER),
        "text_embed_dim": part.shapes[name("context_embedder.proj_in")][1],
        "text_embed_2_dim": part.shapes[name("context_embedder_2.linear_1")][1],
        "rope_axes_dim": (head // 2, head // 2),
        "guidance_embeds": name("time_guidance_embed.guidance_embedder.linear_1") in part.shapes,
        "use_meanflow": name("time_guidance_embed.timestep_embedder_r.linear_1") in part.shapes,
    }


def _placing_of(part: Part) -> single_file.Placing:
    """Whose names a file has."""
    return comfyui_placing if "double_blocks.0.img_attn.qkv.weight" in part.shapes else placing


# --- a LoRA by the authors' names -----------------------------------------------------------------


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """As sd-scripts writes it: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`."""
    return single_file.kohya(tensors, alpha, placing)


def comfyui(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """By ComfyUI's names: `diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`."""
    said: dict[str, Any] = {}
    for layer, update in single_file.updates(tensors, alpha, comfyui_placing).items():
        said |= update.named(f"diffusion_model.{layer}")
    return said


EXPORTS = {naming.KOHYA: kohya, naming.COMFYUI: comfyui}
