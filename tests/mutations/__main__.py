"""Print `docs/invariants.md`."""

from __future__ import annotations

import sys

from .page import markdown

sys.stdout.write(markdown())
