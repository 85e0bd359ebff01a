"""Our own LoRA trainer, `gpu_agent.lora`, in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_agent.methods import Launch, Paths
from gpu_agent.wire import JobSpec

EVENTS = frozenset(
    {"started", "progress", "alive", "validation", "checkpoint", "sample", "completed", "error"}
)


class Lora:
    """`python -m gpu_agent.lora --job job.json`, speaking JSON lines."""

    #: The same as the extra `train`; `constraints.txt` has the versions that were tried.
    requirements: Sequence[str] = (
        "accelerate>=1.15",
        "diffusers==0.42.1",
        "matplotlib>=3.10",
        "numpy>=2",
        "peft>=0.21",
        "pillow>=12",
        "prodigyopt>=1.1",
        "safetensors>=0.8",
        "schedulefree>=1.4",
        "torch>=2.6",
        "transformers>=5,<6",
    )

    def launch(self, spec: JobSpec, paths: Paths, gpus: int) -> Launch:
        job = paths.work / "job.json"
        job.write_text(
            json.dumps(
                {
                    "base_file": str(paths.base),
                    "base_family": spec.base_family,
                    "images_dir": str(paths.images),
                    "output_dir": str(paths.output),
                    "work_dir": str(paths.work),
                    "recipe": dict(spec.recipe),
                    "resume_dir": str(paths.resume) if paths.resume else None,
                },
                indent=1,
            )
        )
        argv = [sys.executable, "-m", "gpu_agent.lora", "--job", str(job)]
        if gpus > 1:
            argv += ["--processes", str(gpus)]
        return Launch(
            argv=argv,
            env={"PYTHONPATH": str(_package_root(paths.work)), "PYTHONUNBUFFERED": "1"},
        )

    def read(self, line: str) -> dict[str, Any] | None:
        try:
            event = json.loads(line, parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            return None
        known = isinstance(event, dict) and event.get("event") in EVENTS
        return event if known else None


def _package_root(work: Path) -> Path:
    """The folder from which `import gpu_agent` works; a bundle is unpacked for it.

    Python could import from the bundle as it is, but tokenizers want their files on the disk.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if not root.is_file():
        return root
    unpacked = work / "bundle"
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(root) as bundle:
        bundle.extractall(unpacked)
    return unpacked
