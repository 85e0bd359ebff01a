"""The files for Prometheus and Grafana name what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import telemetry
from infra.settings import Settings
from orchestrator.metrics import Metrics
from orchestrator.metrics_page import metrics_page
from state.memory import MemoryStore

ROOT = Path(__file__).parents[3]
METRIC = re.compile(r"\bstoker_[a-z_]+")


@pytest.fixture(scope="module")
def shown() -> frozenset[str]:
    """The names of all samples that an installation may show."""
    from datetime import UTC, datetime

    now = datetime(2026, 11, 22, tzinfo=UTC)
    metrics = Metrics()
    counters = telemetry.counters()
    text = metrics.render(MemoryStore(), lambda: now, Settings().limits, False).decode()
    own = [*vars(metrics).values(), *vars(counters).values()]
    described = [
        each for metric in own if hasattr(metric, "describe") for each in metric.describe()
    ]
    names = set(re.findall(r"^# TYPE (\S+)", text, re.M)) | {each.name for each in described}
    tails = ("", "_total", "_bucket", "_count", "_sum")
    optional = {"stoker_credit_micro_usd", "stoker_runway_seconds"}
    return frozenset(name + tail for name in names | optional for tail in tails)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "infra/monitoring/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[str]:
    for panel in json.loads((ROOT / "infra/monitoring/grafana.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_alerts_ask_for_metrics_that_exist(shown: frozenset[str]) -> None:
    for rule in rules():
        assert set(METRIC.findall(rule["expr"])) <= shown, rule["alert"]


def test_the_pages_tell_of_metrics_that_exist(shown: frozenset[str]) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        told = set(METRIC.findall(page.read_text())) - {"stoker_client"}
        assert told <= shown, page.name


def test_the_dashboard_shows_metrics_that_exist(shown: frozenset[str]) -> None:
    asked = list(queries())
    assert len(asked) > 20
    for query in asked:
        assert set(METRIC.findall(query)) <= shown, query


def test_each_alert_has_its_paragraph_in_the_runbook() -> None:
    entries = set(re.findall(r"^### `(\S+)`", (ROOT / "docs/operations.md").read_text(), re.M))
    own = {rule["alert"] for rule in rules()} - {"StokerAlarm"}
    assert own <= entries
    for rule in rules():
        if rule["alert"] != "StokerAlarm":
            assert rule["annotations"]["runbook"].endswith("#" + rule["alert"].lower())


def test_nothing_in_the_dashboard_is_bound_to_one_grafana() -> None:
    text = (ROOT / "infra/monitoring/grafana.json").read_text()
    uids = set(re.findall(r'"uid": "([^"]+)"', text))
    assert uids == {"stoker", "${datasource}"}


def test_the_reference_is_drawn_from_the_metrics() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == metrics_page(), "run `stoker docs metrics > docs/metrics.md`"
