"""What a command says, and how: data on stdout, the rest on stderr, errors in three lines."""

from __future__ import annotations

import enum
import json
import sys
from typing import Any, NoReturn

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
    """Ends the command: what happened, why, and what to do next."""

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


def report(error: CliError, *, as_json: bool = False) -> None:
    if as_json:
        lines = {"what": error.what, "why": error.why, "next": error.then, "exit": int(error.code)}
        print_json({"error": lines})
        return
    err.print("error: ", style="bold red", end="", markup=False)
    err.print(error.what, markup=False)
    if error.why:
        err.print(f"  why: {error.why}", markup=False)
    if error.then:
        err.print(f" next: {error.then}", markup=False)


def stop(error: CliError) -> NoReturn:
    report(error)
    raise SystemExit(int(error.code))
