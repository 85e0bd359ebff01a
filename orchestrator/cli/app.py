"""Every command, gathered; the modules beside hold what they do."""

from __future__ import annotations

import sys

import click
import typer

from infra.settings import SettingsError
from orchestrator.cli import demo, jobs, servers
from orchestrator.cli.console import CliError, Exit, report
from state.errors import StokerError

app = typer.Typer(
    name="stoker",
    help="Rents a GPU, trains a LoRA on your photographs, and gives the GPU back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo.register(app)
jobs.register(app)
servers.register(app)


def run() -> None:
    """Run the command line; end with one of `Exit`."""
    as_json = "--json" in sys.argv
    try:
        app(standalone_mode=False)
    except CliError as error:
        report(error, as_json=as_json)
        sys.exit(int(error.code))
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(int(Exit.USAGE))
    except SettingsError as error:
        report(CliError("a setting is missing or wrong", str(error)), as_json=as_json)
        sys.exit(int(Exit.USAGE))
    except StokerError as error:
        report(CliError(str(error)), as_json=as_json)
        sys.exit(int(Exit.FAILED))
    except KeyboardInterrupt:
        sys.exit(130)
