"""The three tools. Each says in numbers what it did."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import export, tensor_file
from gpu_agent.lora.errors import JobError, ModelError
from gpu_agent.lora.families import family, naming
from gpu_agent.lora.tools import low_rank
from gpu_agent.lora.tools.weights import Weights

_NAMINGS = {"kohya": naming.KOHYA, "comfyui": naming.COMFYUI}


def merge(base: Path, lora: Path, out: Path, name: str, scale: float) -> dict[str, Any]:
    """Write `base` with `scale` times a LoRA's change: a folder or a file, as the base is.

    Raises:
        ModelError: one of them cannot be read, they do not fit, or the sum is not finite.
    """
    row = family(name)
    weights = Weights(base, row)
    read = low_rank.read(lora)
    updates = low_rank.by_layer(read, weights.layers, row, lora)
    weights.write(
        out, {layer: partial(_on, layer, update, scale) for layer, update in updates.items()}
    )
    return {"layers": len(updates), "scale": scale}


def _on(layer: str, update: low_rank.Update, scale: float, weight: Any) -> Any:
    if not update.fits(tuple(weight.shape)):
        raise ModelError("model.lora", f"the LoRA's {layer} is of another shape than the base's")
    return update.on(weight, scale)


def extract(
    base: Path, tuned: Path, out: Path, name: str, rank: int, naming_: str = "diffusers"
) -> dict[str, Any]:
    """Write a LoRA of what was trained into a model, as well as the rank allows.

    Convolutions wider than a pixel, norms and biases are left out.

    Raises:
        ModelError: a model cannot be read, or the two do not fit or do not differ.
        JobError: the family has no such naming.
    """
    row = family(name)
    if naming_ != "diffusers" and _NAMINGS[naming_] not in row.exports():
        raise JobError("job.naming", f"{row.title} has no naming {naming_} here")
    ours, theirs = Weights(base, row), Weights(tuned, row)
    if ours.layers.keys() != theirs.layers.keys():
        raise ModelError("model.family", f"{tuned.name} has other layers than {base.name}")
    updates, shares, wide = {}, [], 0
    for layer in ours.layers:
        before, after = ours.read(layer), theirs.read(layer)
        if before.shape != after.shape:
            raise ModelError("model.family", f"{layer} of {tuned.name} has another shape")
        difference = after - before
        if not difference.any():
            continue
        if math.prod(before.shape[2:]) > 1:
            wide += 1
            continue
        updates[layer], share = low_rank.split(difference, rank)
        shares.append(share)
    if not updates:
        raise ModelError("model.same", f"{tuned.name} and {base.name} do not differ in any matrix")
    tensors = low_rank.tensors(updates)
    if naming_ == "diffusers":
        tensor_file.write(out, tensors, export.adapter_metadata(_configs(updates, rank)))
    else:
        told = {"format": "pt", "ss_network_module": "networks.lora"}
        told |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
        told["ss_base_model_version"] = row.kohya_version
        tensor_file.write(out, row.exports()[_NAMINGS[naming_]](tensors, float(rank)), told)
    return {"layers": len(updates), "left_out": wide, "kept": min(shares)}


def _configs(updates: dict[str, low_rank.Update], rank: int) -> dict[str, dict[str, Any]]:
    from peft import LoraConfig

    layers: dict[str, list[str]] = {}
    for layer in updates:
        part, rest = layer.split(".", 1)
        # by the ends alone in text encoders, whose names begin otherwise in another transformers
        layers.setdefault(part, []).append(
            rest.rsplit(".", 1)[-1] if part.startswith("text_encoder") else rest
        )
    return {
        part: LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(set(names))).to_dict()
        for part, names in layers.items()
    }


def resize(lora: Path, out: Path, rank: int) -> dict[str, Any]:
    """Write a LoRA of a lower rank, in the naming that it has.

    Raises:
        ModelError: it cannot be read, or its rank is not higher.
    """
    read = low_rank.read(lora)
    highest = max(update.rank for update in read.updates.values())
    if highest <= rank:
        raise ModelError("model.lora", f"{lora.name} has rank {highest}, which is not above {rank}")
    found = {layer: low_rank.resized(one, rank) for layer, one in read.updates.items()}
    updates = {layer: update for layer, (update, _) in found.items()}
    metadata = {key: value for key, value in read.metadata.items() if "hash" not in key}
    if read.kohya:
        tensors: dict[str, Any] = {}
        for layer, update in updates.items():
            tensors[f"{layer}.lora_down.weight"] = update.down
            tensors[f"{layer}.lora_up.weight"] = update.up
            tensors[f"{layer}.alpha"] = torch.tensor(update.alpha)
            if update.magnitude is not None:
                tensors[f"{layer}.dora_scale"] = update.magnitude
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    else:
        tensors = low_rank.tensors(updates)
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for key in told:
            if key.endswith((".r", ".lora_alpha")):
                told[key] = rank
        if told:
            metadata["lora_adapter_metadata"] = json.dumps(told, sort_keys=True)
    tensor_file.write(out, tensors, metadata)
    return {"layers": len(updates), "kept": min(share for _, share in found.values())}
