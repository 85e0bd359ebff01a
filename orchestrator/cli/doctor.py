"""`stoker doctor`: looks at every part, and says in a line what is wrong and what mends it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Exit, count_words, err, out, print_json
from orchestrator.cli.servers import here, services
from state.alarms import Severity

if TYPE_CHECKING:
    from orchestrator.cli.diagnosis import Finding


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Look at every part; exit 3 when something is wrong. Warnings alone are 0.

    Example: stoker doctor

    JSON: {ok, parts: [{part, ok, severity, fault, mend, seen}]}; `severity` is critical or
    warning, and null for a part that is well, as are `fault` and `mend`.
    """
    from orchestrator.cli.diagnosis import diagnose, scrubbed  # which loads half of Stoker

    settings = here()
    with contextlib.closing(services(settings)) as have, _progress() as say:
        found = [scrubbed(item, settings) for item in diagnose(have, say=say)]
    bad = any(item.fault and item.severity is Severity.CRITICAL for item in found)
    if as_json:
        print_json({"ok": not bad, "parts": [item.row() for item in found]})
    else:
        _tell(found)
    if bad:
        raise typer.Exit(int(Exit.DOCTOR))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Sequence[str]], None]]:
    """Says on a terminal what is still being looked at."""
    if not err.is_terminal:
        yield lambda names: None
        return
    with err.status("looking …") as status:
        yield lambda names: status.update(f"looking at {', '.join(names[:6])} …")


def _tell(found: Iterable[Finding]) -> None:
    found = list(found)
    width = max(len(item.part) for item in found)
    for item in found:
        words = f"{item.fault}; mend: {item.mend}"
        if not item.fault:
            mark, words = "[green]✔[/]", item.seen or "well"
        elif item.behind:
            mark, words = "[dim]·[/]", item.fault
        else:
            mark = "[red]✘[/]" if item.severity is Severity.CRITICAL else "[yellow]![/]"
        out.print(mark, end=" ")
        out.print(f"{item.part:{width}}  {words}", markup=False, soft_wrap=True)
    faults = sum(bool(item.fault) and item.severity is Severity.CRITICAL for item in found)
    told = [item for item in found if item.fault and not item.behind]
    warnings = sum(item.severity is Severity.WARNING for item in told)
    if faults or warnings:
        err.print(
            f"{count_words(faults, 'fault')}, {count_words(warnings, 'warning')}", markup=False
        )
    else:
        err.print("all is well")
