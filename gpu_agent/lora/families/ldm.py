"""The single-file layout in which SD 1.x models are passed around (and served by Civitai).

One safetensors file holds the denoiser, the VAE and the text encoder under the names of
CompVis' latent-diffusion (LDM) code. Nothing in it says how wide the networks are, so the
configuration is read off the tensors' shapes, starting from SD 1.5's own: a real SD 1.x file gives
exactly the SD 1.5 configuration, a small one its own widths.

Only the safetensors header is read here, with the standard library; torch comes later.
"""

from __future__ import annotations

import hashlib
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
TEXT = "cond_stage_model.transformer."

#: Channels per attention head in CLIP text encoders.
_CLIP_HEAD = 64
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


def configs(header: Header) -> dict[str, dict[str, Any]]:
    """The diffusers configuration of each component, by the folder that diffusers keeps it in.

    Raises:
        ModelError: the file is no SD 1.x model, or some of it is missing.
    """
    try:
        found = {
            "unet": _unet(header.shapes),
            "vae": _vae(header.shapes),
            "text_encoder": _text_encoder(_text_shapes(header.shapes)),
        }
    except KeyError as missing:
        raise ModelError(
            "model.family", f"this is not a complete SD 1.x model: tensor {missing} is missing"
        ) from None
    except (ValueError, IndexError):
        raise ModelError("model.family", "a tensor has a shape that no SD 1.x model has") from None
    if found["unet"]["cross_attention_dim"] != found["text_encoder"]["hidden_size"]:
        raise ModelError(
            "model.family", "denoiser and text encoder do not fit each other (SD 2.x?)"
        )
    if found["unet"]["in_channels"] != found["vae"]["latent_channels"]:
        raise ModelError(
            "model.family",
            "the denoiser takes more than latents: inpainting models are not trained",
        )
    scheduler = template("scheduler/scheduler_config.json")
    if _predicts_velocity(header):
        scheduler["prediction_type"] = "v_prediction"
    return {**found, "scheduler": scheduler}


def check_file(path: Path) -> str:
    """Check a single file by its header; returns a fingerprint of names, shapes and size.

    Raises:
        ModelError: see `read_header` and `configs`.
    """
    header = read_header(path)
    configs(header)
    said = json.dumps([sorted(header.shapes.items()), path.stat().st_size])
    return hashlib.sha256(said.encode()).hexdigest()


def check_folder(path: Path) -> str:
    """Check that a diffusers folder is an SD 1.x model and that its weights are whole.

    Raises:
        ModelError: it is another pipeline, or files are missing or truncated.
    """
    try:
        index = json.loads((path / "model_index.json").read_bytes())
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError("model.format", f"{path.name} has no readable model_index.json") from None
    if kind != "StableDiffusionPipeline":
        raise ModelError("model.family", f"{path.name} is a {kind}, not an SD 1.x model")
    said = []
    for component in ("unet", "vae", "text_encoder"):
        weights = sorted((path / component).glob("*.safetensors"))
        if not weights:
            raise ModelError("model.format", f"{path.name}/{component} has no safetensors file")
        for file in weights:
            read_header(file)
            said.append((component, file.name, file.stat().st_size))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def template(name: str) -> dict[str, Any]:
    """A file of SD 1.5's configuration folder, from the package or the zip it runs from."""
    resource = files("gpu_agent.lora").joinpath("configs", "sd1", *name.split("/"))
    value: dict[str, Any] = json.loads(resource.read_text(encoding="utf-8"))
    return value


def write_folder(header: Header, target: Path) -> Path:
    """Write the configuration as the folder that `from_single_file(config=...)` asks for."""
    names = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json"}
    for component, config in configs(header).items():
        folder = target / component
        folder.mkdir(parents=True, exist_ok=True)
        name = names.get(component, "scheduler_config.json")
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    index = json.dumps(template("model_index.json"))
    (target / "model_index.json").write_text(index, encoding="utf-8")
    return target


def text_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder's part of a file, named as `CLIPTextModel` names it.

    Old files lack the inner ``text_model.`` prefix, and so does transformers 5 itself.
    """
    inner = (
        (name.removeprefix(TEXT).removeprefix("text_model."), value)
        for name, value in tensors.items()
        if name.startswith(TEXT)
    )
    return {name: value for name, value in inner if not name.endswith("position_ids")}


def _text_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return text_tensors(shapes)


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    blocks = _count(shapes, UNET + "input_blocks.{}.")
    downs = [n for n in range(blocks) if f"{UNET}input_blocks.{n}.0.op.weight" in shapes]
    levels = len(downs) + 1
    layers = (blocks - levels) // levels
    widths, attends = [], []
    for level in range(levels):
        first = f"{UNET}input_blocks.{level * (layers + 1) + 1}"
        widths.append(shapes[f"{first}.0.in_layers.2.weight"][0])
        attends.append(f"{first}.1.proj_in.weight" in shapes)
    context = next(
        (shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0
    )
    first_attention = f"{UNET}input_blocks.1.1.proj_in.weight"
    config = template("unet/config.json")
    config.update(
        block_out_channels=widths,
        layers_per_block=layers,
        in_channels=shapes[f"{UNET}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{UNET}out.2.weight"][0],
        cross_attention_dim=context,
        down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
    )
    if len(shapes[first_attention]) == 2:
        config["use_linear_projection"] = True
    return config


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    levels = _count(shapes, VAE + "encoder.down.{}.")
    widths = [shapes[f"{VAE}encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)]
    config = template("vae/config.json")
    config.update(
        block_out_channels=widths,
        layers_per_block=_count(shapes, VAE + "encoder.down.0.block.{}."),
        latent_channels=shapes[f"{VAE}post_quant_conv.weight"][1],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    return config


def _text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    words, width = shapes["embeddings.token_embedding.weight"]
    config = template("text_encoder/config.json")
    config.update(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        num_attention_heads=max(1, width // _CLIP_HEAD),
        num_hidden_layers=_count(shapes, "encoder.layers.{}."),
        vocab_size=words,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    return config


def _count(names: Iterable[str], pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)``, … begin some name."""
    before, after = (re.escape(part) for part in pattern.split("{}"))
    numbered = re.compile(f"{before}(\\d+){after}")
    seen = {int(match[1]) for match in map(numbered.match, names) if match}
    return next(n for n in count() if n not in seen)


def _predicts_velocity(header: Header) -> bool:
    said = header.metadata.get("modelspec.prediction_type", "")
    return "v_pred" in header.shapes or said in {"v", "v_prediction"}


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
