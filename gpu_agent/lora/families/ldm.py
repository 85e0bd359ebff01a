"""The single-file layout in which SD 1.x, SD 2.x and SDXL are passed around (served by Civitai).

One safetensors file holds the denoiser, the VAE and the text encoders under the names of CompVis'
latent-diffusion (LDM) code, the text encoders as Hugging Face or as OpenCLIP name theirs. Nothing
in it says how wide the networks are, so the configuration is read off the tensors' shapes, starting
from the family's own: a real file gives exactly the real configuration, a small one its own widths.

Only the safetensors header is read here, with the standard library; torch comes later.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from gpu_agent.lora.errors import ModelError

UNET = "model.diffusion_model."
VAE = "first_stage_model."

#: Channels per attention head: of CLIP's text encoders, and of the UNets after SD 1.x.
_HEAD = 64
#: safetensors refuses longer headers too (bytes).
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds: each tensor's shape, and the file's own notes."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ModelError: it is not a safetensors file, or the tensors that it announces are not there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ModelError(
                "model.format", f"{path.name} is not a safetensors file; other formats are not read"
            )
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, 8 + length, size)
    try:
        entries = json.loads(raw.decode("utf-8"))
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(
            "model.format", f"{path.name} has no readable safetensors header"
        ) from None
    if 8 + length + end > size:
        raise _truncated(path, 8 + length + end, size)
    return Header(shapes, metadata if isinstance(metadata, dict) else {})


def _truncated(path: Path, wanted: int, size: int) -> ModelError:
    return ModelError(
        "model.truncated",
        f"{path.name} ends after {size} of {wanted} bytes; download it again",
        retryable=True,
    )


@dataclass(frozen=True)
class Encoder:
    """Where a file keeps a text encoder, and under whose names.

    Attributes:
        unused: layers at its end that the family does without.
    """

    component: str
    prefix: str
    open_clip: bool = False
    unused: int = 0


@dataclass(frozen=True)
class Layout:
    """What tells the families apart whose files have these names; `name` is the family's."""

    name: str
    title: str
    encoders: tuple[Encoder, ...]

    def template(self, file: str) -> dict[str, Any]:
        """A file of the real model's configuration, from the package or the zip it runs from."""
        resource = files("gpu_agent.lora").joinpath("configs", self.name, *file.split("/"))
        value: dict[str, Any] = json.loads(resource.read_text(encoding="utf-8"))
        return value


SD1 = Layout("sd1", "SD 1.x", (Encoder("text_encoder", "cond_stage_model.transformer."),))
SD2 = Layout(
    "sd2", "SD 2.x", (Encoder("text_encoder", "cond_stage_model.model.", open_clip=True, unused=1),)
)
SDXL = Layout(
    "sdxl",
    "SDXL",
    (
        Encoder("text_encoder", "conditioner.embedders.0.transformer."),
        Encoder("text_encoder_2", "conditioner.embedders.1.model.", open_clip=True),
    ),
)
LAYOUTS = {layout.name: layout for layout in (SD1, SD2, SDXL)}


def layout_of(names: Iterable[str]) -> Layout:
    """The family whose text encoders such a file has. Raises: ModelError, for none's."""
    text = "\n".join(names)
    for layout in LAYOUTS.values():
        if all(encoder.prefix in text for encoder in layout.encoders):
            return layout
    raise ModelError("model.family", "this is no Stable Diffusion model: it has no text encoder")


def configs(header: Header) -> dict[str, dict[str, Any]]:
    """The diffusers configuration of each component, by the folder that diffusers keeps it in.

    Raises:
        ModelError: the file is of none of these families, or some of it is missing.
    """
    layout, shapes = layout_of(header.shapes), header.shapes
    try:
        encoders = {
            encoder.component: _text_encoder(shapes, encoder, layout) for encoder in layout.encoders
        }
        found = {"unet": _unet(shapes, layout), "vae": _vae(shapes, layout), **encoders}
    except KeyError as missing:
        raise ModelError(
            "model.family",
            f"this is not a complete {layout.title} model: tensor {missing} is missing",
        ) from None
    except (ValueError, IndexError, StopIteration):
        raise ModelError(
            "model.family", f"a tensor has a shape that no {layout.title} model has"
        ) from None
    said = sum(config["hidden_size"] for config in encoders.values())
    if found["unet"]["cross_attention_dim"] != said:
        raise ModelError("model.family", "denoiser and text encoders do not fit each other")
    if found["unet"]["in_channels"] != found["vae"]["latent_channels"]:
        raise ModelError(
            "model.family",
            "the denoiser takes more than latents: inpainting models are not trained",
        )
    return {**found, "scheduler": _scheduler(header, layout)}


