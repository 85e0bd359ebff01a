"""What Prometheus reads at `/metrics`: requests, the receiver, and the state of the fleet."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from state import alarms, brakes, hosts, money, usual
from state.endpoints import Backlog
from state.events import HostRecord, OutgoingStatus
from state.job import Status
from state.lease import Lease
from state.money import Limits
from state.store import Store
from state.usual import Usual

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: A webhook that was given up is shown for so long.
GIVEN_UP = timedelta(days=1)
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
        fleet.register(Fleet(store, clock, limits, kill_switch))
        return bytes(generate_latest(counted) + generate_latest(fleet))


class Fleet(Collector):  # type: ignore[misc]  # prometheus_client is untyped to us
    """Jobs, machines, money and alarms, as the database has them when somebody asks."""

    def __init__(
        self, store: Store, clock: Callable[[], datetime], limits: Limits, kill_switch: bool
    ) -> None:
        self._store, self._clock = store, clock
        self._limits, self._kill_switch = limits, kill_switch

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        now = self._clock()
        with self._store.transaction() as tx:
            counts, leases, beats, remembered = (
                tx.count_jobs(),
                [lease for lease in tx.open_leases() if not lease.rehearsed],
                tx.beats(),
                tx.hosts(),
            )
            settled = tx.spend_since(datetime.min.replace(tzinfo=UTC))
            owed = tx.webhook_backlog(now - GIVEN_UP)
            stand = alarms.standing(tx, self._limits, now, kill_switch=self._kill_switch)
        yield from _jobs(counts, usual.known(beats))
        yield from _machines(leases, remembered, now)
        yield from _money(leases, settled, brakes.credit(beats, now), now)
        yield from _webhooks(owed, now)
        yield _gauge(
            "stoker_beat_age_seconds",
            "Age of each sign of life.",
            {(name,): (now - at).total_seconds() for name, (at, _) in sorted(beats.items())},
            ("name",),
        )
        severities = {alarm.code: alarm.severity.value for alarm in stand}
        yield _gauge(
            "stoker_alarm",
            "1 while it stands; the runbook has an entry for each code.",
            {
                (code, severities.get(code, "")): float(code in severities)
                for code in sorted(alarms.MENDS)
            },
            ("code", "severity"),
        )


def _gauge(
    name: str, meaning: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _jobs(
    counts: Mapping[Status, int], stays: Mapping[Status, Usual]
) -> Iterator[GaugeMetricFamily]:
    yield _gauge(
        "stoker_jobs",
        "Jobs by status.",
        {(status.value,): counts.get(status, 0) for status in Status},
        ("status",),
    )
    yield _gauge(
        "stoker_status_seconds",
        "How long jobs that ended lately stayed in each status.",
        {
            (status.value, quantile): seconds
            for status, stay in stays.items()
            for quantile, seconds in (("0.5", stay.p50), ("0.95", stay.p95))
        },
        ("status", "quantile"),
    )


def _machines(
    leases: Sequence[Lease], remembered: Sequence[HostRecord], now: datetime
) -> Iterator[GaugeMetricFamily]:
    yield _gauge(
        "stoker_open_leases",
        "Leases that may cost money, by status.",
        {(kind,): count for kind, count in Counts(lease.status.value for lease in leases).items()},
        ("status",),
    )
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
    yield _gauge(
        "stoker_hosts",
        "Machines that are remembered, by what is thought of them.",
        {(name,): count for name, count in Counts(_thought(h, now) for h in remembered).items()},
        ("standing",),
    )


def _webhooks(owed: Sequence[Backlog], now: datetime) -> Iterator[GaugeMetricFamily]:
    waiting = [some for some in owed if some.status is OutgoingStatus.WAITING]
    lost = [some for some in owed if some.status is OutgoingStatus.EXHAUSTED]
    yield GaugeMetricFamily(
        "stoker_webhooks_waiting",
        "Webhooks that wait for their first or next try.",
        value=sum(some.rows for some in waiting),
    )
    oldest = min((some.oldest for some in waiting), default=now)
    yield GaugeMetricFamily(
        "stoker_oldest_webhook_seconds",
        "Age of the oldest of them.",
        value=(now - oldest).total_seconds(),
    )
    yield GaugeMetricFamily(
        "stoker_webhooks_exhausted",
        "Webhooks given up within the last day, after all their tries.",
        value=sum(some.rows for some in lost),
    )


def _thought(host: HostRecord, now: datetime) -> str:
    if host.blocked:
        return "blocked"
    return "shunned" if hosts.shunned(host, now) else "good"


def _money(
    leases: Sequence[Lease], settled: int, credit: int | None, now: datetime
) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    burn = money.burn(leases)
    yield GaugeMetricFamily(
        "stoker_burn_micro_usd_per_hour",
        "What all machines cost per hour that are not being released.",
        value=burn,
    )
    yield CounterMetricFamily(
        "stoker_spent_micro_usd",
        "What all machines cost so far; a market's bill may correct it by a little.",
        value=settled + sum(money.spent(lease, now) for lease in leases),
    )
    yield GaugeMetricFamily(
        "stoker_credit_micro_usd",
        "Credit on the market's account; missing when nobody could read it lately.",
        value=credit,
    )
    yield GaugeMetricFamily(
        "stoker_runway_seconds",
        "How long that pays the machines that run; missing when none runs.",
        value=credit / burn * 3600 if credit is not None and burn else None,
    )
