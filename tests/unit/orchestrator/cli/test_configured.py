"""What files and the environment say of options, and what a shell is offered at TAB."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from orchestrator.cli import app
from orchestrator.cli.console import Exit


@pytest.fixture
def say(stoker, monkeypatch, tmp_path):
    """Write `./stoker.toml`; the user has no file of their own."""
    monkeypatch.delenv("STOKER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8 not looked at here")
    return Path("stoker.toml").write_text


def planned(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["job"]


DRY = ("train", "photos", "--dry-run", "--json")


def test_an_option_wins_over_the_environment_and_that_over_the_file(stoker, say, monkeypatch):
    say('[train]\nbase = "civitai:1"\nmax-cost = 1.5\ngpu = ["RTX 4090"]\n')
    job = planned(stoker(*DRY))
    assert (job["base"], job["max_cost"]) == ("civitai:1", 1_500_000)
    assert job["gpu"]["gpu_names"] == ["RTX 4090"]
    monkeypatch.setenv("STOKER_TRAIN_MAX_COST", "2")
    assert planned(stoker(*DRY))["max_cost"] == 2_000_000
    assert planned(stoker(*DRY, "--max-cost", "3"))["max_cost"] == 3_000_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trian]\nbase = 'x'", "did you mean 'train'?"),
        ("[train]\nbsae = 'x'", "did you mean 'base'?"),
        ("[hosts]\nlss = 'x'", "did you mean 'ls'?"),
        ("[hosts.block]\nraeson = 'x'", "did you mean 'reason'?"),
        ("[train]\nyes = true", "names 'yes', which `train` does not take"),
        ("[train]\nphotos = 'elsewhere'", "names 'photos', which `train` does not take"),
        ("[settings]\nSTOKER_BNID = 'x'", "did you mean 'STOKER_BIND'?"),
    ],
)
def test_what_a_file_says_wrong_is_named(stoker, say, text, words):
    say(text)
    ran = stoker("hosts", "ls")
    command = "train" if "[train]" in text else "hosts"
    ran = stoker(*DRY, "--base", "civitai:1") if command == "train" else ran
    assert ran.code == Exit.USAGE
    assert words in ran.out + ran.err


def test_a_file_of_another_command_is_no_hindrance(stoker, say, api):
    api.answers["GET /v1/jobs"] = (200, {"data": [], "has_more": False})
    say("[demo]\nport = 8500\n")
    assert stoker("ps").code == 0


def test_no_environment_confirms_spending(stoker, say, monkeypatch):
    say('[train]\nbase = "civitai:1"\n')
    monkeypatch.setenv("STOKER_TRAIN_YES", "1")
    ran = stoker("train", "photos")
    assert ran.code == Exit.USAGE
    assert "no terminal to confirm at" in ran.err


def test_a_server_is_asked_that_a_file_names(stoker, say, api, monkeypatch):
    api.answers["GET /v1/jobs"] = (200, {"data": [], "has_more": False})
    monkeypatch.delenv("STOKER_URL")
    monkeypatch.delenv("STOKER_API_KEY")
    say(f'url = "{api.url}"\napi_key = "stk_test_of_a_file"\n')
    assert stoker("ps").code == 0
    assert api.asked


def test_the_modules_that_are_loaded_alone_have_those_commands():
    for name, module in app.ALONE.items():
        tree = typer.main.get_command(app.make_app(plain=True, modules=(module,)))
        assert name in tree.commands


def at_tab(stoker, monkeypatch, shell, words):
    """What `shell` is offered at the end of `words`."""
    monkeypatch.setenv("_STOKER_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    ran = stoker()
    assert (ran.code, ran.err) == (0, "")
    return ran.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_offered_commands_options_jobs_and_machines(
    stoker, monkeypatch, api, make_job, shell
):
    jobs = [make_job(id="job_01"), make_job(id="job_02")]
    api.answers["GET /v1/jobs"] = (200, {"data": jobs, "has_more": True, "next_cursor": "x"})

    def ask(words):
        return at_tab(stoker, monkeypatch, shell, words)

    assert "retry" in ask("stoker ret")
    assert "--dry-run" in ask("stoker train --dr")
    assert "sdxl" in ask("stoker train --family sdx")
    offered = ask("stoker show job_")
    assert "job_01" in offered
    assert "job_02" in offered
    assert api.asked == ["GET /v1/jobs?limit=100"]


def test_a_server_that_is_not_there_is_silence_at_tab(stoker, monkeypatch):
    monkeypatch.setenv("STOKER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("STOKER_API_KEY", "k")
    assert at_tab(stoker, monkeypatch, "bash", "stoker show job_").strip() == ""


def test_the_version_is_told(stoker, monkeypatch):
    monkeypatch.setenv("STOKER_VERSION", "0.1.0")  # docker-compose.yml's
    assert stoker("--version").out.startswith("stoker 0.")
    assert stoker("docs", "--help").code == 0
