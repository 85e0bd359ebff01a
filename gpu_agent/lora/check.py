"""Proves that a LoRA file works: diffusers loads it, and images come out differently with it.

::

    python -m gpu_agent.lora.check LORA.safetensors --base BASE [--family sd1]
        [--kohya TWIN.safetensors] [--json]

The same prompt is rendered from the same noise without and with the LoRA. ``changed`` is the mean
difference of a pixel in levels of 0 to 255; ``kohya_differs`` is the largest difference between
the images of both files. The exit status is 0 where everything that was asked for holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_agent.lora import families
from gpu_agent.lora.hush import hush_libraries
from gpu_agent.recipe import FAMILIES

#: A difference of the twins' images up to this is rounding (levels of 0 to 255).
_SAME = 1.0


@dataclass(frozen=True)
class Proof:
    """What was found; `error` says what went wrong, if anything did."""

    loads: bool = False
    changed: float = 0.0
    layers: int = 0
    kohya_loads: bool | None = None
    kohya_differs: float | None = None
    error: str | None = None

    @property
    def holds(self) -> bool:
        twin = self.kohya_loads is None or (
            self.kohya_loads and self.kohya_differs is not None and self.kohya_differs <= _SAME
        )
        return self.loads and self.changed > 0 and twin


def prove(
    lora: Path,
    base: Path,
    kohya: Path | None = None,
    *,
    family: str = "sd1",
    side: int = 64,
    steps: int = 3,
) -> Proof:
    """Load, render and compare. A file that does not load makes a proof that does not hold."""
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = families.family(family).pipeline(base, Path(scratch))
        pipeline.set_progress_bar_config(disable=True)
        plain = _render(pipeline, side, steps)
        try:
            ours, layers = _with_lora(pipeline, lora, side, steps)
        except Exception as error:  # noqa: BLE001 -- any failure to load is the answer
            return Proof(error=f"{lora.name}: {error}")
        proof = Proof(loads=True, changed=float(abs(ours - plain).mean()), layers=layers)
        if kohya is None:
            return proof
        try:
            theirs, _ = _with_lora(pipeline, kohya, side, steps)
        except Exception as error:  # noqa: BLE001 -- likewise
            return replace(proof, kohya_loads=False, error=f"{kohya.name}: {error}")
        return replace(proof, kohya_loads=True, kohya_differs=float(abs(theirs - ours).max()))


def _with_lora(pipeline: Any, lora: Path, side: int, steps: int) -> tuple[Any, int]:
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
    try:
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        layers = sum(name.endswith(".lora_A") for name, _ in denoiser.named_modules())
        return _render(pipeline, side, steps), layers
    finally:
        pipeline.unload_lora_weights()


def _render(pipeline: Any, side: int, steps: int) -> Any:
    import torch

    image = pipeline(
        prompt="a photo",
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    return image * 255.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_agent.lora.check", description=__doc__)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--family", default="sd1", choices=list(FAMILIES))
    parser.add_argument("--kohya", type=Path)
    parser.add_argument("--side", type=int, default=64, help="pixels of the rendered square")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    hush_libraries()
    proof = prove(asked.lora, asked.base, asked.kohya, family=asked.family, side=asked.side)
    said = {**asdict(proof), "holds": proof.holds}
    lines = [json.dumps(said)] if asked.json else [f"{key}: {value}" for key, value in said.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(main())
