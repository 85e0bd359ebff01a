"""Sample images: a grid of prompts and seeds, painted again at chosen steps.

Each place of the grid keeps its noise: images of different steps differ by what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import draws
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.talk import Events, Pulse
from gpu_agent.recipe import Recipe


def denoising_steps(device: Any) -> int:
    """How many an image takes."""
    return 6 if device.type == "cpu" else 20


@torch.no_grad()
def image(
    model: Model,
    prompt: Conditions,
    empty: Conditions,
    *,
    side: int,
    place: tuple[int | str, ...],
    accelerator: Any,
    beat: Callable[[int], None],
) -> Any:
    """Paint a square `PIL.Image`.

    Args:
        prompt, empty: conditions of the prompt and of none, without batch.
        side: in pixels.
        place: of its noise, see `draws`.
        beat: told the denoising steps done; what it raises ends it.
    """
    noise = torch.randn((1, *model.latent_shape(side, side)), generator=draws.generator(*place))
    framing = model.framing((side, side), (side, side))
    told = _batch({**prompt, **framing}, model.device)
    untold = _batch({**empty, **framing}, model.device)

    def predict(latents: Any, levels: Any) -> Any:
        with accelerator.autocast():
            said = model.predict(latents, levels, told).float()
            if model.sample_guidance == 1.0:
                return said
            plain = model.predict(latents, levels, untold).float()
        return plain + model.sample_guidance * (said - plain)

    latents = model.objective.sample(
        predict,
        noise.to(model.device),
        denoising_steps(model.device),
        model.sample_shift,
        beat,
    )
    return model.decode(latents)


class Painter:
    """Paints the recipe's prompts.

    Args:
        prompts: the conditions of each prompt, without batch.
        empty: those of no prompt.
        encode: see `adapter.Trainable`.
    """

    def __init__(
        self,
        model: Model,
        prompts: Mapping[str, Conditions],
        empty: Conditions,
        encode: Callable[[Sequence[str]], Conditions],
        accelerator: Any,
        output: Path,
        recipe: Recipe,
        events: Events,
        pulse: Pulse,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._empty = empty
        self._encode = encode
        self._accelerator = accelerator
        self._folder = output / "samples"
        self._recipe = recipe
        self._events = events
        self._pulse = pulse
        self._steps = denoising_steps(model.device)
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
            painted = image(
                self._model,
                {**self._prompts[prompt], **self._encoded(prompt)},
                {**self._empty, **self._encoded("")},
                side=self._recipe.resolution,
                place=(self._recipe.seed, "sample", number, seed),
                accelerator=self._accelerator,
                beat=partial(self._beat, done * self._steps, len(grid) * self._steps),
            )
            file = self._folder / f"step-{step:06d}-{number}-{seed}.png"
            painted.save(file)
            if file not in self.files:
                self.files.append(file)
            self._events.emit("sample", step=step, path=str(file), prompt=prompt, seed=seed)

    @torch.no_grad()
    def _encoded(self, text: str) -> Conditions:
        with self._accelerator.autocast():
            return {name: tensor[0] for name, tensor in self._encode([text]).items()}

    def _beat(self, before: int, total: int, done: int) -> None:
        self._pulse.beat("sampling", before + done, total)


def _batch(conditions: Conditions, device: Any) -> Conditions:
    return {name: tensor[None].to(device) for name, tensor in conditions.items()}
