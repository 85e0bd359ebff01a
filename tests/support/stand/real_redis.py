"""What only a real Redis does: the stand-in knows no passwords and keeps nothing on disk."""

from __future__ import annotations

import pytest

from infra.embedded import redis

NEEDS_REDIS = pytest.mark.skipif(
    redis.find() is None, reason="no Redis comes with this Python; install redis-server"
)
