"""What is computed once: the latents of every picture and the embedding of every caption.

Afterwards the VAE's encoder and the text encoder are not needed any more. Kept are the *moments* of
the latents, so that each step can still draw from them as training without a cache would. All of it
lies in the host's memory (0.3 MB per 512 px picture) and crosses to the GPU batch by batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from gpu_agent.lora.data import Bucket, Picture
from gpu_agent.lora.families.base import Conditions, Model


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser sees it.

    Attributes:
        moments: (1 or 2, 2 c, …, h, w): upright, and mirrored where the recipe flips.
        conditions: one for each way in which the picture's caption is said, without batch.
    """

    digest: str
    bucket: Bucket
    moments: Any
    conditions: tuple[Conditions, ...]


class Cache:
    """Encodes pictures and texts, each distinct text once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._texts: dict[str, Conditions] = {}

    def text(self, text: str) -> Conditions:
        """The conditions of a text, without batch, on the host."""
        if text not in self._texts:
            with torch.no_grad():
                said = self._model.encode_texts([text])
            self._texts[text] = {name: tensor[0].cpu() for name, tensor in said.items()}
        return self._texts[text]

    def sample(self, picture: Picture, *, flip: bool) -> Sample:
        """Encode one picture alone, so that its latents do not depend on its neighbours."""
        image = picture.pixels()
        views = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] if flip else [image]
        framing = self._model.framing(picture.size, picture.bucket)
        return Sample(
            digest=picture.digest,
            bucket=picture.bucket,
            moments=torch.stack([self._model.encode_image(view) for view in views]),
            conditions=({**self.text(picture.caption), **framing},),
        )


def move(tensors: Sequence[Any], device: Any) -> Any:
    """Stack and send to the device; to a GPU without making the host wait."""
    stacked = torch.stack(list(tensors))
    if device.type == "cuda":
        return stacked.pin_memory().to(device, non_blocking=True)
    return stacked


def move_conditions(several: Sequence[Mapping[str, Any]], device: Any) -> Conditions:
    """As `move`, for the conditions of each sample of a batch."""
    return {name: move([one[name] for one in several], device) for name in several[0]}
