"""What is computed once: the latents of every picture and the embedding of every caption.

Afterwards the VAE's encoder and the text encoder are not needed any more. Kept are the *moments* of
the latents, so that each step can still draw from them as training without a cache would. All of it
lies in the host's memory (0.3 MB per 512 px picture) and crosses to the GPU batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from gpu_agent.lora.data import Bucket, Picture
from gpu_agent.lora.families import Model


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser sees it.

    Attributes:
        moments: (1 or 2, 2 c, h, w): upright, and mirrored where the recipe flips.
        text: (tokens, width).
    """

    digest: str
    bucket: Bucket
    moments: Any
    text: Any


class Cache:
    """Encodes pictures and texts, each distinct text once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._texts: dict[str, Any] = {}

    def text(self, text: str) -> Any:
        if text not in self._texts:
            self._texts[text] = self._model.encode_text(text)
        return self._texts[text]

    def sample(self, picture: Picture, *, flip: bool) -> Sample:
        """Encode one picture alone, so that its latents do not depend on its neighbours."""
        image = picture.pixels()
        views = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] if flip else [image]
        return Sample(
            digest=picture.digest,
            bucket=picture.bucket,
            moments=torch.stack([self._model.encode_image(view) for view in views]),
            text=self.text(picture.caption),
        )


def move(tensors: Sequence[Any], device: Any) -> Any:
    """Stack and send to the device; to a GPU without making the host wait."""
    stacked = torch.stack(list(tensors))
    if device.type == "cuda":
        return stacked.pin_memory().to(device, non_blocking=True)
    return stacked
