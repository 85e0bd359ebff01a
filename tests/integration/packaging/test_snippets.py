"""What the documentation shows in fences is taken by the program that it is written for."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import typer
import yaml
from botocore.stub import Stubber

from gpu_agent import wire
from gpu_agent.lora.job import Job
from infra import config
from infra.sandbox import notify
from infra.settings import Settings, server
from infra.storage import Storage
from orchestrator import vast_hints
from orchestrator.agent_api import FilesWanted, Hello
from orchestrator.api.problems import Problem
from orchestrator.api.schemas import JobIn
from orchestrator.cli import docs
from orchestrator.cli.app import _said_by_files, make_app
from stand.snippets import REPOSITORY, Snippet, snippets

ALL = list(snippets())
SHELL = ("sh", "bash")
#: Kinds that say nothing by being readable; somebody must take them.
DATA = {"json", "yaml", "toml", "http", "mermaid"}
PROGRAMS = {"python", "js", "ts"}
TEXT = {"text", "nginx"}
DRAWN = {f"docs/{name}.md" for name in docs.PAGES}
#: Whose snippets are run by tests that stand elsewhere.
ELSEWHERE = {
    ("docs/sandbox.md", "json"): "tests/unit/infra/sandbox/test_faults.py",
    # the other one, a whole training, by tests/e2e/test_python_client.py
    ("docs/how-to/clients.md", "python"): "tests/integration/client/test_clients.py",
    ("docs/how-to/clients.md", "ts"): "tests/integration/client/test_clients.py",
    ("docs/how-to/webhooks.md", "python"): "tests/integration/client/test_clients.py",
    ("docs/how-to/webhooks.md", "js"): "tests/integration/client/test_clients.py",
}
#: Variables of a shell that are of other programs.
FOREIGN = {"OTEL_EXPORTER_OTLP_ENDPOINT", "STOKER_API_KEY", "STOKER_URL", "STOKER_CONFIG"}


def of(*languages: str) -> Any:
    chosen = [pytest.param(item, id=str(item)) for item in ALL if item.language in languages]
    return pytest.mark.parametrize("snippet", chosen)


# --- data: by its own reader ------------------------------------------------------------------


def spec(text: str) -> None:
    wire.JobSpec.from_bytes(text.strip().encode())


def slots(text: str) -> None:
    """What answers `FilesWanted`, as `FileDesk` builds it."""
    said = json.loads(text)
    assert {name: set(slot) for name, slot in said["put"].items()} == {
        "lora.safetensors": {"url", "headers"}
    }
    assert set(said["get"]["dataset"]) == {"url", "name", "bytes", "sha256"}


def files_wanted(text: str) -> None:
    FilesWanted.from_bytes(text.replace("…", "ab" * 32).encode())


def orders(text: str) -> None:
    assert len(wire.orders_from_bytes(text.encode())) == len(json.loads(text)["orders"])


def cors(text: str) -> None:
    """The rule to set by hand is the one that Stoker sets itself, in S3's own words."""
    client = boto3.client("s3", aws_access_key_id="a", aws_secret_access_key="b")
    (rule,) = json.loads(text)
    with Stubber(client) as store:
        store.add_client_error("get_bucket_cors", "NoSuchCORSConfiguration", "", 404)
        wanted = {"CORSRules": [{"ID": "stoker-pages", **rule}]}
        store.add_response("put_bucket_cors", {}, {"Bucket": "b", "CORSConfiguration": wanted})
        Storage(client, "b").allow_browsers(*rule["AllowedOrigins"])


def scraping(text: str) -> None:
    """Prometheus' own shape; the web's port is ours, and the rules are a file of ours."""
    said = yaml.safe_load(text)
    (job,) = said["scrape_configs"]
    (group,) = job["static_configs"]
    bound = Settings().bind.rpartition(":")[2]
    assert f"web-1:{bound}" in group["targets"]
    for name in said["rule_files"]:
        assert (REPOSITORY / "infra/monitoring" / name).is_file()


def notification(text: str) -> None:
    """The sandbox signs it so, and the server takes it."""
    head, _, body = text.partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    stamp, sent = fields["X-Vast-Timestamp"], body.strip().encode()
    signed = notify.signature("secret", int(stamp), sent)
    form = fields["X-Vast-Signature-256"].replace("<64 hex digits>", "[0-9a-f]{64}")
    assert re.fullmatch(form, signed)
    vast_hints.verify(sent, stamp, signed, secret="secret", now=float(stamp))
    hint = vast_hints.Hint.from_bytes(sent)
    assert (hint.event, hint.kind, hint.instance) == (
        fields["X-Vast-Event-Id"], "outbid", "20012345"
    )  # fmt: skip


