"""What one training is asked to do: job.json, read and checked before anything heavy starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_agent.lora.errors import JobError
from gpu_agent.lora.families import family
from gpu_agent.recipe import Recipe, RecipeError

_PATHS = ("base_file", "images_dir", "output_dir", "work_dir")


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        base_file: a single safetensors file in the LDM layout, or a diffusers folder.
        base_family: which of `families` it belongs to.
        images_dir: photographs, each with its caption in a .txt of the same stem, or without.
        output_dir: where the result is put.
        work_dir: for checkpoints and everything else that may go when the result is there.
        resume_dir: a checkpoint of an earlier attempt, or a folder of several.
    """

    base_file: Path
    base_family: str
    images_dir: Path
    output_dir: Path
    work_dir: Path
    recipe: Recipe
    resume_dir: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read job.json; its relative paths count from the current directory.

        Raises:
            JobError: `job.invalid`, or `recipe.invalid` with every fault of the recipe.
        """
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise JobError("job.invalid", f"cannot read {path.name}: {error}") from None
        if not isinstance(value, dict):
            raise JobError("job.invalid", f"{path.name} is not a JSON object")
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Job:
        paths = {key: Path(_text(value, key)) for key in _PATHS}
        recipe = value.get("recipe", {})
        if not isinstance(recipe, dict):
            raise JobError("job.invalid", "recipe must be an object")
        chosen = family(_text(value, "base_family"))
        try:
            checked = Recipe.from_dict(recipe, chosen.name)
        except RecipeError as error:
            raise JobError("recipe.invalid", str(error)) from None
        resume = _text(value, "resume_dir") if value.get("resume_dir") is not None else None
        return cls(
            **paths,
            base_family=chosen.name,
            recipe=checked,
            resume_dir=Path(resume) if resume else None,
        )


def _text(value: Mapping[str, Any], key: str) -> str:
    got = value.get(key)
    if not isinstance(got, str) or not got:
        raise JobError("job.invalid", f"{key} must be a text")
    return got