def write_folder(header: Header, target: Path) -> Path:
    """Write the configuration as the folder that `from_single_file(config=...)` asks for."""
    for component, config in configs(header).items():
        folder = target / component
        folder.mkdir(parents=True, exist_ok=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    index = json.dumps(layout_of(header.shapes).template("model_index.json"))
    (target / "model_index.json").write_text(index, encoding="utf-8")
    return target


def text_tensors(tensors: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
    """A text encoder's tensors as Hugging Face names them, without the prefix ``text_model.``.

    Old files lack that prefix, and so does transformers 5 itself.
    """
    inner = {
        name.removeprefix(encoder.prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(encoder.prefix)
    }
    if not encoder.open_clip:
        return {name.removeprefix("text_model."): tensor for name, tensor in inner.items()}
    said: dict[str, Any] = {}
    for name, tensor in inner.items():
        place, _, leaf = name.rpartition(".in_proj_")
        if place:
            layer = _open_clip_layer(place)
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                said[f"{layer}.{part}_proj.{leaf}"] = third
        elif name == _OPEN_CLIP_PROJECTION:
            # OpenCLIP multiplies by it from the right
            said["text_projection.weight"] = tensor.T
        elif name in _OPEN_CLIP_ENDS:
            said[_OPEN_CLIP_ENDS[name]] = tensor
        elif name.startswith(_OPEN_CLIP_LAYERS):
            module, leaf = name.rsplit(".", 1)
            said[f"{_open_clip_layer(module)}.{leaf}"] = tensor
    return said


_OPEN_CLIP_LAYERS = "transformer.resblocks."
_OPEN_CLIP_PROJECTION = "text_projection"
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _open_clip_layer(module: str) -> str:
    """``transformer.resblocks.3.mlp.c_fc`` -> ``encoder.layers.3.mlp.fc1``."""
    number, part = module.removeprefix(_OPEN_CLIP_LAYERS).split(".", 1)
    return f"encoder.layers.{number}.{_OPEN_CLIP_PARTS[part]}"


def open_clip_name(name: str) -> str:
    """OpenCLIP's name (without prefix) of a Hugging Face text encoder's tensor.

    Not of the queries, keys and values, which OpenCLIP keeps in one.
    """
    for theirs, ours in _OPEN_CLIP_ENDS.items():
        if name == ours:
            return theirs
    module, leaf = name.rsplit(".", 1)
    number, part = module.removeprefix("encoder.layers.").split(".", 1)
    theirs = next(theirs for theirs, ours in _OPEN_CLIP_PARTS.items() if ours == part)
    return f"{_OPEN_CLIP_LAYERS}{number}.{theirs}.{leaf}"


def _unet(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Any]:
    blocks = _count(shapes, UNET + "input_blocks.{}.")
    downs = [n for n in range(blocks) if f"{UNET}input_blocks.{n}.0.op.weight" in shapes]
    levels = len(downs) + 1
    layers = (blocks - levels) // levels
    widths, depths = [], []
    for level in range(levels):
        first = f"{UNET}input_blocks.{level * (layers + 1) + 1}"
        widths.append(shapes[f"{first}.0.in_layers.2.weight"][0])
        depths.append(_count(shapes, f"{first}.1.transformer_blocks.{{}}."))
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    config = layout.template("unet/config.json")
    config.update(
        block_out_channels=widths,
        layers_per_block=layers,
        in_channels=shapes[f"{UNET}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{UNET}out.2.weight"][0],
        cross_attention_dim=context,
        down_block_types=["CrossAttnDownBlock2D" if deep else "DownBlock2D" for deep in depths],
        up_block_types=["CrossAttnUpBlock2D" if deep else "UpBlock2D" for deep in reversed(depths)],
    )
    if layout is not SD1:
        config["attention_head_dim"] = [max(1, width // _HEAD) for width in widths]
    if layout is SDXL:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
        # the pooled text beside the six numbers of the framing
        told = shapes[f"{UNET}label_emb.0.0.weight"][1]
        pooled = shapes[f"{layout.encoders[1].prefix}{_OPEN_CLIP_PROJECTION}"][1]
        config["projection_class_embeddings_input_dim"] = told
        config["addition_time_embed_dim"] = (told - pooled) // 6
    elif any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items()):
        config["use_linear_projection"] = True
    return config


def _vae(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Any]:
    levels = _count(shapes, VAE + "encoder.down.{}.")
    widths = [shapes[f"{VAE}encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)]
    config = layout.template("vae/config.json")
    config.update(
        block_out_channels=widths,
        layers_per_block=_count(shapes, VAE + "encoder.down.0.block.{}."),
        latent_channels=shapes[f"{VAE}post_quant_conv.weight"][1],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    return config


def _text_encoder(
    shapes: Mapping[str, tuple[int, ...]], encoder: Encoder, layout: Layout
) -> dict[str, Any]:
    prefix = encoder.prefix
    if encoder.open_clip:
        names = ("token_embedding.weight", "positional_embedding")
        inside, layer = "mlp.c_fc.weight", f"{prefix}{_OPEN_CLIP_LAYERS}{{}}."
    else:
        wrapped = any(name.startswith(f"{prefix}text_model.") for name in shapes)
        prefix = f"{prefix}text_model." if wrapped else prefix
        names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
        inside, layer = "mlp.fc1.weight", f"{prefix}encoder.layers.{{}}."
    words, width = shapes[prefix + names[0]]
    config = layout.template(f"{encoder.component}/config.json")
    projected = shapes.get(f"{prefix}{_OPEN_CLIP_PROJECTION}", (0, width))[1]
    config.update(
        hidden_size=width,
        intermediate_size=shapes[layer.format(0) + inside][0],
        max_position_embeddings=shapes[prefix + names[1]][0],
        num_attention_heads=max(1, width // _HEAD),
        num_hidden_layers=_count(shapes, layer) - encoder.unused,
        vocab_size=words,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    if layout is not SD2:  # whose published configuration has another number, which nobody reads
        config["projection_dim"] = projected
    return config


def _scheduler(header: Header, layout: Layout) -> dict[str, Any]:
    config = layout.template("scheduler/scheduler_config.json")
    if _predicts_velocity(header):
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        # no signal at the last level, which sampling then must begin with (arXiv:2305.08891)
        config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return config


def _count(names: Iterable[str], pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)``, … begin some name."""
    before, after = (re.escape(part) for part in pattern.split("{}"))
    numbered = re.compile(f"{before}(\\d+){after}")
    seen = {int(match[1]) for match in map(numbered.match, names) if match}
    return next(n for n in count() if n not in seen)


def _predicts_velocity(header: Header) -> bool:
    said = header.metadata.get("modelspec.prediction_type", "")
    named = header.metadata.get("modelspec.architecture", "").endswith("-v")
    return "v_pred" in header.shapes or said in {"v", "v_prediction"} or named


# --- names from diffusers back to LDM ---------------------------------------------------------

_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    # SDXL's framing and pooled text
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str, *, layers: int, attends: tuple[bool, ...]) -> str:
    """The LDM name (without prefix) of a diffusers UNet tensor.

    Args:
        layers: `layers_per_block`.
        attends: per up block, in order, whether it has attentions (they come before its upsampler).
    """
    module, leaf = name.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{place}.{_unet_inner(kind, inner)}"
    block, kind, number, *inner = rest
    place = _unet_place(side, int(block), kind, int(number), layers, attends)
    return f"{place}.{_unet_inner(kind, inner)}"


def _unet_place(
    side: str, block: int, kind: str, number: int, layers: int, attends: tuple[bool, ...]
) -> str:
    start = block * (layers + 1)
    slot = 1 if kind == "attentions" else 0
    if side == "down_blocks":
        at = start + layers + 1 if kind == "downsamplers" else start + number + 1
        return f"input_blocks.{at}.{slot}"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if attends[block] else 1}"
    return f"output_blocks.{start + number}.{slot}"


def _unet_inner(kind: str, inner: list[str]) -> str:
    if kind == "resnets":
        return ".".join([_RESNET_PARTS[inner[0]], *inner[1:]])
    if kind == "downsamplers":
        return ".".join(["op", *inner[1:]])
    return ".".join(inner)


def vae_name(name: str, *, levels: int) -> str:
    """The LDM name (without prefix) of a diffusers `AutoencoderKL` tensor."""
    side, *rest = name.split(".")
    if rest[0] == "conv_norm_out":
        return ".".join([side, "norm_out", *rest[1:]])
    if rest[0] == "mid_block":
        return f"{side}.mid.{_vae_mid(rest[1], int(rest[2]), rest[3:])}"
    if rest[0] not in {"down_blocks", "up_blocks"}:
        return name
    stage, block, kind, number, *inner = rest
    direction, at = (
        ("down", int(block)) if stage == "down_blocks" else ("up", levels - 1 - int(block))
    )
    if kind == "resnets":
        return f"{side}.{direction}.{at}.block.{number}.{_shortcut(inner)}"
    return ".".join([side, direction, str(at), f"{direction}sample", *inner])


def _vae_mid(kind: str, number: int, inner: list[str]) -> str:
    if kind == "resnets":
        return f"block_{number + 1}.{_shortcut(inner)}"
    *module, leaf = inner
    return f"attn_{number + 1}.{_VAE_ATTENTION['.'.join(module)]}.{leaf}"


def _shortcut(inner: list[str]) -> str:
    return ".".join("nin_shortcut" if part == "conv_shortcut" else part for part in inner)
