"""What stands in fences in the documentation, for the tests that run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]


@dataclass(frozen=True)
class Snippet:
    """`language` is empty where a fence names none; `line` is that of the fence."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> Iterator[Snippet]:
    """Those of the README and of all pages, in their order."""
    for path in PAGES:
        page = str(path.relative_to(REPOSITORY))
        text = path.read_text()
        for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
            body = re.sub(f"^{found[1]}", "", found[3], flags=re.M)
            yield Snippet(page, text[: found.start()].count("\n") + 1, found[2], body)
