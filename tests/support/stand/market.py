"""The Vast sandbox for chaos: `python market.py IMAGE PORT DATA_DIR BASES`, run as a file.

Its machines run the real onstart script and the real agent. IMAGE is made into a folder with a
`python3` that every machine finds first: it starts the agent by way of `protocol_agent.py`, so
that jobs whose trigger is not `real` are trained by a program that needs no torch.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
#: Each host so many times: a host on which chaos struck is not rented again for a day.
COPIES = 60

SHIM = """#!/bin/sh
case "${{1:-}}" in
  gpu_agent.pyz) exec {python} {agent} "$@" ;;
esac
exec {python} "$@"
"""


def make_image(folder: Path) -> Path:
    """The `python3` that machines run."""
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / "python3"
    fresh = folder / f"python3.{os.getpid()}"
    fresh.write_text(SHIM.format(python=sys.executable, agent=HERE / "protocol_agent.py"))
    fresh.chmod(0o755)
    fresh.rename(shim)
    return shim


def main(image: Path, port: int, data: Path, bases: Path) -> int:
    # machines take the interpreter of the sandbox for the image's, as it is when it is imported
    sys.executable = str(make_image(image))
    from infra.sandbox.hosts import seeded
    from infra.sandbox.server import running_sandbox

    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    # a market that was killed forgets all; its next life must not give out the same ids again
    seed = os.getpid()
    hosts = [
        dataclasses.replace(host, machine_id=host.machine_id + 100_000 * copy)
        for copy in range(COPIES)
        for host in seeded(seed)
    ]
    with running_sandbox(
        account_key=os.environ["SANDBOX_ACCOUNT_KEY"],
        civitai_key=os.environ["SANDBOX_CIVITAI_KEY"],
        base_model_dir=bases,
        data_dir=data,
        port=port,
        seed=seed,
        hosts=hosts,
        boot_s=0.5,
        credit=10_000.0,
        keep_logs=True,
    ):
        over.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))
