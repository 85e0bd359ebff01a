"""A trainer that trains nothing: `python protocol_trainer.py --job job.json`.

It says what `gpu_agent.lora` says, with a checkpoint half-way and a result at the end, one step in
`PAUSE_S`. Standard library only, so that a job costs little more than its agent.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

PAUSE_S = 0.1
FLOATS = 256


def say(event: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **more}) + "\n")
    sys.stdout.flush()


def weights() -> bytes:
    """A safetensors file like no other."""
    header = {"t": {"dtype": "U8", "shape": [FLOATS], "data_offsets": [0, FLOATS]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + os.urandom(FLOATS)


def main(job: dict[str, Any]) -> None:
    output, steps = Path(job["output_dir"]), int(job["recipe"]["steps"])
    assert any(Path(job["images_dir"]).iterdir())
    assert Path(job["base_file"]).stat().st_size
    say("started", total=steps, loss_first=0.9, parameters=FLOATS)
    for step in range(1, steps + 1):
        time.sleep(PAUSE_S)
        say("progress", step=step, total=steps, loss=1 / step, points=[[step, 1 / step]])
        if step == max(1, steps // 2):
            folder = output / f"checkpoint-{step}"
            folder.mkdir(exist_ok=True)
            (folder / "lora.safetensors").write_bytes(weights())
            say("checkpoint", step=step, path=str(folder), loss=1 / step)
    path = output / "lora.safetensors"
    path.write_bytes(weights())
    files = [{"name": path.name, "path": str(path)}]
    say("completed", files=files, loss_first=0.9, loss_best=1 / steps, best_step=steps)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text()))
