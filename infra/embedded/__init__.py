"""PostgreSQL, Redis and S3 on this machine, real ones, for whoever has none."""

from infra.embedded.errors import EmbeddedError
from infra.embedded.group import Progress, Running, running, start

__all__ = ["EmbeddedError", "Progress", "Running", "running", "start"]
