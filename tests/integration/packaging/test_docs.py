"""The documentation builds, its links lead somewhere, its manifests are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orchestrator.cli import docs
from orchestrator.cli.app import make_app
from orchestrator.specification import openapi_json

REPOSITORY = Path(__file__).parents[3]


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
