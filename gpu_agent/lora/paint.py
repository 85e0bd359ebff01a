"""Sample images: a grid of prompts and seeds, painted again at chosen steps.

Each place of the grid keeps its noise: images of different steps differ by what was learned. At the
end all of them are put on one sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from gpu_agent.lora import draws
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.talk import Events, Pulse
from gpu_agent.recipe import Recipe

#: Side of an image on the sheet (pixels), and the longest side of a sheet that is not too long for
#: its readers.
_CELL, _LONGEST_SHEET = 256, 8192
#: Pixels of a line of text, and around everything.
_LINE, _GAP = 16, 8


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

    @property
    def files(self) -> list[Path]:
        """All images that there are, of earlier attempts on this disk too, and the sheet."""
        return sorted(self._folder.glob("*.png"))

    def clear(self) -> None:
        """Forget what an earlier training left in the same folder."""
        for file in self.files:
            file.unlink()

    def paint(self, step: int) -> None:
        """Paint what was not yet painted of a step. Raises: Stopped."""
        self._folder.mkdir(exist_ok=True)
        grid = self._grid()
        for done, (prompt, number, seed) in enumerate(grid):
            file = self._file(step, number, seed)
            if file.exists():
                continue
            painted = image(
                self._model,
                {**self._prompts[prompt], **self._encoded(prompt)},
                {**self._empty, **self._encoded("")},
                side=self._recipe.resolution,
                place=(self._recipe.seed, "sample", number, seed),
                accelerator=self._accelerator,
                beat=partial(self._beat, done * self._steps, len(grid) * self._steps),
            )
            _save(painted, file)
            self._events.emit("sample", step=step, path=str(file), prompt=prompt, seed=seed)

    def put_together(self, kept: int) -> None:
        """Write `grid.png`: a row for each prompt and seed, a column for each step.

        Args:
            kept: the step whose weights are the result.
        """
        steps = sorted({int(file.name.split("-")[1]) for file in self._folder.glob("step-*.png")})
        rows = self._grid()
        side = min(_CELL, _LONGEST_SHEET // (1 + max(len(steps), len(rows))))
        pitch, left, top = side + _GAP, _CELL, _LINE + 2 * _GAP
        size = (left + len(steps) * pitch, top + len(rows) * pitch)
        sheet = Image.new("RGB", size, "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE * 3 // 4)
        for column, step in enumerate(steps):
            label = f"step {step}, kept" if step == kept else f"step {step}"
            pen.text((left + column * pitch, _GAP), label, fill="black", font=font)
        for row, (prompt, number, seed) in enumerate(rows):
            y = top + row * pitch
            words = _wrapped(f"{prompt} · seed {seed}", _CELL - 2 * _GAP, font)
            for line, text in enumerate(words[: max(1, side // _LINE)]):
                pen.text((_GAP, y + line * _LINE), text, fill="black", font=font)
            for column, step in enumerate(steps):
                file = self._file(step, number, seed)
                if file.exists():
                    with Image.open(file) as painted:
                        sheet.paste(painted.resize((side, side)), (left + column * pitch, y))
        _save(sheet, self._folder / "grid.png")

    def _grid(self) -> list[tuple[str, int, int]]:
        """Prompt, its number, and seed of each image."""
        return [
            (prompt, number, seed)
            for number, prompt in enumerate(self._prompts)
            for seed in range(self._recipe.sample_seeds)
        ]

    def _file(self, step: int, number: int, seed: int) -> Path:
        return self._folder / f"step-{step:06d}-{number}-{seed}.png"

    @torch.no_grad()
    def _encoded(self, text: str) -> Conditions:
        with self._accelerator.autocast():
            return {name: tensor[0] for name, tensor in self._encode([text]).items()}

    def _beat(self, before: int, total: int, done: int) -> None:
        self._pulse.beat("sampling", before + done, total)


def _batch(conditions: Conditions, device: Any) -> Conditions:
    return {name: tensor[None].to(device) for name, tensor in conditions.items()}


def _save(picture: Any, file: Path) -> None:
    """Write a PNG, which appears whole or not at all."""
    part = file.with_name(file.name + ".part")
    picture.save(part, "PNG")
    part.replace(file)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """`text` in lines of at most so many pixels, as far as its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
