"""What a command says, and how: data on stdout, the rest on stderr, errors in three lines."""

from __future__ import annotations

import enum
import json
import sys
import textwrap
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
#: What stands before words that did not fit into their row.
BELOW = "    "
#: Words are wrapped beside their row where so many characters are left, else below it.
LEAST = 24
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


def print_rows(
    console: Console, rows: Iterable[Sequence[str]], *, spare: Sequence[str] = ()
) -> None:
    """Columns, two spaces apart, never cut: an id that is cut cannot be copied.

    On a terminal that is too narrow, columns whose titles are in `spare` are left out, the first
    of them first; a last column that does not fit is wrapped.
    """
    for line in fitted([list(row) for row in rows], _room(console), spare):
        console.print(line, markup=False, soft_wrap=True)


def _room(console: Console) -> int | None:
    """Characters in a line; None where nobody counts them."""
    return console.width if console.is_terminal else None


def fitted(lines: list[list[str]], room: int | None, spare: Sequence[str] = ()) -> list[str]:
    """`lines` (the titles first, where there are any) as text, as `print_rows` says."""
    left = list(spare)
    while room is not None and left and _least(lines) > room:
        title = left.pop(0)
        if title in lines[0]:
            place = lines[0].index(title)
            lines = [line[:place] + line[place + 1 :] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if room is not None and len(lines[0]) > 2 and not lines[0][-1]:
        # a last column without a title is an ornament
        fits = sum(width + 2 for width in widths[:-1]) + widths[-1] <= room
        lines = lines if fits else [[*line[:-1], ""] for line in lines]
    told = []
    for *cells, last in lines:
        text = "".join(f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=False))
        if room is None or len(text) + len(last) <= room or not cells:
            told.append((text + last).rstrip())
            continue
        beside = max(map(len, last.split()), default=0) <= room - len(text) >= LEAST
        told += _wrapped(last, room, text if beside else BELOW, [] if beside else [text.rstrip()])
    return told


def _wrapped(words: str, room: int, first: str, above: list[str]) -> list[str]:
    """`words` behind `first`, and further lines below them."""
    return above + textwrap.wrap(
        words,
        max(room, LEAST),
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _least(lines: Sequence[Sequence[str]]) -> int:
    """Characters that all columns but the last take, and that one's title."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return sum(widths[:-1]) + len(lines[0][-1])


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


def size_words(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 50_000 else f"{size / 1e3:.1f} kB"


def count_words(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
