"""What is remembered of machines, and which of them a job takes."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from state import hosts, ranking
from state.events import HostRecord
from state.job import Job, JobRequest, Reason
from state.lease import Lease, LeaseStatus
from state.offer import Offer

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
WEEK = timedelta(days=7)
CRASHED = Reason(code="trainer.crashed", message="it ended with 1")
LIED = Reason(code="host.lied", message="its GPU is another")


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "id": "job_1.001",
        "job": "job_1",
        "attempt": 1,
        "label": "l",
        "created_at": NOW,
        "rented_at": NOW,
        "ready_at": NOW + timedelta(seconds=80),
        "expires_at": NOW + timedelta(hours=12),
        "status": LeaseStatus.RENTED,
        "machine_id": "m1",
        "gpu_name": "RTX 4090",
        "geo": "NO",
    }
    return Lease(**{**fields, **changes})


def job(progress: dict[str, Any] | None = None, **recipe: Any) -> Job:
    request = JobRequest(dataset_id="ds", base="civitai:1", recipe=recipe)
    return Job(
        id="job_1",
        owner="o",
        request=request,
        created_at=NOW,
        entered_at=NOW,
        lease="job_1.001",
        progress=progress or {},
    )


def unknown() -> HostRecord:
    return HostRecord(machine_id="m1")


def offer(number: int = 1, **changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "id": str(number),
        "machine_id": f"m{number}",
        "gpu_name": "RTX 4090",
        "num_gpus": 1,
        "vram_gb": 24.0,
        "price": 400_000,
        "storage_price": 10_000,
        "download_price": 0,
        "upload_price": 0,
        "download_mbps": 800.0,
        "upload_mbps": 800.0,
        "reliability": 0.99,
        "verified": True,
        "cuda": 12.8,
        "disk_gb": 100.0,
    }
    return Offer(**{**fields, **changes})


def order(offers: list[Offer], *known: HostRecord, **more: Any) -> list[str]:
    choice = ranking.choose(offers, ranking.Workload(), hosts=known, now=NOW, **more)
    return [item.machine_id for item in choice.offers]


# --- memory -----------------------------------------------------------------------------------


def test_a_finished_job_leaves_what_was_measured() -> None:
    progress = {"training": {"steps_per_s": 4.5}, "model": {"mbps": 600.0}}
    host = hosts.finished(unknown(), lease(), job(progress), NOW)
    assert (host.good, host.boot_s, host.download_mbps, host.steps_per_s) == (1, 80.0, 600.0, 4.5)
    assert (host.gpu_name, host.geo, host.last_seen_at) == ("RTX 4090", "NO", NOW)


def test_measurements_are_moving_means() -> None:
    host = dataclasses.replace(unknown(), boot_s=100.0, download_mbps=1000.0, steps_per_s=5.0)
    progress = {"training": {"steps_per_s": 10.0}, "images": {"mbps": 500.0}}
    host = hosts.finished(host, lease(), job(progress), NOW)
    assert (host.boot_s, host.download_mbps, host.steps_per_s) == pytest.approx((94.0, 850.0, 6.5))


@pytest.mark.parametrize("nonsense", [-3, "fast", True, None, float("nan"), 1e300, {}], ids=repr)
def test_what_a_host_cannot_have_measured_is_not_remembered(nonsense: object) -> None:
    progress = {"training": {"steps_per_s": nonsense}, "model": {"mbps": nonsense}}
    host = hosts.finished(unknown(), lease(), job(progress), NOW)
    assert (host.download_mbps, host.steps_per_s) == (None, None)


def test_speeds_of_different_recipes_compare() -> None:
    progress = {"training": {"steps_per_s": 1.0}}
    large = job(progress, resolution=1024, batch_size=2)
    assert hosts.finished(unknown(), lease(), large, NOW).steps_per_s == 8.0


def test_a_boot_that_was_never_ready_took_at_least_so_long() -> None:
    boots = lease(ready_at=None)
    later = NOW + timedelta(seconds=300)
    reason = Reason(code="host.boot", message="stuck")
    assert hosts.failed(unknown(), boots, job(), reason, later).boot_s == 300
    known = dataclasses.replace(unknown(), boot_s=60.0)
    assert hosts.outrun(known, boots, later).boot_s == 300
    slow = dataclasses.replace(unknown(), boot_s=900.0)
    assert hosts.outrun(slow, boots, later).boot_s == 900
    assert hosts.outrun(known, boots, later).bad == 0


def test_what_another_machine_of_the_job_measured_is_not_this_ones() -> None:
    progress = {"training": {"steps_per_s": 4.5}}
    host = hosts.failed(unknown(), lease(id="job_1.002"), job(progress), CRASHED, NOW)
    assert host.steps_per_s is None


def test_names_fade() -> None:
    host = hosts.failed(unknown(), lease(), job(), CRASHED, NOW)
    host = hosts.failed(host, lease(), job(), CRASHED, NOW)
    assert hosts.standing(host, NOW).bad == 2
    assert hosts.standing(host, NOW + WEEK).bad == 1
    again = hosts.failed(host, lease(), job(), CRASHED, NOW + WEEK)
    assert hosts.standing(again, NOW + WEEK).bad == 2


def test_who_failed_lately_is_left_alone_for_a_day() -> None:
    host = hosts.failed(unknown(), lease(), job(), CRASHED, NOW)
    assert hosts.shunned(host, NOW + timedelta(hours=23)) == hosts.FAILED_LATELY
    assert hosts.shunned(host, NOW + timedelta(hours=25)) is None
    proven = dataclasses.replace(host, good=4, last_seen_at=NOW)
    assert hosts.shunned(proven, NOW) is None


def test_who_lied_is_left_alone_for_a_month() -> None:
    good = dataclasses.replace(unknown(), good=50, last_seen_at=NOW)
    host = hosts.failed(good, lease(), job(), LIED, NOW)
    assert (host.lies, host.bad) == (1, 1)
    assert hosts.shunned(host, NOW + timedelta(days=29)) is not None
    assert hosts.shunned(host, NOW + timedelta(days=31)) is None


def test_a_block_outlasts_every_good_name() -> None:
    host = hosts.blocked(dataclasses.replace(unknown(), good=50, last_seen_at=NOW), "hot")
    assert hosts.shunned(host, NOW + 99 * WEEK) is not None
    assert hosts.shunned(hosts.unblocked(host), NOW) is None


# --- choice -----------------------------------------------------------------------------------


def test_blocked_lying_and_excluded_machines_are_never_offered() -> None:
    offers = [offer(number) for number in range(1, 5)]
    blocked = HostRecord(machine_id="m1", blocked=True)
    liar = HostRecord(machine_id="m2", lies=1, bad=1, last_failed_at=NOW)
    assert order(offers, blocked, liar, excluded=["m3"], waited=timedelta(hours=1)) == ["m4"]


def test_a_machine_that_failed_another_job_is_the_last_resort() -> None:
    failed = HostRecord(machine_id="m1", bad=1, last_failed_at=NOW)
    cheap, dear = offer(1, price=100_000), offer(2, price=900_000)
    assert order([cheap, dear], failed) == ["m2"]
    assert order([cheap], failed) == []
    assert order([cheap], failed, waited=timedelta(minutes=5)) == ["m1"]


def test_a_bad_record_makes_an_offer_dear() -> None:
    known = HostRecord(
        machine_id="m1", good=3, last_seen_at=NOW, bad=2, last_failed_at=NOW - timedelta(days=2)
    )
    assert order([offer(1), offer(2, price=404_000)], known) == ["m2", "m1"]


def test_a_slow_boot_and_a_slow_line_make_an_offer_dear() -> None:
    boots = HostRecord(machine_id="m1", boot_s=900.0)
    pulls = HostRecord(machine_id="m2", download_mbps=40.0)
    offers = [offer(1), offer(2), offer(3, price=420_000)]
    assert order(offers, boots, pulls)[0] == "m3"


def test_promises_are_no_better_than_what_was_measured() -> None:
    promised = offer(1, download_mbps=100.0)
    fast = HostRecord(machine_id="m1", download_mbps=5000.0)
    known = ranking.Knowledge.of([fast])
    assert known.download_mbps(promised) == 100.0


def test_the_speed_of_a_gpu_is_learnt_from_others_of_its_kind() -> None:
    reference = 1 / ranking.SECONDS_PER_IMAGE
    slow = HostRecord(machine_id="m8", gpu_name="RTX 4090", steps_per_s=0.25 * reference)
    seen = HostRecord(machine_id="m9", gpu_name="RTX 3090", steps_per_s=0.55 * reference)
    offers = [offer(1), offer(2, gpu_name="RTX 3090", price=300_000)]
    assert order(offers) == ["m1", "m2"]
    assert order(offers, slow, seen) == ["m2", "m1"]


def test_what_was_learnt_of_one_gpu_scales_the_guesses_of_all() -> None:
    reference = 1 / ranking.SECONDS_PER_IMAGE
    half = HostRecord(machine_id="m9", gpu_name="RTX 4090", steps_per_s=0.5 * reference)
    known = ranking.Knowledge.of([half])
    assert known.speed(offer(1, gpu_name="RTX 3090")) == pytest.approx(0.5 * 0.55)


def test_a_bid_must_be_worth_its_interruptions() -> None:
    on_demand = offer(1)
    near = offer(2, price=398_000, bid=388_000, machine_id="m2")
    cheap = offer(3, price=200_000, bid=190_000, machine_id="m3")
    assert order([on_demand, near, cheap]) == ["m3", "m1", "m2"]


def test_a_lost_attempt_costs_its_boot_and_a_checkpoint_and_not_the_whole_training() -> None:
    work = ranking.Workload(training_s=36_000.0)
    doubtful = ranking.expect(offer(1, reliability=0.5), work, ranking.Knowledge())
    sure = ranking.expect(offer(1, reliability=1.0), work, ranking.Knowledge())
    assert doubtful.lost == 1.0
    assert 1.0 < doubtful.cost / sure.cost < 1.02


def test_a_contract_that_ends_before_the_job_would_is_refused() -> None:
    assert order([offer(1, duration_s=600.0), offer(2, duration_s=86_400.0)]) == ["m2"]


def test_a_choice_explains_itself() -> None:
    offers = [offer(1, price=300_000), offer(2), offer(3), offer(4), offer(5)]
    blocked = HostRecord(machine_id="m3", blocked=True)
    failed = HostRecord(machine_id="m5", bad=1, last_failed_at=NOW)
    choice = ranking.choose(
        offers, ranking.Workload(), excluded=["m4"], hosts=[blocked, failed], now=NOW
    )
    words = choice.explain()
    assert words.startswith("RTX 4090 on m1 on demand at $0.3000/h: the finished job is expected")
    assert "the next is RTX 4090 on m2 at $0.1" in words
    for refused in ("1 blocked by", "1 failed this job before", "1 failed a job lately"):
        assert refused in words
    second = choice.explain(offers[1])
    assert second.startswith("RTX 4090 on m2")
    assert "no offer is fit" in ranking.choose([], ranking.Workload(), now=NOW).explain()


def test_a_gpu_on_which_a_training_must_save_memory_is_expected_to_take_longer():
    work = ranking.Workload(rungs=((16.5, 1.8), (28.0, 1.4), (55.5, 1.0)))
    times = [
        ranking.expect(offer(1, vram_gb=gb), work, ranking.Knowledge()).training_s
        for gb in (24.5, 46.0, 81.0)
    ]
    assert times == pytest.approx([1.8 * times[2], 1.4 * times[2], times[2]])
