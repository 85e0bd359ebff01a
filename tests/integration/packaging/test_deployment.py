"""The files that describe a deployment agree with each other and with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from infra.settings import Settings

REPOSITORY = Path(__file__).parents[3]
COMPOSE = (REPOSITORY / "docker-compose.yml").read_text()
EXAMPLE = (REPOSITORY / ".env.example").read_text()
#: What only docker-compose.yml reads.
OF_COMPOSE = {"POSTGRES_PASSWORD", "REDIS_PASSWORD"}
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]


def example():
    return dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def test_the_example_names_only_what_is_read():
    known = set(Settings().to_env())
    assert set(example()) <= known | OF_COMPOSE
    assert set(example()) >= OF_COMPOSE


def test_the_example_has_no_secret_and_can_be_read():
    for name, value in example().items():
        if re.search(r"PASSWORD|SECRET|_KEY|TOKEN", name):
            assert value == "", name
    read = Settings.from_env(example())
    assert read.deployment == Settings().deployment
    assert read.agent_image == Settings().agent_image


def test_every_variable_that_compose_insists_on_is_in_the_example():
    assert set(re.findall(r"\$\{([A-Z_]+):\?", COMPOSE)) <= set(example())


def test_compose_has_all_parts_and_each_runs_a_command_of_ours():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    services = yaml.safe_load(COMPOSE)["services"]
    assert set(services) == {"migrate", "web", "worker", "beat", "postgres", "redis", "s3"}
    assert services["web"]["command"][0] == "serve"
    for name in ("worker", "beat"):
        assert services[name]["command"] == [name]
    for name in ("web", "worker", "beat"):
        assert set(services[name]["depends_on"]) == {"migrate", "redis"}


def test_docker_accepts_the_compose_file(tmp_path):
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("there is no docker client")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("this docker client has no compose")
    for name in ("docker-compose.yml", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    filled = {name: value or "x" for name, value in example().items()}
    (tmp_path / ".env").write_text("".join(f"{key}={value}\n" for key, value in filled.items()))
    config = [docker, "compose", "config", "-q"]
    good = subprocess.run(config, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    (tmp_path / ".env").write_text(EXAMPLE)
    unset = subprocess.run(config, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert unset.returncode != 0
    assert "PASSWORD" in unset.stderr


@pytest.mark.parametrize("name", ["server.Dockerfile", "agent.Dockerfile"])
def test_what_an_image_copies_is_there(name):
    text = (REPOSITORY / "infra" / "docker" / name).read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert [source for source in sources if not (REPOSITORY / source).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text)
    broken = [
        link
        for link in links
        if not link.startswith(("http://", "https://", "mailto:", "#"))
        and not (page.parent / unquote(link.split("#")[0])).exists()
    ]
    assert broken == []


def test_the_commands_of_the_pages_exist():
    """Each `stoker word` in a code block or in backticks; `test_docs` knows options, too."""
    import typer

    from orchestrator.cli.app import make_app

    commands = set(typer.main.get_command(make_app(plain=True)).commands)
    for page in PAGES:
        text = page.read_text()
        code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
        for word in re.findall(r"(?:^|[\s`/])stoker ([a-z][a-z-]*)\b", code):
            assert word in commands, f"{page.name}: stoker {word}"


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < 150
