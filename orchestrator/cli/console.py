"""What a command says, and how: data on stdout, the rest on stderr, errors in three lines."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console


class Exit(enum.IntEnum):
    """Exit codes; scripts rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DOCTOR = 3
    AUTH = 4
    NOT_FOUND = 5
    JOB_ENDED_BADLY = 6
    OVER_BUDGET = 7
    TIMED_OUT = 8


class CliError(Exception):
    """Ends the command: what happened, why, and what to do next; each a line."""

    def __init__(self, what: str, why: str = "", then: str = "", code: Exit = Exit.FAILED) -> None:
        super().__init__(what)
        self.what, self.why, self.then, self.code = what, why, then, code


#: Data. No colour, box or wrapping when it is not a terminal (rich sees NO_COLOR too).
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
#: Everything else.
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """One stable document."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    sys.stdout.flush()


def print_line(value: Any) -> None:
    """One document of a stream (NDJSON)."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def print_rows(console: Console, rows: Iterable[Sequence[str]]) -> None:
    """Columns, two spaces apart, never cut: an id that is cut cannot be copied."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print(text.rstrip(), markup=False, soft_wrap=True)


def report(error: CliError, *, as_json: bool = False) -> None:
    """Say what ended the command; on stdout only for those who asked for JSON."""
    if as_json:
        lines = {"what": error.what, "why": error.why, "next": error.then, "exit": int(error.code)}
        print_json({"error": lines})
        return
    err.print("error: ", style="bold red", end="", markup=False)
    err.print(_one_line(error.what), markup=False, soft_wrap=True)
    if error.why:
        err.print(f"  why: {_one_line(error.why)}", markup=False, soft_wrap=True)
    if error.then:
        err.print(f" next: {_one_line(error.then)}", markup=False, soft_wrap=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())
