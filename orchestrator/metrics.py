"""What Prometheus reads at `/metrics`: requests, the receiver, and the state of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from state import alarms, money
from state.job import Status
from state.money import Limits
from state.store import Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 100)


class Metrics:
    """The counters of this process, and how to read those of all its siblings.

    `directory` is where the processes of one server keep their counters together, so that it
    does not matter which of them answers a scrape.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._answered: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "stoker_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "stoker_http_seconds",
            "How long answers took.",
            ("route",),
            buckets=_LATENCY,
            registry=self.registry,
        )
        self.reports = Counter(
            "stoker_reports",
            "Reports of agents, by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self.group_size = Histogram(
            "stoker_report_group_size",
            "Reports committed in one transaction.",
            buckets=_SIZES,
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "stoker_report_commit_seconds",
            "How long those transactions took.",
            buckets=_LATENCY,
            registry=self.registry,
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer; `route` is a rule, not a path, so that its values stay few."""
        key = (method if method in _METHODS else "other", route, status)
        try:
            count, latency = self._answered[key]
        except KeyError:  # looking children up costs as much as counting ten times
            count, latency = self.requests.labels(*key), self.seconds.labels(route)
            self._answered[key] = count, latency
        count.inc()
        latency.observe(seconds)

    def render(
        self, store: Store, clock: Callable[[], datetime], limits: Limits, kill_switch: bool
    ) -> bytes:
        """The text that Prometheus reads; the fleet's part is asked of `store` now."""
        counted = self.registry
        if self._directory is not None:
            counted = CollectorRegistry()
            MultiProcessCollector(counted, path=str(self._directory))
        fleet = CollectorRegistry()
        fleet.register(_Fleet(store, clock, limits, kill_switch))
        return bytes(generate_latest(counted) + generate_latest(fleet))


class _Fleet(Collector):  # type: ignore[misc]  # prometheus_client is untyped to us
    def __init__(
        self, store: Store, clock: Callable[[], datetime], limits: Limits, kill_switch: bool
    ) -> None:
        self._store, self._clock = store, clock
        self._limits, self._kill_switch = limits, kill_switch

    def collect(self) -> Iterable[GaugeMetricFamily]:
        now = self._clock()
        with self._store.transaction() as tx:
            counts, leases, beats = tx.count_jobs(), tx.open_leases(), tx.beats()
            stand = alarms.standing(tx, self._limits, now, kill_switch=self._kill_switch)
        jobs = GaugeMetricFamily("stoker_jobs", "Jobs by status.", labels=("status",))
        for status in Status:
            jobs.add_metric((status.value,), counts.get(status, 0))
        yield jobs
        opened = GaugeMetricFamily(
            "stoker_open_leases", "Leases that may cost money, by status.", labels=("status",)
        )
        for kind in sorted({lease.status for lease in leases}):
            opened.add_metric((kind.value,), sum(lease.status is kind for lease in leases))
        yield opened
        oldest = min((lease.created_at for lease in leases), default=now)
        yield GaugeMetricFamily(
            "stoker_oldest_open_lease_seconds",
            "Age of the oldest lease that is not released.",
            value=(now - oldest).total_seconds(),
        )
        releasing = [lease.releasing_at for lease in leases if lease.releasing_at]
        yield GaugeMetricFamily(
            "stoker_oldest_release_seconds",
            "How long the slowest release has been under way; worth an alarm after a minute.",
            value=(now - min(releasing, default=now)).total_seconds(),
        )
        ages = GaugeMetricFamily(
            "stoker_beat_age_seconds", "Age of each sign of life.", labels=("name",)
        )
        for name, (at, _) in sorted(beats.items()):
            ages.add_metric((name,), (now - at).total_seconds())
        yield ages
        red = GaugeMetricFamily(
            "stoker_alarm",
            "1 while it stands; the runbook has an entry for each code.",
            labels=("code", "severity"),
        )
        standing = {alarm.code: alarm.severity for alarm in stand}
        for code in sorted(alarms.MENDS):
            severity = standing.get(code)
            red.add_metric((code, severity.value if severity else ""), float(severity is not None))
        yield red
        yield GaugeMetricFamily(
            "stoker_burn_micro_usd_per_hour",
            "What all machines cost per hour that are not being released.",
            value=money.burn(leases),
        )
