"""The reference of commands is the commands' own, and says what programs get from each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from orchestrator.cli.app import make_app
from orchestrator.cli.console import Exit
from orchestrator.cli.page import EXITS, cli_page, leaves, parts

APP = make_app(plain=True)
COMMANDS = {" ".join(words): command for words, command in leaves(typer.main.get_command(APP))}


def test_the_page_of_commands_is_up_to_date():
    page = Path(__file__).parents[4] / "docs" / "cli.md"
    assert page.read_text() == cli_page(APP), "run `stoker docs cli > docs/cli.md`"


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_that_answers_programs_says_what(words):
    command = COMMANDS[words]
    takes_json = any(option.name == "as_json" for option in command.params)
    assert bool(parts(command)["JSON"]) == takes_json


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_has_a_word_of_help(words):
    bare = [item.name for item in COMMANDS[words].params if not item.help]
    assert bare == []


def test_no_word_of_help_is_lost_as_markup():
    """On a terminal rich reads help; `[name]` would be taken for a style and vanish."""
    for words, command in COMMANDS.items():
        for text in (command.help, *(item.help for item in command.params)):
            assert not re.search(r"\[/?[a-z#@]", text or ""), (words, text)


def test_every_exit_code_is_explained():
    assert set(EXITS) == set(Exit)
