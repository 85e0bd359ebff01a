"""LoRA files as their layers: read, applied to a weight, made of a difference, made smaller.

Sums are taken in fp32. A difference is split by its singular values (the best approximation of a
rank there is), as sd-scripts' `extract_lora_from_models` and `resize_lora` do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import Family, naming
from gpu_agent.lora.families.naming import MAGNITUDE

#: What a layer's tensors are called -> what they are called here.
_LEAVES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    MAGNITUDE: "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}


@dataclass(frozen=True)
class Update:
    """A layer's: B (out, rank, …), A (rank, in, …), alpha, and DoRA's magnitudes or None."""

    up: Any
    down: Any
    alpha: float
    magnitude: Any = None

    @property
    def rank(self) -> int:
        return len(self.down)

    def matrix(self) -> Any:
        """What is added to the weight, (out, in)."""
        return (self.up.flatten(1) @ self.down.flatten(1)) * (self.alpha / self.rank)

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        return bool(
            self.up.flatten(1).shape == (rows, self.rank)
            and self.down.flatten(1).shape == (self.rank, columns)
        )

    def on(self, weight: Any, scale: float) -> Any:
        """The weight with so much of the change."""
        new = weight + self.matrix().view_as(weight) * (scale if self.magnitude is None else 1.0)
        if self.magnitude is None:
            return new
        # arXiv:2402.09353, with one magnitude per output as in peft and in ComfyUI
        rows = (len(weight), *[1] * (weight.ndim - 1))
        new = new * self.magnitude.view(rows) / new.flatten(1).norm(dim=1).view(rows)
        return weight + scale * (new - weight)


@dataclass(frozen=True)
class Lora:
    """A file: its updates by the names that it has for layers, and its metadata."""

    updates: Mapping[str, Update]
    metadata: Mapping[str, str]
    kohya: bool


def read(file: Path) -> Lora:
    """Read a LoRA or DoRA in diffusers' naming or in kohya's.

    Raises:
        ModelError: `model.lora`; it is something else, or broken.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unfit(file, str(error)) from error
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        leaf = next((leaf for leaf in _LEAVES if name.endswith("." + leaf)), None)
        if leaf is None:
            raise _unfit(file, f"{name} is no tensor of a LoRA or DoRA")
        if not torch.isfinite(tensor).all():
            raise _unfit(file, f"{name} is not finite")
        layers.setdefault(name.removesuffix("." + leaf), {})[_LEAVES[leaf]] = tensor
    if not layers or any(not {"up", "down"} <= leaves.keys() for leaves in layers.values()):
        raise _unfit(file, "it has no layers with both of a LoRA's matrices")
    kohya = any(name.endswith(".lora_down.weight") for name in tensors)
    told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    updates = {}
    for layer, leaves in layers.items():
        rank = len(leaves["down"])
        alpha = float(leaves.get("alpha", told.get(f"{layer.split('.')[0]}.lora_alpha", rank)))
        magnitude = leaves.get("magnitude")
        updates[layer] = Update(leaves["up"], leaves["down"], alpha, magnitude)
    return Lora(updates, metadata, kohya)


def by_layer(lora: Lora, layers: Iterable[str], family: Family, file: Path) -> dict[str, Update]:
    """A file's updates by diffusers' names of a base's layers.

    Raises:
        ModelError: `model.lora`; the base lacks a layer that the file is for.
    """
    theirs = _kohya_names(layers, family) if lora.kohya else {layer: layer for layer in layers}
    lost = [layer for layer in lora.updates if layer not in theirs]
    if lost:
        advice = "; take the LoRA's file in diffusers' naming" if lora.kohya else ""
        raise _unfit(
            file,
            f"{len(lost)} of its {len(lora.updates)} layers are not in the base: {lost[0]}{advice}",
        )
    return {theirs[layer]: update for layer, update in lora.updates.items()}


def _kohya_names(layers: Iterable[str], family: Family) -> dict[str, str]:
    """Diffusers' names of layers by kohya's.

    Raises:
        ModelError: `model.lora`; kohya's naming puts several layers of this family into one.
    """
    rename = family.exports()[naming.KOHYA]
    names: dict[str, str] = {}
    for layer in layers:
        one = {
            f"{layer}.lora_A.weight": torch.zeros(1, 1),
            f"{layer}.lora_B.weight": torch.zeros(1, 1),
        }
        try:
            said = rename(one, 1.0)
        except (KeyError, ValueError, IndexError, RuntimeError):
            continue  # a layer that kohya's files never have, or not alone
        for name in said:
            theirs = name.rsplit(".", 2)[0] if name.endswith("weight") else name.rsplit(".", 1)[0]
            if names.setdefault(theirs, layer) != layer:
                raise ModelError(
                    "model.lora",
                    f"kohya's files for {family.title} have several layers in one; "
                    f"take the file in diffusers' naming",
                )
    return names


def split(difference: Any, rank: int) -> tuple[Update, float]:
    """The nearest update of a rank (alpha = rank), and the share of the difference that it is.

    Args:
        difference: (out, in), or (out, in, 1, 1) of a convolution.
    """
    matrix = difference.flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _truncated(u, s, v, rank, difference.shape[2:]), _share(s, rank)


def resized(update: Update, rank: int) -> tuple[Update, float]:
    """An update with a lower rank, and the share of the old one that it is."""
    # the factors' triangles make the SVD one of (rank, rank)
    q_up, r_up = torch.linalg.qr(update.up.flatten(1))
    q_down, r_down = torch.linalg.qr(update.down.flatten(1).T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T * (update.alpha / update.rank))
    new = _truncated(q_up @ u, s, v @ q_down.T, rank, update.down.shape[2:])
    return Update(new.up, new.down, new.alpha, update.magnitude), _share(s, rank)


def _truncated(u: Any, s: Any, v: Any, rank: int, sides: tuple[int, ...]) -> Update:
    """With zeros where there are fewer singular values, so that all layers have one rank."""
    count = min(rank, len(s))
    root = s[:count].sqrt()
    up = u.new_zeros(len(u), rank)
    down = v.new_zeros(rank, v.shape[1])
    up[:, :count], down[:count] = u[:, :count] * root, root[:, None] * v[:count]
    ones = [1] * len(sides)
    return Update(up.view(*up.shape, *ones), down.view(*down.shape, *ones), float(rank))


def _share(s: Any, rank: int) -> float:
    """Of the squares of all entries."""
    whole = float(s.square().sum())
    return float(s[:rank].square().sum()) / whole if whole else 1.0


def tensors(updates: Mapping[str, Update]) -> dict[str, Any]:
    """In diffusers' naming, whose alpha is in the metadata."""
    said = {}
    for layer, update in updates.items():
        said[f"{layer}.lora_A.weight"] = update.down
        said[f"{layer}.lora_B.weight"] = update.up
        if update.magnitude is not None:
            said[f"{layer}.{MAGNITUDE}"] = update.magnitude
    return said


def _unfit(file: Path, why: str) -> ModelError:
    return ModelError("model.lora", f"{file.name} cannot be used: {why}")
