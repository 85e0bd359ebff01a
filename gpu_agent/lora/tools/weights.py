"""A base model's weights by diffusers' names, without the model: read and changed one at a time."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import Family, ldm

_ENCODERS = ("text_encoder", "text_encoder_2")
#: The order in which OpenCLIP keeps queries, keys and values in one.
_THIRDS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Place:
    """Where a layer's weight is: a tensor of a file, or one of its three thirds."""

    file: Path
    name: str
    third: int | None = None

    def of(self, tensor: Any) -> Any:
        """The layer's part of the tensor."""
        return tensor if self.third is None else tensor.chunk(3)[self.third]


class Weights:
    """The weights of a base's denoiser and text encoders.

    Attributes:
        files: the safetensors files that they are in.
        layers: by their name in a LoRA file, `unet.a.b` or `text_encoder.text_model.a.b`. Those
            of more than two dimensions are convolutions.

    Raises:
        ModelError: it is no model of the family, or a single file of a family that has none here.
    """

    def __init__(self, base: Path, family: Family) -> None:
        family.check(base)
        self.base = base
        named = _folder_places(base, family) if base.is_dir() else _file_places(base)
        self.layers = dict(named)
        self.files = sorted({place.file for place in self.layers.values()})
        self._opened: dict[Path, Any] = {file: safe_open(file, "pt") for file in self.files}

    def read(self, layer: str) -> Any:
        """Its weight in fp32. Raises: ModelError, it is not finite."""
        place = self.layers[layer]
        weight = place.of(self._opened[place.file].get_tensor(place.name)).float()
        if not torch.isfinite(weight).all():
            raise ModelError("model.not_finite", f"{layer} of {self.base.name} is not finite")
        return weight

    def write(self, out: Path, change: Mapping[str, Callable[[Any], Any]]) -> None:
        """Write the base with some layers' weights (fp32 → fp32) changed.

        `out` appears whole or not at all.

        Raises:
            ModelError: a changed weight is not finite.
        """
        changes: dict[tuple[Path, str], list[tuple[Place, Callable[[Any], Any]]]] = {}
        for layer, new in change.items():
            place = self.layers[layer]
            changes.setdefault((place.file, place.name), []).append((place, new))
        part = out.with_name(out.name + ".part")
        if self.base.is_dir():
            ours = {file.relative_to(self.base) for file in self.files}
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(
                self.base,
                part,
                ignore=lambda folder, names: [
                    name for name in names if (Path(folder) / name).relative_to(self.base) in ours
                ],
            )
        for file in self.files:
            target = part / file.relative_to(self.base) if self.base.is_dir() else part
            here = {name: some for (of, name), some in changes.items() if of == file}
            _write_changed(file, target, here)
        part.replace(out)


def _write_changed(
    source: Path, target: Path, changes: Mapping[str, list[tuple[Place, Callable[[Any], Any]]]]
) -> None:
    with source.open("rb") as raw, safe_open(source, "pt") as opened, target.open("wb") as written:
        length = struct.unpack("<Q", raw.read(8))[0]
        header = json.loads(raw.read(length))
        metadata = header.get("__metadata__", {})
        # digests of what it was
        for stale in ("modelspec.hash_sha256", "sshs_model_hash"):
            metadata.pop(stale, None)
        told = json.dumps(header, separators=(",", ":")).encode()
        told += b" " * (-len(told) % 8)
        written.write(struct.pack("<Q", len(told)) + told)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if name in changes:
                tensor = opened.get_tensor(name)
                _apply(tensor, changes[name], name)
                written.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                raw.seek(8 + length + start)
                written.write(raw.read(end - start))


def _apply(tensor: Any, changes: list[tuple[Place, Callable[[Any], Any]]], name: str) -> None:
    for place, new in changes:
        part = place.of(tensor)
        part.copy_(new(part.float()))
        if not torch.isfinite(part).all():
            raise ModelError(
                "model.not_finite", f"{name} would not be finite in {part.dtype} any more"
            )


# --- where the layers are -------------------------------------------------------------------------


def _folder_places(base: Path, family: Family) -> Iterator[tuple[str, Place]]:
    for component in family.components:
        if component != "vae":
            for file in sorted((base / component).glob("*.safetensors")):
                for name, shape in ldm.read_header(file).shapes.items():
                    if _is_layer(component, name, shape):
                        layer = name.removesuffix(".weight")
                        # a level that transformers 5 dropped, and LoRA files did not
                        if component in _ENCODERS and layer.startswith("encoder.layers."):
                            layer = f"text_model.{layer}"
                        yield f"{component}.{layer}", Place(file, name)


def _file_places(base: Path) -> Iterator[tuple[str, Place]]:
    header = ldm.read_header(base)
    try:
        layout = ldm.layout_of(header.shapes)
    except ModelError as error:
        raise ModelError(
            "model.format", f"{base.name}: of this family only diffusers folders are taken here"
        ) from error
    config = ldm.configs(header)["unet"]
    attends = tuple("CrossAttn" in kind for kind in config["up_block_types"])
    for name in _unet_names(config):
        theirs = ldm.UNET + ldm.unet_name(name, layers=config["layers_per_block"], attends=attends)
        if _is_layer("unet", name, header.shapes.get(theirs, ())):
            yield f"unet.{name.removesuffix('.weight')}", Place(base, theirs)
    for encoder in layout.encoders:
        for name, shape in header.shapes.items():
            if name.startswith(encoder.prefix):
                inner = name.removeprefix(encoder.prefix)
                for layer, third in _encoder_layers(inner, shape, open_clip=encoder.open_clip):
                    yield f"{encoder.component}.text_model.{layer}", Place(base, name, third)


def _unet_names(config: Mapping[str, Any]) -> list[str]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return list(UNet2DConditionModel.from_config(config).state_dict())


def _encoder_layers(
    name: str, shape: tuple[int, ...], *, open_clip: bool
) -> Iterator[tuple[str, int | None]]:
    if not open_clip:
        plain = name.removeprefix("text_model.")
        if _is_layer("text_encoder", plain, shape):
            yield plain.removesuffix(".weight"), None
        return
    *_, number, part = ["", *name.removeprefix("transformer.resblocks.").split(".", 1)]
    if part == "attn.in_proj_weight":
        for third, projection in enumerate(_THIRDS):
            yield f"encoder.layers.{number}.self_attn.{projection}", third
    elif part in _OPEN_CLIP:
        yield f"encoder.layers.{number}.{_OPEN_CLIP[part]}", None


_OPEN_CLIP = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}


def _is_layer(component: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a LoRA can be put there: a matrix, or a convolution, but no table of words."""
    if component in _ENCODERS and "encoder.layers." not in name:
        return False
    return name.endswith(".weight") and len(shape) in {2, 4}
