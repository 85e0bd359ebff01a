"""PostgreSQL, Redis and S3 on this machine, real ones, for whoever has none."""

from infra.embedded.errors import EmbeddedError
from infra.embedded.group import Progress, Running, running, start
from infra.embedded.program import Program

__all__ = ["EmbeddedError", "Program", "Progress", "Running", "running", "start"]
