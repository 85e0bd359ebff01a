"""`docs/invariants.md`, drawn from the catalogue."""

from __future__ import annotations

from .catalogue import INVARIANTS, MUTATIONS

HEAD = """\
# What is never otherwise

The invariants I1 to I22: the code that keeps each, the mutations that took some of that code away,
and the tests that failed for it. Generated from `tests/mutations/catalogue.py` by
`python -m tests.mutations > docs/invariants.md`; a test holds them together.

`python -m pytest tests/mutations --mutants` tries all of it again in a copy of the tree, in a few
minutes: first all tests named here pass, then, one mutation at a time, each of its tests fails. An
ordinary run only checks that the catalogue fits the code: the text that a mutation replaces stands
once where it is said to stand, the named tests are there, no invariant is left out.

The same invariants are watched while whole lives are [simulated](simulation.md), and after the
[storms](chaos.md) in which real processes are killed.
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
    return "\n".join(parts)
