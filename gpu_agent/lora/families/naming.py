"""Other programs' names for the tensors of an adapter.

Ours are diffusers': `unet.a.b.lora_A.weight`, `lora_B.weight` and, of DoRA,
`lora_magnitude_vector`; alpha is in the file's metadata. A family's module says in its
`EXPORTS` which further files are written, and how each is made from these. Most of them differ in
the names of layers only; what comes after a layer's name is the same in kohya's and in ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Diffusers-named tensors and alpha → the tensors of another file; none where it has no words for
#: the adapter.
Export = Callable[[Mapping[str, Any], float], dict[str, Any]]

KOHYA = "lora_kohya.safetensors"
COMFYUI = "lora_comfyui.safetensors"

#: DoRA's, of each output of a layer.
MAGNITUDE = "lora_magnitude_vector"
_LEAVES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    MAGNITUDE: "dora_scale",
}
#: What a diffusers file calls a part of the model → what kohya's files for SD 1.x and 2.x call it.
_KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te"}


def split(name: str) -> tuple[str, str]:
    """`unet.a.b.lora_A.weight` → `unet.a.b`, `lora_A.weight`. Raises ValueError for other names."""
    for leaf in _LEAVES:
        if name.endswith("." + leaf):
            return name.removesuffix("." + leaf), leaf
    raise ValueError(f"{name} is no tensor of an adapter")


def renamed(
    tensors: Mapping[str, Any], alpha: float, layer_name: Callable[[str], str]
) -> dict[str, Any]:
    """`LAYER.lora_A.weight` → `layer_name(LAYER).lora_down.weight`, and an alpha per layer."""
    said: dict[str, Any] = {}
    for name, tensor in tensors.items():
        layer, leaf = split(name)
        theirs = layer_name(layer)
        if leaf == MAGNITUDE:
            # (out,) or, of a convolution, (1, out, 1, 1) -> as the weight: (out, 1), (out, 1, 1, 1)
            tensor = tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1)
        said[f"{theirs}.{_LEAVES[leaf]}"] = tensor
        said[f"{theirs}.alpha"] = torch.tensor(alpha)
    return said


def kohya(tensors: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """`unet.a.b.lora_A.weight` → `lora_unet_a_b.lora_down.weight`, as SD 1.x and 2.x have it."""

    def layer_name(layer: str) -> str:
        part, rest = layer.split(".", 1)
        return f"{_KOHYA_PARTS[part]}_{rest.replace('.', '_')}"

    return renamed(tensors, alpha, layer_name)
