"""`docs/invariants.md`, drawn from the catalogue."""

from __future__ import annotations

from .catalogue import INVARIANTS, MUTATIONS

HEAD = """\
# What is never otherwise

The invariants I1 to I23: the code that keeps each, the mutations that took some of that code away,
and the tests that failed for it. Generated from `tests/mutations/catalogue.py` by
`python -m tests.mutations > docs/invariants.md`; a test holds them together.

`python -m pytest tests/mutations --mutants` tries all of it again in a copy of the tree, in a few
minutes: first all tests named here pass, then, one mutation at a time, each of its tests fails. An
ordinary run only checks that the catalogue fits the code: the text that a mutation replaces stands
once where it is said to stand, the named tests are there, no invariant is left out.

The same invariants are watched while whole lives are [simulated](simulation.md), and after the
[storms](chaos.md) in which real processes are killed.
"""

TAIL = """\
## What no mutation shows

- Measures. That a dead endpoint costs others less than a second (I13), that a pass costs the same
  beside a hundred thousand finished jobs (I21) and that machines are gone in so many seconds
  (I2, I4) is measured, in [benchmarks](benchmarks.md) and in the [simulation](simulation.md).
- `kill -9` at any point (I8, I12): each commit is a point here, but only the
  [storms](chaos.md) kill.
- That signatures are compared in constant time (I18): the slower comparison is as right.
- What is kept twice. `renting.wants_release` would let the machines of an ended job go at the next
  look, had its end not done so already: without that line, tried too, nothing fails.
"""


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, (sentence, kept_by) in INVARIANTS.items():
        parts.append(f"## {name}\n\n{sentence}\n\nKept by {kept_by}\n")
        rows = ["| mutation: with it … | in | killed by |", "|---|---|---|"]
        for mutation in MUTATIONS:
            if mutation.invariant == name:
                failing = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in mutation.tests)
                rows.append(f"| {mutation.what} | `{mutation.path}` | {failing} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join([*parts, TAIL])
