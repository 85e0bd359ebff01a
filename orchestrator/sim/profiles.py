"""How often what goes wrong. A rate is a probability per call, message, rental or job."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

Rates = Mapping[str, float]

#: Rates as seen on a public market. Of five runs that somebody wrote about, four were lost, on
#: machines that never booted, were abandoned, pulled for ever, went away or were slow. Five are
#: few; we take a little more than half of all machines tried to be lost in one of these ways.
MARKET: Rates = {
    "api.throttled": 0.02,
    "api.5xx": 0.02,
    "create.lost_after": 0.01,
    "create.lost_before": 0.01,
    "create.gone": 0.05,
    "create.refused_with_id": 0.005,
    "destroy.fails": 0.02,
    "destroy.lingers": 0.3,
    "list.lag": 1.0,
    "list.unreadable": 0.02,
    "host.never_boots": 0.16,
    "host.abandoned": 0.09,
    "host.mute": 0.03,
    "host.dies": 0.09,
    "host.ends": 0.06,
    "host.vanishes": 0.02,
    "host.split_brain": 0.03,
    "host.slow": 0.1,
    "host.gpu": 0.03,
    "wire.lost": 0.01,
    "wire.answer_lost": 0.005,
    "wire.duplicate": 0.005,
    "endpoint.loses_answers": 0.01,
    "endpoint.fails": 0.02,
    "endpoint.slow": 0.05,
    "customer.cancels": 0.02,
    "dataset.late": 0.1,
}

#: Everything that the market's contract lets happen, often.
HELL: Rates = {
    "api.throttled": 0.08,
    "api.5xx": 0.08,
    "create.lost_after": 0.15,
    "create.lost_before": 0.08,
    "create.gone": 0.15,
    "create.refused_with_id": 0.05,
    "destroy.fails": 0.15,
    "destroy.lies": 0.1,
    "destroy.lingers": 0.5,
    "list.lag": 1.0,
    "list.unreadable": 0.15,
    "list.half": 0.05,
    "list.stale": 0.05,
    "list.empty": 0.03,
    "market.outage": 1.0,
    "market.no_credit": 1.0,
    "host.never_boots": 0.08,
    "host.abandoned": 0.08,
    "host.mute": 0.05,
    "host.dies": 0.08,
    "host.ends": 0.08,
    "host.vanishes": 0.05,
    "host.split_brain": 0.1,
    "host.slow": 0.1,
    "host.gpu": 0.03,
    "host.bad_weights": 0.04,
    "host.keeps": 0.3,
    "wire.lost": 0.3,
    "wire.answer_lost": 0.15,
    "wire.duplicate": 0.2,
    "wire.late": 0.2,
    "wire.forged": 0.03,
    "wire.hello_twice": 0.05,
    "server.crash": 0.004,
    "server.pause": 0.01,
    "receiver.down": 1.0,
    "receiver.clock": 1.0,
    "message.lost": 0.2,
    "message.duplicate": 0.2,
    "message.late": 0.1,
    "beat.double": 0.2,
    "beat.stops": 1.0,
    "storage.fails": 0.1,
    "endpoint.loses_answers": 0.2,
    "endpoint.fails": 0.3,
    "endpoint.slow": 0.1,
    "endpoint.down": 1.0,
    "endpoint.gone": 0.01,
    "endpoint.private": 0.01,
    "customer.cancels": 0.05,
    "dataset.late": 0.2,
    "cap.small": 0.05,
}

PROFILES: Mapping[str, Rates] = {"calm": {}, "market": MARKET, "hell": HELL}


def swarm(profile: str, random: Random) -> Rates:
    """The rates of one cohort. In hell each cohort gets a random half of the kinds: faults that
    always come together hide each other."""
    rates = PROFILES[profile]
    if profile != "hell":
        return dict(rates)
    return {kind: rate for kind, rate in rates.items() if random.random() < 0.5}
