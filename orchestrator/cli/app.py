"""Every command, gathered; the modules beside hold what they do.

Help loads them all, so what is heavy (databases, storage, markets, Flask) is imported by the
functions that use it, not above them.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from infra import config
from infra.settings import SettingsError
from orchestrator.cli.console import CliError, Exit, report
from state.errors import StokerError

#: Modules with a `register(app)`, in the order of `stoker --help`.
MODULES = (
    "demo", "jobs", "views", "look", "hosts", "money", "webhooks", "servers", "doctor", "sandbox",
    "bench", "sim", "docs",
)  # fmt: skip
#: Commands that ask a server and nothing else: their module is loaded alone, in three quarters of
#: the time, because people call them often and shells call them at each TAB.
ALONE = {
    **dict.fromkeys(("train", "get", "cancel", "retry"), "jobs"),
    **dict.fromkeys(("ps", "show", "logs"), "views"),
    **dict.fromkeys(("explain", "wait"), "look"),
    "hosts": "hosts",
    **dict.fromkeys(("webhooks", "deliveries", "events", "trigger", "listen"), "webhooks"),
    **dict.fromkeys(("cost", "offers", "instances"), "money"),
}
#: Options that only a person says, at that moment: no file and no environment.
SAID_ALOUD = frozenset({"yes", "version", "install_completion", "show_completion", "help"})
#: typer brings a click of its own; this is that one's class for wrong arguments.
_UsageError = typer.BadParameter.__bases__[0]
_INTERRUPTED = 130
#: Set by the script that a shell runs at TAB.
COMPLETING = "_STOKER_COMPLETE"


def make_app(*, plain: bool = False, modules: Sequence[str] = MODULES) -> typer.Typer:
    """The command line. `plain`: help without boxes and colours, for pipes."""
    app = typer.Typer(
        name="stoker",
        help="Rents a GPU, trains a LoRA on your photographs, and gives the GPU back.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None if plain else "rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in modules:
        importlib.import_module(f"orchestrator.cli.{name}").register(app)
    app.command()(test)
    return app


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Rents a GPU, trains a LoRA on your photographs, and gives the GPU back."""


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
    try:
        code = _run(given)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except typer.Abort:
        code = Exit.FAILED
    except BrokenPipeError:  # `stoker logs … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- nothing is left to say, to anybody
        code = Exit.OK
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        if known.what:
            report(known, as_json="--json" in given)
        code = known.code
    sys.exit(int(code or 0))


def _run(given: Sequence[str]) -> Any:
    if list(given) == ["--version"]:
        from importlib import metadata

        print(f"stoker {metadata.version('stoker')}")
        return Exit.OK
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    command = _command(plain, _wanted(given))
    # commands return nothing; typer hands back the code of a typer.Exit
    return command.main(
        args=list(given),
        prog_name="stoker",
        standalone_mode=False,
        default_map={} if COMPLETING in os.environ else _said_by_files(command),
        auto_envvar_prefix="STOKER",
    )


def _command(plain: bool, modules: Sequence[str]) -> Any:
    """The tree of commands, as click has it. What a person must say is taken from nowhere else."""
    tree = typer.main.get_command(make_app(plain=plain, modules=modules))
    for _, leaf in _leaves(tree):
        for option in leaf.params:
            if option.name in SAID_ALOUD:
                option.allow_from_autoenv = False
    return tree


def _wanted(given: Sequence[str]) -> Sequence[str]:
    """The modules that a command line needs; when a shell asks, the one that is being typed."""
    words = given
    if COMPLETING in os.environ:
        words = os.environ.get("_TYPER_COMPLETE_ARGS", os.environ.get("COMP_WORDS", "")).split()[1:]
        if len(words) < 2 and not os.environ.get("COMP_WORDS", "").endswith(" "):
            return MODULES  # it is the command's own name
    first = next(iter(words), "")
    return (ALONE[first],) if first in ALONE else MODULES


def _leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below `command`, groups too, with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, (*path, name))


# --- what configuration files say of options ----------------------------------------------------


def _said_by_files(command: Any) -> dict[str, Any]:
    """By command: its options, as `./stoker.toml` and the user's own file set them.

    Raises:
        SettingsError: a file names a command or an option that there is not.
    """
    said: dict[str, Any] = {}
    for file in reversed(config.read(os.environ)):
        for name, options in file.commands.items():
            if name in command.commands:
                _merge(said.setdefault(name, {}), command.commands[name], options, file, name)
            else:
                _check_name(file, name)
    return said


def _check_name(file: config.Config, name: str) -> None:
    """It may be a command that is not loaded now."""
    known = [words[0] for words, _ in _leaves(_command(True, MODULES)) if len(words) == 1]
    if name not in known:
        like = config.suggestion(name, [*known, "settings"])
        raise SettingsError(f"{file.path} names {name!r}, which is no command{like}")


def _merge(
    into: dict[str, Any], command: Any, options: Mapping[str, Any], file: config.Config, words: str
) -> None:
    children = getattr(command, "commands", {})
    known = {
        name: option
        for option in command.params
        for name in (option.name, option.name.replace("_", "-"))
        if option.name not in SAID_ALOUD and option.param_type_name == "option"
    }
    for name, value in options.items():
        if name in children and isinstance(value, Mapping):
            _merge(into.setdefault(name, {}), children[name], value, file, f"{words} {name}")
        elif name in known:
            into[known[name].name] = value
        else:
            like = config.suggestion(name, [*children, *known])
            raise SettingsError(f"{file.path} names {name!r}, which `{words}` does not take{like}")


# --- errors -------------------------------------------------------------------------------------


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
        return CliError(_with_nearest(error, words), "", f"`{command} --help`", Exit.USAGE)
    if isinstance(error, SettingsError):
        why, _, then = str(error).partition("; ")
        return CliError("a setting is missing or wrong", why, then, Exit.USAGE)
    if isinstance(error, StokerError):  # embedded servers' errors know more: what, and a hint
        what, then = getattr(error, "what", str(error)), getattr(error, "hint", "")
        return CliError(what, "", then or "`stoker doctor` looks at every part")
    if isinstance(error, OSError) and error.strerror:
        return CliError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return None


def _with_nearest(error: Exception, words: str) -> str:
    """click's own words, but of several options that might be meant only the likest."""
    meant = getattr(error, "possibilities", None)
    name = str(getattr(error, "option_name", ""))
    if not (meant and name):
        return words
    (nearest,) = difflib.get_close_matches(name, meant, n=1, cutoff=0.0)
    return f"{getattr(error, 'message', words)}. Did you mean {nearest}?"
