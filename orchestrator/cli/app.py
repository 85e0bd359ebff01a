"""Every command, gathered; the modules beside hold what they do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import typer

from infra.embedded import EmbeddedError
from infra.settings import SettingsError
from orchestrator.cli import bench, demo, docs, doctor, hosts, jobs, sandbox, servers, sim
from orchestrator.cli.console import CliError, Exit, report
from state.errors import StokerError

#: typer brings a click of its own; this is that one's class for wrong arguments.
_UsageError = typer.BadParameter.__bases__[0]
_INTERRUPTED = 130


def make_app(*, plain: bool = False) -> typer.Typer:
    """The command line. `plain`: help without boxes and colours, for pipes."""
    app = typer.Typer(
        name="stoker",
        help="Rents a GPU, trains a LoRA on your photographs, and gives the GPU back.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None if plain else "rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    demo.register(app)
    jobs.register(app)
    hosts.register(app)
    servers.register(app)
    doctor.register(app)
    sandbox.register(app)
    bench.register(app)
    sim.register(app)
    docs.register(app)
    app.command()(test)
    return app


def test() -> None:
    """Run the checks and the tests; only `./stoker test` in a checkout can.

    Example: ./stoker test
    """
    raise CliError(
        "the tests are not part of what is installed",
        "they live in a checkout, and need its development tools",
        "`git clone` Stoker, and `./stoker test` there",
        Exit.USAGE,
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and leave with one of `Exit` (130 after Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = make_app(plain=not sys.stdout.isatty() or "NO_COLOR" in os.environ)
    try:
        # commands return nothing; typer hands back the code of a typer.Exit
        code = app(given, prog_name="stoker", standalone_mode=False)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except typer.Abort:
        code = Exit.FAILED
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        if known.what:
            report(known, as_json="--json" in given)
        code = known.code
    sys.exit(int(code or 0))


def _explain(error: Exception) -> CliError | None:
    """What to tell of an error; None for one that nobody foresaw. Help was asked for in a way
    that is none: no words, only the exit code."""
    if isinstance(error, CliError):
        return error
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "stoker"
        words = str(getattr(error, "format_message", lambda: str(error))())
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(words + "\n" if words else "")
            words = ""
        words = re.sub(r" \(Possible options?: (.+)\)", r". Did you mean \1?", words)
        return CliError(words, "", f"`{command} --help`", Exit.USAGE)
    if isinstance(error, SettingsError):
        why, _, then = str(error).partition("; ")
        return CliError("a setting is missing or wrong", why, then, Exit.USAGE)
    if isinstance(error, EmbeddedError):
        return CliError(error.what, "", error.hint)
    if isinstance(error, StokerError):
        return CliError(str(error), "", "`stoker doctor` looks at every part")
    if isinstance(error, OSError) and error.strerror:
        return CliError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return None
