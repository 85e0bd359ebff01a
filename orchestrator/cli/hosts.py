"""Commands for what is remembered of rented machines: hosts ls, show, block, unblock."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from orchestrator.cli.client import Client
from orchestrator.cli.completion import machines
from orchestrator.cli.console import err, out, print_json, print_rows
from orchestrator.cli.jobs import AsJson

Machine = Annotated[
    str,
    typer.Argument(
        help="The machine's number, as `stoker hosts ls` shows it.", autocompletion=machines
    ),
]
TITLE = ("MACHINE", "GPU", "PLACE", "GOOD/BAD", "BOOT", "MBIT/S", "STEPS/S", "NOW", "LAST FAILURE")

#: What a narrow terminal goes without.
SPARE = ("STEPS/S", "MBIT/S", "BOOT", "PLACE")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Rented machines: how they did, and which to leave alone.")
    for command in (ls, show, block, unblock):
        group.command()(command)
    app.add_typer(group, name="hosts", no_args_is_help=True)


def ls(as_json: AsJson = False) -> None:
    """List machines, those to look at first: blocked, lying, failing.

    Example: stoker hosts ls

    JSON: a list of hosts, each as `GET /v1/hosts/{machine_id}` answers.
    """
    page = Client.here().hosts()
    if as_json:
        print_json(page)
        return
    if not page:
        err.print("no machine is remembered yet: none finished or lost a job", markup=False)
        return
    now = datetime.now(UTC)
    print_rows(out, [TITLE, *(_row(host, now) for host in page)], spare=SPARE)


def show(machine: Machine, as_json: AsJson = False) -> None:
    """Show one machine.

    Example: stoker hosts show 12345

    JSON: the host, as `GET /v1/hosts/{machine_id}` answers.
    """
    _print(Client.here().host(machine), as_json)


def block(
    machine: Machine,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; shown to other operators.")],
    as_json: AsJson = False,
) -> None:
    """Rent a machine no more. A job that runs on it is left to end.

    Example: stoker hosts block 12345 --reason "throttles after ten minutes"

    JSON: the host, as `GET /v1/hosts/{machine_id}` answers.
    """
    _print(Client.here().host(machine, "block", {"reason": reason}), as_json)


def unblock(machine: Machine, as_json: AsJson = False) -> None:
    """Let a machine be rented again, and forget what it did wrong.

    Example: stoker hosts unblock 12345

    JSON: the host, as `GET /v1/hosts/{machine_id}` answers.
    """
    _print(Client.here().host(machine, "unblock"), as_json)


def _print(host: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(host)
        return
    cells = zip(TITLE, _row(host, datetime.now(UTC)), strict=True)
    print_rows(out, [(name.lower(), cell) for name, cell in cells])


def _row(host: Mapping[str, Any], now: datetime) -> tuple[str, ...]:
    boot, mbps, steps = (host.get(key) for key in ("boot_s", "download_mbps", "steps_per_s"))
    cells = (
        host["machine_id"],
        host["gpu"] or "-",
        host["geo"] or "-",
        f"{host['good']:.1f}/{host['bad']:.1f}",
        "-" if boot is None else f"{boot:.0f} s",
        "-" if mbps is None else f"{mbps:.0f}",
        "-" if steps is None else f"{steps:.2f}",
        _now(host),
        _failure(host, now),
    )
    return tuple(" ".join(str(cell).split()) for cell in cells)


def _now(host: Mapping[str, Any]) -> str:
    """Whether jobs may rent it."""
    if host["blocked"]:
        return f"BLOCKED ({host.get('blocked_why', '')})"
    if host["lies"]:
        return "LIED" if host["shunned"] else "lied once"
    return "left alone" if host["shunned"] else "ok"


def _failure(host: Mapping[str, Any], now: datetime) -> str:
    if not host.get("last_failed_at"):
        return "-"
    ago = age((now - datetime.fromisoformat(host["last_failed_at"])).total_seconds())
    return f"{ago} ago: {host.get('last_reason', '')[:120]}"


def age(seconds: float) -> str:
    """In the largest unit that fits, without the rest."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
