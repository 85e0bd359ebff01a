"""Makes very small base models with random weights, for the demo, the tests and the bench.

::

    python -m gpu_agent.lora.tiny_base OUT --family sd1 --seed 0

The classes are the real ones, and so are the files: a single safetensors, or a diffusers folder
where that is how the family comes. Only the widths are small, so that a CPU trains a LoRA on it in
seconds. Equal seeds make equal files.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from gpu_agent.lora.hush import hush_libraries
from gpu_agent.recipe import FAMILIES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_agent.lora.tiny_base", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="sd1", choices=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    hush_libraries()
    write(asked.out, asked.seed, asked.family)


def write(out: Path, seed: int = 0, family: str = "sd1") -> Path:
    """Write a model; returns `out`."""
    # imports torch, which --help need not wait for
    import_module(f"gpu_agent.lora.tiny.{family}").write(out, seed)
    return out


if __name__ == "__main__":
    main()