#: Page, words that only this snippet has, who takes it.
READERS: tuple[tuple[str, str, Callable[[str], object]], ...] = (
    ("docs/how-to/storage.md", "AllowedOrigins", cors),
    ("docs/observability.md", "scrape_configs", scraping),
    ("docs/sandbox.md", "X-Vast-Timestamp", notification),
    ("docs/test-mode.md", '"fixture"', JobIn.model_validate_json),
    ("docs/wire.md", '"nonce"', lambda text: Hello.from_bytes(text.encode())),
    ("docs/wire.md", '"dataset":{', spec),
    ("docs/wire.md", '"seq":', lambda text: wire.Report.from_bytes(text.strip().encode())),
    ("docs/wire.md", '"orders"', orders),
    ("docs/wire.md", '"put": [', files_wanted),
    ("docs/wire.md", '"put": {', slots),
    ("docs/wire.md", '"base_file"', lambda text: Job.from_dict(json.loads(text))),
)


def reader_of(snippet: Snippet) -> Callable[[str], object] | None:
    found = [
        read for page, words, read in READERS if page == snippet.page and words in snippet.text
    ]
    return found[0] if found else None


@of(*DATA)
def test_data_is_taken_by_its_own_reader(snippet: Snippet) -> None:
    if (read := reader_of(snippet)) is not None:
        read(snippet.text)
    else:  # of what is drawn `test_the_reference_is_drawn_from_the_code` says that it is true
        known = snippet.page in DRAWN or (snippet.page, snippet.language) in ELSEWHERE
        assert known, "nobody reads it"


def test_the_error_that_the_api_page_shows_is_one() -> None:
    (shown,) = (item.text for item in ALL if item.page == "docs/api.md")
    problem = Problem.model_validate_json(shown)
    assert set(json.loads(shown)) <= set(Problem.model_fields)
    assert problem.errors


def test_the_configuration_file_sets_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = (item.text for item in ALL if item.language == "toml")
    (tmp_path / "stoker.toml").write_text(shown)
    monkeypatch.setenv("STOKER_CONFIG", str(tmp_path / "stoker.toml"))
    (read,) = config.read({"STOKER_CONFIG": str(tmp_path / "stoker.toml")})
    Settings.from_env()
    assert server()[0] == read.url
    said = _said_by_files(typer.main.get_command(make_app(plain=True)))
    assert set(said) == set(read.commands)


# --- programs ---------------------------------------------------------------------------------


@of(*PROGRAMS)
def test_programs_are_run(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    if (snippet.page, snippet.language) in ELSEWHERE:
        return
    assert snippet.language == "python"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "snippet"})  # noqa: S102
    assert said.getvalue()


@pytest.mark.parametrize(("key", "file"), ELSEWHERE.items(), ids=lambda item: str(item))
def test_what_is_run_elsewhere_is(key: tuple[str, str], file: str) -> None:
    page, language = key
    text = (REPOSITORY / file).read_text()
    assert page.removeprefix("docs/") in text or f'"{Path(page).name}"' in text
    assert language in text


def test_every_snippet_says_what_it_is() -> None:
    assert {item.language for item in ALL} <= {*SHELL, *DATA, *PROGRAMS, *TEXT}


# --- shell ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command_line() -> Any:
    return typer.main.get_command(make_app(plain=True))


def test_a_shell_can_read_every_script() -> None:
    """Each a function of its own, so that one shell is enough; who is wrong, it says by line."""
    scripts = [item for item in ALL if item.language in SHELL]
    whole = "\n".join(
        f"f{number} () {{ : {item}\n{item.text}\n}}" for number, item in enumerate(scripts)
    )
    told = subprocess.run(["bash", "-n"], input=whole, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")


def words_of(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a script."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        for part in re.split(r"&&|\|\||[;|&]", re.sub(r"(^|\s)#.*", "", line)):
            try:
                yield shlex.split(part)
            except ValueError:
                continue  # the middle of a quoted text


def commands(text: str) -> Iterator[list[str]]:
    """The words of each call of `stoker` in a script."""
    for words in words_of(text):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words[:2] == ["./stoker", "test"]:
            yield ["test"]  # what follows is pytest's
        elif words and words[0] in ("stoker", "./stoker"):
            yield words[1:]
        elif words[:1] == ["docker"] and "--rm" in words:  # `stoker` is the images' entry point
            yield words[words.index("--rm") + 2 :]
        elif words[:1] == ["kubectl"] and "--" in words:
            yield words[words.index("--") + 2 :]


CALLS = [
    pytest.param(words, id=f"{item}-{number}")
    for item in ALL
    if item.language in SHELL
    for number, words in enumerate(commands(item.text))
]


@pytest.mark.parametrize("words", CALLS)
def test_every_command_of_the_docs_can_be_called_so(words: list[str], command_line: Any) -> None:
    """Options, arguments and their kinds, by the parser that a user meets."""
    command = command_line
    words = list(itertools.takewhile(lambda word: word not in (">", ">>", "2>"), words))
    while hasattr(command, "commands"):
        assert words, "a group alone does nothing"
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, words):
        pass


def assigned() -> Iterator[tuple[Snippet, str]]:
    """The variables that scripts set; those of the README's curl are its own."""
    for item in ALL:
        if item.language == "sh":
            for words in words_of(item.text):
                for word in words:
                    if found := re.match(r"([A-Z][A-Z0-9_]+)=", word):
                        yield item, found[1]


def test_every_variable_that_the_docs_set_is_read() -> None:
    known = {*Settings().to_env(), *FOREIGN}
    assert [f"{item}: {name}" for item, name in assigned() if name not in known] == []
