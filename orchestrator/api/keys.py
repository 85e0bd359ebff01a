"""API keys as text, for whoever makes, hashes or tells them apart."""

from __future__ import annotations

import hashlib

#: What a key begins with: a live one spends money; what a test key orders is rehearsed.
LIVE_PREFIX, TEST_PREFIX = "stk_live_", "stk_test_"
#: Ends the name of the owner that a test key acts for; no other owner's name ends so.
TEST_OWNER = "~test"


def is_test(owner: str) -> bool:
    """Whether what belongs to `owner` was made with test keys."""
    return owner.endswith(TEST_OWNER)


def hash_of(key: str) -> str:
    """What is kept of an API key: lower-case hex SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()
