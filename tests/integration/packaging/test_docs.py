"""The documentation builds, its links lead somewhere, its snippets and manifests are right."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orchestrator.cli import docs
from orchestrator.cli.app import make_app
from orchestrator.specification import openapi_json

REPOSITORY = Path(__file__).parents[3]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]


@dataclass(frozen=True)
class Snippet:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> Iterator[Snippet]:
    for path in PAGES:
        page = str(path.relative_to(REPOSITORY))
        text = path.read_text()
        for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
            body = re.sub(f"^{found[1]}", "", found[3], flags=re.M)
            yield Snippet(page, text[: found.start()].count("\n") + 1, found[2], body)


ALL = list(snippets())


def of(*languages: str) -> Any:
    chosen = [pytest.param(item, id=str(item)) for item in ALL if item.language in languages]
    return pytest.mark.parametrize("snippet", chosen)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    built = subprocess.run(
        [*argv, "--config-file", REPOSITORY / ".mkdocs.yml", "--site-dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    index = (tmp_path / "index.html").read_text()
    assert "Stoker" in index
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', index)
    fetched = [url for url in loaded if re.search(r"\.(css|js|woff2?)\b|fonts\.", url)]
    assert fetched == []  # no page asks another host


@pytest.mark.parametrize("name", list(docs.PAGES))
def test_the_reference_is_drawn_from_the_code(name: str) -> None:
    page = (REPOSITORY / f"docs/{name}.md").read_text()
    assert page == docs.PAGES[name](), f"run `stoker docs {name} > docs/{name}.md`"


def test_the_committed_specification_is_what_an_installation_serves() -> None:
    committed = (REPOSITORY / "docs/openapi.json").read_text()
    assert committed == openapi_json(), "run `stoker openapi > docs/openapi.json`"


# --- snippets ---------------------------------------------------------------------------------


def test_every_snippet_says_its_language_or_is_plain_text() -> None:
    texts = {"", "text", "mermaid", "http"}
    known = texts | {"sh", "bash", "python", "js", "ts", "json", "yaml", "toml"}
    assert {item.language for item in ALL} <= known


@of("json")
def test_json_can_be_read(snippet: Snippet) -> None:
    json.loads(re.sub(r"\.\.\.|…", "…", snippet.text))


@of("yaml")
def test_yaml_can_be_read(snippet: Snippet) -> None:
    assert yaml.safe_load(snippet.text)


@of("toml")
def test_toml_can_be_read(snippet: Snippet) -> None:
    assert tomllib.loads(snippet.text)


@of("python")
def test_python_can_be_read(snippet: Snippet) -> None:
    ast.parse(snippet.text)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each call of `stoker` in a script."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        for part in re.split(r"&&|\|\||[;|&]", re.sub(r"(^|\s)#.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:
                continue  # the middle of a quoted text
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and words[0] in ("stoker", "./stoker"):
                yield words[1:]


CALLS = [
    pytest.param(words, id=f"{item}-{number}")
    for item in ALL
    if item.language in ("sh", "bash", "")
    for number, words in enumerate(commands(item.text))
]


@pytest.mark.parametrize("words", CALLS)
def test_every_command_of_the_docs_exists_with_its_options(words: list[str]) -> None:
    command: Any = typer.main.get_command(make_app(plain=True))
    words = [word for word in words if not word.startswith((">", "<", "2>"))]
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        if name.startswith("-"):
            assert name in {"-h", "--help"}
            return
        assert name in command.commands or "·" in words, f"no command {name!r}"
        if name not in command.commands:
            return
        command = command.commands[name]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known | {"-h", "--help"}, word


# --- manifests --------------------------------------------------------------------------------


def manifests() -> list[dict[str, Any]]:
    files = sorted((REPOSITORY / "infra/kubernetes").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def test_kubernetes_runs_the_parts_that_compose_runs() -> None:
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in manifests()
        if "template" in each["spec"]
    }
    assert set(pods) == {"web", "worker", "relay", "beat", "upgrade"}
    app: Any = typer.main.get_command(make_app(plain=True))
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        assert container["args"][0] in app.commands, name
        assert container["envFrom"] == [{"secretRef": {"name": "stoker-env"}}]


def test_what_selects_pods_selects_its_own() -> None:
    by_name = {
        each["metadata"]["name"]: each for each in manifests() if each["kind"] == "Deployment"
    }
    for name, each in by_name.items():
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"] == labels
        assert labels["app.kubernetes.io/component"] == name
    web = by_name["web"]["spec"]["template"]["metadata"]["labels"]
    for each in manifests():
        if each["kind"] == "Service":
            assert each["spec"]["selector"] == web
        if each["kind"] == "PodDisruptionBudget":
            assert each["spec"]["selector"]["matchLabels"] == web
