"""Makes the client package: `python -m infra.client --spec docs/openapi.json OUT`.

Needs `openapi-python-client` on the PATH, or its place by `--generator`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_agent import wire

ADDED = Path(__file__).parent / "stoker-client"
PACKAGE = "stoker_client"


def make(spec: Path, out: Path, generator: str) -> Path:
    """Write the package into `out`, which need not exist; the folder to install.

    Raises:
        RuntimeError: the generator failed, or left something of the API out.
    """
    package = out / PACKAGE
    # its formatter lies beside it
    beside = f"{Path(generator).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [
            *(generator, "generate", "--path", spec, "--meta", "none"),
            *("--output-path", package, "--overwrite", "--fail-on-warning"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": beside},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{generator} failed: {done.stdout}{done.stderr}")
    for name in ("training.py", "webhooks.py"):
        shutil.copy(ADDED / name, package)
    # signatures are checked by the code that makes them
    shutil.copy(wire.__file__, package / "_wire.py")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ADDED / name, out)
    (package / "py.typed").touch()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.client", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="docs/openapi.json")
    parser.add_argument("--generator", default=shutil.which("openapi-python-client") or "")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    if not given.generator:
        parser.error(
            "openapi-python-client is not on the PATH; `pipx install openapi-python-client`"
        )
    try:
        make(given.spec, given.out, given.generator)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
