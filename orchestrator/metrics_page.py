"""`docs/metrics.md`, drawn from the metrics themselves."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from infra import telemetry
from orchestrator.metrics import Fleet, Metrics
from state.memory import MemoryStore
from state.money import NO_LIMITS

_HEAD = """\
# Metrics

Drawn from the code by `stoker docs metrics`; do not edit. Money is in micro-USD (a millionth of a
dollar), times are in seconds. [observability.md](observability.md) says how to scrape them.\
"""


def metrics_page() -> str:
    """The whole of `docs/metrics.md`."""
    now = datetime.now(UTC)
    fleet = Fleet(MemoryStore(), lambda: now, NO_LIMITS, False)
    return "\n".join(
        (
            _HEAD,
            *_group("The fleet", "asked of the database at each scrape", fleet.collect()),
            *_group("Web servers", "counted by their processes", _of(Metrics())),
            *_group("Workers", "likewise", _of(telemetry.counters())),
            "",
        )
    )


def _of(owner: object) -> list[Any]:
    return [each for each in vars(owner).values() if hasattr(each, "describe")]


def _group(title: str, how: str, metrics: Iterable[Any]) -> list[str]:
    lines = [f"\n## {title}\n", f"{how.capitalize()}.\n", "| name | type | labels | meaning |"]
    lines.append("|---|---|---|---|")
    for metric in metrics:
        family = metric.describe()[0] if hasattr(metric, "describe") else metric
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return lines
