"""One door, several trainers: what a training method must be able to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpu_agent.wire import JobSpec


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things lie on the machine. `resume` is a folder of checkpoints, where there are any."""

    base: Path
    images: Path
    output: Path
    work: Path
    resume: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A trainer to start: its argv, and what is added to the agent's environment."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Method(Protocol):
    """A way to train.

    `read` turns one line of the trainer's output into an event: a mapping whose `event` is
    `started`, `progress`, `alive`, `validation`, `checkpoint`, `sample`, `completed` or `error`.
    None means that the line is not one; it goes to the log.
    """

    @property
    def requirements(self) -> Sequence[str]:
        """Python packages that the trainer imports, as `name>=1.2,<2`."""

    def launch(self, spec: JobSpec, paths: Paths, gpus: int) -> Launch:
        """Put the configuration in place, and say how to start on so many GPUs; 0 is a CPU."""

    def read(self, line: str) -> dict[str, Any] | None:
        """Read one line."""
