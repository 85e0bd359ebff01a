"""`python protocol_agent.py gpu_agent.pyz`: the agent of that bundle, with a trainer of ours.

All that the agent does is its own: hello, downloads, spool, reports, uploads, dead man's switch.
Only what it starts for `lora` is `protocol_trainer.py`, unless the job's trigger is `real`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(sys.argv[1]).absolute())

from gpu_agent import agent  # noqa: E402 -- from the bundle, which is not there before
from gpu_agent.__main__ import main  # noqa: E402
from gpu_agent.methods import Launch, Paths  # noqa: E402
from gpu_agent.methods.lora import Lora  # noqa: E402
from gpu_agent.wire import JobSpec  # noqa: E402

TRAINER = Path(__file__).with_name("protocol_trainer.py")


class Protocol(Lora):
    """The door of `lora` with a program behind it that only speaks."""

    requirements: Sequence[str] = ()

    def launch(self, spec: JobSpec, paths: Paths, gpus: int) -> Launch:
        launch = super().launch(spec, paths, gpus)
        if spec.recipe.get("trigger") == "real":
            return launch
        argv: list[Any] = [sys.executable, "-I", "-S", str(TRAINER), *launch.argv[3:]]
        return Launch(argv=argv, env=launch.env)


if __name__ == "__main__":
    agent.METHODS["lora"] = Protocol  # type: ignore[index] # a dict in fact
    sys.exit(main())
