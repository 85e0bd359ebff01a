"""Prior preservation: the class of the subject, as the base model paints it.

Images of the class are trained on beside the subject's own, so that all dogs do not become the one
dog (arXiv:2208.12242). Where the dataset brings none, the base model paints them before anything
is trained, each from noise of its own, which follows from the seed. What was painted stays on the
disk for a training that goes on or comes again there.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from gpu_agent.lora import images, paint
from gpu_agent.lora.cache import Cache
from gpu_agent.lora.data import Picture, digest_of
from gpu_agent.lora.errors import DatasetError
from gpu_agent.lora.families.base import Model
from gpu_agent.lora.talk import Pulse
from gpu_agent.recipe import Recipe


def painted(
    model: Model, cache: Cache, recipe: Recipe, folder: Path, accelerator: Any, pulse: Pulse
) -> list[Picture]:
    """As many images of the class as the recipe wants, painted or found. Raises: Stopped."""
    side, count = recipe.resolution, recipe.prior_images
    told = "/".join(map(str, [cache.origin, recipe.prior_prompt, side, recipe.seed]))
    folder = folder / hashlib.sha256(told.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    steps = paint.denoising_steps(model.device)
    pictures = []
    for number in range(count):
        file = folder / f"{number:04d}.png"
        if not _is_whole(file, side):
            image = paint.image(
                model,
                cache.text(recipe.prior_prompt),
                cache.text(""),
                side=side,
                place=(recipe.seed, "prior", number),
                accelerator=accelerator,
                beat=lambda done, before=number * steps: pulse.beat(
                    "prior", before + done, count * steps
                ),
            )
            part = file.with_suffix(f".{os.getpid()}")  # several processes may paint
            image.save(part, "PNG")
            part.replace(file)
        pictures.append(
            Picture(
                path=file,
                digest=digest_of(file),
                caption=recipe.prior_prompt,
                size=(side, side),
                bucket=(side, side),
            )
        )
    # `decode` leaves it on the host
    model.vae.to(model.device)
    return pictures


def _is_whole(file: Path, side: int) -> bool:
    try:
        return file.is_file() and images.rgb(file, (side, side)).size == (side, side)
    except DatasetError:
        return False
