"""What a shell offers at TAB: from the server, quickly, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gpu_agent.recipe import FAMILIES, QUALITIES
from infra.settings import SettingsError
from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError
from state.endpoints import TYPES
from state.errors import StokerError

#: Seconds that somebody who pressed TAB waits at most.
QUICK_S = 1.0

Offers = list[tuple[str, str]]


def _from_server(ask: Callable[[Client], Iterable[tuple[str, str]]], begun: str) -> Offers:
    try:
        found = list(ask(Client.here(timeout_s=QUICK_S)))
    except (CliError, SettingsError, StokerError, OSError):
        return []  # a message would land in the middle of what is being typed
    return [(name, words) for name, words in found if name.startswith(begun)]


def job_ids(incomplete: str) -> Offers:
    """The newest jobs, with their status."""
    return _from_server(
        lambda client: ((job["id"], job["status"]) for job in client.newest_jobs()), incomplete
    )


def machines(incomplete: str) -> Offers:
    """Machines that are remembered, with their GPU."""
    return _from_server(
        lambda client: ((host["machine_id"], host["gpu"]) for host in client.hosts()), incomplete
    )


def endpoints(incomplete: str) -> Offers:
    """Webhook endpoints, with where they lead."""
    return _from_server(
        lambda client: (
            (item["id"], item["url"] or "stoker listen")
            for item in client.get("/v1/webhook-endpoints")["data"]
        ),
        incomplete,
    )


def deliveries(incomplete: str) -> Offers:
    """The newest webhooks, with what they tell."""
    return _from_server(
        lambda client: (
            (item["id"], item["type"]) for item in client.get("/v1/deliveries")["data"]
        ),
        incomplete,
    )


def events(incomplete: str) -> Offers:
    return [(name, words) for name, words in TYPES.items() if name.startswith(incomplete)]


def families(incomplete: str) -> list[str]:
    return [name for name in FAMILIES if name.startswith(incomplete)]


def qualities(incomplete: str) -> list[str]:
    return [name for name in QUALITIES if name.startswith(incomplete)]
