"""What this machine is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

from gpu_agent.halt import Fault
from gpu_agent.methods.requirements import installed

QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")


def probe(smi: str = "nvidia-smi") -> dict[str, Any]:
    """What `gpu.ready` says: device (`cuda` or `cpu`), gpu, gpus, vram_mib, driver, torch, python.

    Raises:
        Fault: `gpu.failed` when there is a driver but its GPU does not answer.
    """
    about = {
        "device": "cpu",
        "gpu": None,
        "gpus": 0,
        "cpus": os.cpu_count(),
        "torch": installed("torch"),
        "python": platform.python_version(),
    }
    program = shutil.which(smi)
    if program is None:
        return about
    try:
        done = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, timeout=60, check=True
        )
        rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
        name, memory, driver = (part.strip() for part in rows[0])
        found = {"gpu": name, "gpus": len(rows), "vram_mib": int(memory), "driver": driver}
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        raise Fault("gpu.failed", f"nvidia-smi: {type(error).__name__}", retryable=True) from None
    return {**about, "device": "cuda", **found}
