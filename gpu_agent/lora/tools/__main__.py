"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gpu_agent.lora import tools
from gpu_agent.lora.errors import TrainerError
from gpu_agent.lora.hush import hush_libraries


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    hush_libraries()
    from gpu_agent.lora.tools import work  # torch: seconds

    try:
        if asked.out.exists():
            raise FileExistsError(f"{asked.out} is there already")
        if asked.does == "merge":
            said = work.merge(asked.base, asked.lora, asked.out, asked.family, asked.scale)
        elif asked.does == "extract":
            said = work.extract(
                asked.base, asked.tuned, asked.out, asked.family, asked.rank, asked.naming
            )
        else:
            said = work.resize(asked.lora, asked.out, asked.rank)
    except (TrainerError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_agent.lora.tools",
        description=tools.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="does", required=True)
    merge = commands.add_parser("merge", help="a base with a LoRA's change made for good")
    extract = commands.add_parser("extract", help="a LoRA of what tells two models apart")
    resize = commands.add_parser("resize", help="a LoRA of a lower rank")
    for command, names in (
        (merge, ("base", "lora", "out")),
        (extract, ("base", "tuned", "out")),
        (resize, ("lora", "out")),
    ):
        for name in names:
            command.add_argument(name, type=Path)
    for command in (merge, extract):
        command.add_argument("--family", required=True)
    merge.add_argument("--scale", type=float, default=1.0)
    for command in (extract, resize):
        command.add_argument("--rank", type=_rank, required=True)
    extract.add_argument("--naming", choices=("diffusers", "kohya", "comfyui"), default="diffusers")
    return parser


def _rank(said: str) -> int:
    rank = int(said)
    if rank < 1:
        raise ValueError(said)
    return rank


if __name__ == "__main__":
    sys.exit(main())
