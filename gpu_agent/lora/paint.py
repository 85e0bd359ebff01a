"""Sample images: a grid of prompts and seeds, painted again at chosen steps.

Each place of the grid keeps its noise: images of different steps differ by what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import draws
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.talk import Events, Pulse
from gpu_agent.recipe import Recipe

#: Denoising steps of an image.
_STEPS = 20
_STEPS_CPU = 6


class Painter:
    """Paints the recipe's prompts.

    Args:
        prompts: the conditions of each prompt, without batch.
        empty: those of no prompt.
    """

    def __init__(
        self,
        model: Model,
        prompts: Mapping[str, Conditions],
        empty: Conditions,
        accelerator: Any,
        output: Path,
        recipe: Recipe,
        events: Events,
        pulse: Pulse,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._empty = empty
        self._accelerator = accelerator
        self._folder = output / "samples"
        self._recipe = recipe
        self._events = events
        self._pulse = pulse
        self._steps = _STEPS_CPU if accelerator.device.type == "cpu" else _STEPS
        self.files: list[Path] = []

    def paint(self, step: int) -> None:
        """Raises: Stopped."""
        self._folder.mkdir(exist_ok=True)
        grid = [
            (prompt, number, seed)
            for number, prompt in enumerate(self._prompts)
            for seed in range(self._recipe.sample_seeds)
        ]
        for done, (prompt, number, seed) in enumerate(grid):
            image = self._image(self._prompts[prompt], number, seed, done, len(grid))
            file = self._folder / f"step-{step:06d}-{number}-{seed}.png"
            image.save(file)
            if file not in self.files:
                self.files.append(file)
            self._events.emit("sample", step=step, path=str(file), prompt=prompt, seed=seed)

    @torch.no_grad()
    def _image(self, prompt: Conditions, number: int, seed: int, done: int, total: int) -> Any:
        model, side = self._model, self._recipe.resolution
        noise = torch.randn(
            (1, *model.latent_shape(side, side)),
            generator=draws.generator(self._recipe.seed, "sample", number, seed),
        )
        framing = model.framing((side, side), (side, side))
        told = _batch({**prompt, **framing}, model.device)
        untold = _batch({**self._empty, **framing}, model.device)

        def predict(latents: Any, levels: Any) -> Any:
            with self._accelerator.autocast():
                said = model.predict(latents, levels, told).float()
                if model.sample_guidance == 1.0:
                    return said
                plain = model.predict(latents, levels, untold).float()
            return plain + model.sample_guidance * (said - plain)

        latents = model.objective.sample(
            predict,
            noise.to(model.device),
            self._steps,
            model.sample_shift,
            partial(self._beat, done * self._steps, total * self._steps),
        )
        return model.decode(latents)

    def _beat(self, before: int, total: int, done: int) -> None:
        self._pulse.beat("sampling", before + done, total)


def _batch(conditions: Conditions, device: Any) -> Conditions:
    return {name: tensor[None].to(device) for name, tensor in conditions.items()}
