"""`stoker docs`: reference pages, drawn from the program itself; a test holds them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from infra.settings import settings_page
from orchestrator.cli.console import CliError, Exit
from orchestrator.cli.page import cli_page
from orchestrator.reference import api_page, events_page, recipe_page
from state.diagram import markdown


def _cli() -> str:
    from orchestrator.cli.app import make_app  # it gathers this module, too

    return cli_page(make_app(plain=True))


def _api() -> str:
    from orchestrator.specification import specification  # the whole server

    return api_page(specification())


def _metrics() -> str:
    from orchestrator.metrics_page import metrics_page

    return metrics_page()


#: The pages below `docs/`, and what draws them.
PAGES: Mapping[str, Callable[[], str]] = {
    "cli": _cli,
    "settings": settings_page,
    "states": markdown,
    "metrics": _metrics,
    "api": _api,
    "events": events_page,
    "recipe": recipe_page,
}


def register(app: typer.Typer) -> None:
    app.command()(docs)
    app.command()(openapi)


def openapi() -> None:
    """Print the API's OpenAPI 3.1 description; no server need run.

    Example: stoker openapi > openapi.json
    """
    from orchestrator.specification import openapi_json

    print(openapi_json(), end="")


def docs(page: Annotated[str, typer.Argument(help=f"{', '.join(PAGES)}.")]) -> None:
    """Print a page of the reference, as it lies in docs/.

    Example: stoker docs settings > docs/settings.md
    """
    if page not in PAGES:
        why = f"drawn from the program are {', '.join(PAGES)}"
        raise CliError(f"there is no page {page!r}", why, "name one of them", Exit.USAGE)
    print(PAGES[page](), end="")
