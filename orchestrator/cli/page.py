"""`docs/cli.md`, drawn from the commands themselves: their help, options, examples and shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from orchestrator.cli.console import Exit

EXITS: Mapping[Exit, str] = {
    Exit.OK: "done; also after Ctrl-C on a watched job, which goes on",
    Exit.FAILED: "it failed, or the server did",
    Exit.USAGE: "wrong arguments, settings or configuration files; nothing was done",
    Exit.DOCTOR: "`stoker doctor` found a fault",
    Exit.AUTH: "no key, one that is revoked, or one without the scope",
    Exit.NOT_FOUND: "there is no such job, machine, key or file",
    Exit.JOB_ENDED_BADLY: "the job that was followed failed or was cancelled",
    Exit.OVER_BUDGET: "it would cost more than may be spent",
    Exit.TIMED_OUT: "what was waited for did not come in time",
}
HEAD = """\
# Commands

Drawn from the commands' own help by `stoker docs cli`; do not edit.

Data goes to stdout, all else to stderr. What is not a terminal gets no colour, box or spinner, nor
does one with `NO_COLOR`. `--json` prints one document; with `-w` or `-f` it is a document per line,
one for each change. Keys may be added to a document; none is renamed or taken away. An error is
three lines (what, why, next), and with `--json` `{"error": {"what", "why", "next", "exit"}}` on
stdout.

An option that is not given is looked for in the environment (`STOKER_<COMMAND>_<OPTION>`), in
`./stoker.toml` and in `~/.config/stoker/config.toml` ([settings](settings.md)). What spends money
asks first; `-y` is the answer, and no file and no environment can give it.

`stoker --install-completion` teaches bash, zsh or fish the commands, and job and machine ids.

Commands marked *here* act on the installation's own database, S3 and market, by its settings; all
others ask the server that `STOKER_URL` names, or the `stoker up` that runs in this directory.
"""
#: Those that need an installation's settings, not a server.
HERE = frozenset({
    "up", "serve", "worker", "beat", "sweep", "doctor", "stop-renting", "resume-renting", "keys",
    "db",
})  # fmt: skip


def cli_page(app: typer.Typer) -> str:
    """The whole of `docs/cli.md`."""
    tree = typer.main.get_command(app)
    lines = [HEAD, "## Exit codes\n", "| code | when |", "|---|---|"]
    lines += [f"| {code.value} | {EXITS[code]} |" for code in Exit]
    lines.append("| 130 | Ctrl-C before anything was begun |")
    for words, command in leaves(tree):
        lines += ["", *_section(words, command)]
    return "\n".join(lines) + "\n"


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from leaves(child, (*path, name))


def parts(command: Any) -> dict[str, str]:
    """Of a command's help: `words`, and what follows `Example:` and `JSON:`."""
    found = {"words": "", "Example": "", "JSON": ""}
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        name, colon, rest = paragraph.partition(": ")
        if colon and name in found:
            found[name] = " ".join(rest.split())
        else:
            found["words"] += ("\n\n" if found["words"] else "") + " ".join(paragraph.split())
    return found


def _section(words: tuple[str, ...], command: Any) -> list[str]:
    said = parts(command)
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    usage = " ".join(["stoker", *words, *(_placed(item) for item in arguments)])
    where = " *here*" if words[0] in HERE else ""
    lines = [f"## {' '.join(words)}\n", f"`{usage}`{where}\n", said["words"]]
    if said["Example"]:
        lines.append(f"\n```sh\n{said['Example']}\n```")
    rows = [(f"`{_name(item)}`", "", _meaning(item)) for item in arguments]
    rows += [
        (f"`{_flags(item)}`", _default(item), _meaning(item))
        for item in options
        if "--help" not in item.opts
    ]
    if rows:
        lines += ["\n| | default | |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    if said["JSON"]:
        lines.append(f"\n`--json`: {said['JSON']}")
    return lines


def _name(item: Any) -> str:
    return str(item.name).upper()


def _placed(item: Any) -> str:
    return _name(item) if item.required else f"[{_name(item)}]"


def _flags(item: Any) -> str:
    long = [name for name in (*item.opts, *item.secondary_opts) if name.startswith("--")]
    short = [name for name in item.opts if not name.startswith("--")]
    return ", ".join([" / ".join(long), *short])


def _default(item: Any) -> str:
    value = item.default
    if item.required:
        return "needed"
    if callable(value) or value is None or value == "" or value == [] or value == ():
        return ""
    if isinstance(value, bool):
        return ("yes" if value else "") if item.secondary_opts else ""
    if isinstance(value, Enum):
        value = value.value
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


def _meaning(item: Any) -> str:
    many = " May be given several times." if getattr(item, "multiple", False) else ""
    words = " ".join((item.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return words + many
