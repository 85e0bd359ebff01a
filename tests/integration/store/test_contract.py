"""What every store promises: the same tests over the one in memory and over PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from state.errors import Conflict, NotFound
from state.events import (
    ApiKey,
    Artefact,
    DatasetStatus,
    Delivery,
    HostRecord,
    Idempotent,
    OutgoingStatus,
    Secret,
)
from state.job import GpuNeeds, Reason, Status
from state.lease import LeaseStatus
from state.orphan import Orphan

# --- transactions -----------------------------------------------------------------------------


class Interrupted(Exception):
    """Something unforeseen in the middle of a transaction."""


def everything_once(tx, make):
    """Touch every kind of row; what is returned names them."""
    job = make.job(id="job_x", due_at=make.now)
    tx.add_job(job, webhook_secrets=[Secret("whsec_x")])
    job = job.evolve(status=Status.PENDING_GPU)
    tx.save_job(job)
    tx.add_attempt(make.attempt(job.id))
    tx.add_lease(make.lease(job.id, id="lease_x", token_hash="token", reserved=3_600_000))
    tx.add_events([make.report(job.id, 1)])
    tx.add_outgoing([make.outgoing(job.id, 1, id="msg_x")])
    tx.log_delivery(
        Delivery(outgoing="msg_x", job=job.id, tried_at=make.now, answer=200, took_ms=3)
    )
    tx.add_dataset(make.dataset(id="ds_x", due_at=make.now))
    tx.put_artefacts([artefact(make, "job_x", "weights.safetensors")])
    tx.add_api_key(api_key(make))
    tx.begin_idempotent(idempotent(make))
    tx.save_host(HostRecord(machine_id="m1", good=1))
    tx.add_spend(lease="lease_x", job=job.id, at=make.now, amount=7)
    tx.save_orphan(orphan(make))
    tx.beat("sweep", make.now)
    return job


def remains(tx, make):
    return [
        tx.jobs(["job_x"]),
        tx.list_jobs(),
        tx.list_jobs(dataset="ds_1"),
        tx.list_jobs(statuses=[Status.PENDING_GPU]),
        tx.webhook_secrets("job_x"),
        tx.list_attempts("job_x"),
        tx.lease_by_token("token"),
        tx.leases_since(make.now),
        tx.leases_of("job_x"),
        tx.open_leases(),
        tx.events("job_x"),
        tx.known_reports(["job_x.1.1"]),
        tx.list_outgoing("job_x"),
        tx.next_outgoing("job_x"),
        tx.deliveries("job_x"),
        tx.artefacts("job_x"),
        tx.api_keys(),
        tx.api_key_by_hash("hash"),
        tx.hosts(),
        tx.spend_of("job_x"),
        tx.spend_since(make.now),
        tx.reserved(),
        tx.open_orphans(),
        tx.orphans_between(make.now, make.after(1)),
        tx.orphans_labelled("stoker/job_x/1-0"),
        tx.beats(),
    ]


def due(tx, make):
    return [
        tx.claim_due_jobs(make.now, make.after(1), 10),
        tx.claim_due_outgoing(make.now, make.after(1), 10),
        tx.claim_due_datasets(make.now, make.after(1), 10),
    ]


def test_a_transaction_that_raises_leaves_nothing_behind(store, make):
    def interrupted():
        with store.transaction() as tx:
            everything_once(tx, make)
            assert all(remains(tx, make))
            assert all(due(tx, make))
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    with store.transaction() as tx:
        assert not any(remains(tx, make) + due(tx, make))
        # and every key is free again
        everything_once(tx, make)


def test_changes_that_are_rolled_back_give_way_to_what_was_there(store, make):
    with store.transaction() as tx:
        job = everything_once(tx, make)
        before = remains(tx, make)

    def interrupted():
        with store.transaction() as tx:
            tx.save_job(job.evolve(status=Status.FAILED, seq=9, due_at=make.after(99)))
            tx.save_attempt(tx.attempt("job_x", 1).evolve(nonce="other"))
            tx.save_lease(tx.lease("lease_x").to(LeaseStatus.RELEASED))
            tx.add_lease(make.lease("job_x", token_hash="another"))
            tx.save_outgoing(tx.outgoing("msg_x").evolve(status=OutgoingStatus.DELIVERED))
            tx.delete_dataset("ds_x")
            tx.put_artefacts([artefact(make, "job_x", "weights.safetensors", bytes=1)])
            tx.drop_idempotent_before(make.after(1), 10)
            tx.save_host(HostRecord(machine_id="m1", bad=1))
            tx.add_spend(lease="lease_x", job="job_y", at=make.after(7200), amount=99)
            tx.save_orphan(orphan(make, label="other", gone_at=make.after(1)))
            tx.beat("sweep", make.after(1))
            tx.drop_events_before(make.after(1), 10)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    with store.transaction() as tx:
        assert remains(tx, make) == before
        assert all(due(tx, make))
        assert tx.dataset("ds_x")
        assert tx.begin_idempotent(idempotent(make)) == idempotent(make)


def test_a_claim_that_is_rolled_back_can_be_made_again(store, make):
    with store.transaction() as tx:
        everything_once(tx, make)
        tx.save_job(tx.job("job_x").evolve(due_at=make.now))

    def claim():
        with store.transaction() as tx:
            assert [job.id for job in tx.claim_due_jobs(make.now, make.after(60), 5)] == ["job_x"]
            assert tx.claim_due_outgoing(make.now, make.after(60), 5) == ["job_x"]
            assert [row.id for row in tx.claim_due_datasets(make.now, make.after(60), 5)] == [
                "ds_x"
            ]
            raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            claim()


def test_nobody_sees_half_of_a_transaction(store, make):
    half_done, seen = threading.Event(), threading.Event()
    counts = []

    def write():
        with store.transaction() as tx:
            tx.add_job(make.job())
            half_done.set()
            # a store may also make the reader wait; then nothing is seen before the end
            seen.wait(0.2)
            tx.add_job(make.job())

    def read():
        half_done.wait(10)
        with store.transaction() as tx:
            counts.append(len(tx.list_jobs()))
        seen.set()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(write), threads.submit(read)]:
            done.result(30)
    assert counts[0] in (0, 2)


def test_a_conflict_that_is_caught_leaves_the_transaction_usable(store, make):
    job = make.job()
    with store.transaction() as tx:
        tx.add_job(job)
        with pytest.raises(Conflict):
            tx.add_job(job)
        tx.beat("sweep", make.now)
    with store.transaction() as tx:
        assert tx.job(job.id) == job
        assert tx.beats()


def test_a_locked_row_is_read_by_the_next_only_after_the_change(store, make, commit):
    job = make.job()
    commit("add_job", job)

    def count_up(_):
        with store.transaction() as tx:
            now = tx.job(job.id, lock=True)
            tx.save_job(now.evolve(seq=now.seq + 1))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count_up, range(40)))
    assert commit("job", job.id).seq == 40


def test_a_named_lock_lets_one_in_at_a_time(store, make):
    def count_up(_):
        with store.transaction() as tx:
            tx.lock("rentals")
            tx.lock("rentals")  # twice is once
            _, data = tx.beats().get("count", (None, {"n": 0}))
            tx.beat("count", make.now, {"n": data["n"] + 1})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count_up, range(40)))
    with store.transaction() as tx:
        assert tx.beats() == {"count": (make.now, {"n": 40})}


def test_callers_that_lock_the_same_jobs_in_other_orders_do_not_block_each_other(
    store, make, commit
):
    ids = [make.job().id for _ in range(6)]
    for job_id in ids:
        commit("add_job", make.job(id=job_id))

    def touch(number):
        order = ids if number % 2 else ids[::-1]
        with store.transaction() as tx:
            found = tx.jobs(order, lock=True)
            tx.save_jobs([found[job_id].evolve(seq=found[job_id].seq + 1) for job_id in order])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(touch, range(40)))
    assert {job.seq for job in commit("jobs", ids).values()} == {40}


# --- jobs -------------------------------------------------------------------------------------


def test_a_job_comes_back_as_it_was_stored(make, commit):
    job = make.job(
        request={
            "recipe": {"steps": 1000, "sample_prompts": ["a ☃ \\u0000"], "learning_rate": 1e-4},
            "gpu": GpuNeeds(min_vram_gb=24.0, gpu_names=("RTX 4090", "L40S"), max_price=1),
            "metadata": {"customer": "7"},
            "webhook_url": "https://example.com/hook",
            "max_attempts": 2,
        },
        status=Status.STALLED,
        attempt=2,
        known=frozenset({"gpu.ready", "images.ready"}),
        seq=2**53 - 1,
        owed=3,
        dataset_ready=True,
        stalled_from=Status.TRAINING,
        reason=Reason(code="oom", message="CUDA out of memory", retryable=False),
        retry_at=make.after(1.000001),
        deadline_at=make.after(2),
        last_heard_at=make.after(3),
        due_at=make.after(4),
        started_at=make.after(5),
        finished_at=make.after(6),
        orders=("cancel", "checkpoint_now"),
        progress={"training": {"step": 3, "loss": 0.25}},
        excluded_machines=("m2", "m1"),
    )
    commit("add_job", job)
    assert commit("job", job.id) == job
    changed = job.evolve(
        status=Status.PENDING_GPU, reason=None, stalled_from=None, orders=(), progress={}, seq=1
    )
    commit("save_job", changed)
    assert commit("jobs", [job.id, "job_none"]) == {job.id: changed}


def test_a_bare_job_comes_back_as_it_was_stored(make, commit):
    job = make.job()
    commit("add_job", job)
    assert commit("job", job.id) == job


def test_a_job_id_is_taken_once(make, commit):
    job = make.job()
    commit("add_job", job)
    with pytest.raises(Conflict):
        commit("add_job", job.evolve(owner="other"))
    assert commit("job", job.id).owner == "acme"


def test_what_is_missing_is_not_found(make, commit):
    for ask in ("job", "lease", "outgoing", "dataset"):
        with pytest.raises(NotFound):
            commit(ask, "none")
    with pytest.raises(NotFound):
        commit("attempt", "none", 1)
    assert commit("lease_by_token", "none") is None
    assert commit("api_key_by_hash", "none") is None
    assert commit("host", "none") is None
    assert commit("next_outgoing", "none") is None


@pytest.mark.parametrize("key", ["\x00", "job\x001", "\ud800", "", "x" * 10_000])
def test_a_key_that_nothing_can_have_is_not_found(commit, key):
    with pytest.raises(NotFound):
        commit("job", key)
    assert commit("jobs", [key]) == {}
    assert commit("known_reports", [key]) == set()
    assert commit("lease_by_token", key) is None
    assert commit("list_jobs", owner=key) == []
    assert commit("list_jobs", metadata={key: key}) == []
    assert commit("list_jobs", dataset=key) == []


def test_saving_what_is_not_there_is_not_found(make, commit):
    for save, value in (
        ("save_job", make.job()),
        ("save_jobs", [make.job(), make.job()]),
        ("save_attempt", make.attempt("job_none")),
        ("save_lease", make.lease("job_none")),
        ("save_outgoing", make.outgoing("job_none", 1)),
        ("save_dataset", make.dataset()),
        ("save_api_key", api_key(make)),
    ):
        with pytest.raises(NotFound):
            commit(save, value)
    with pytest.raises(NotFound):
        commit("finish_idempotent", "acme", "none", {})


def test_many_jobs_are_saved_together_or_not_at_all(make, commit):
    jobs = [make.job() for _ in range(50)]
    for job in jobs:
        commit("add_job", job)
    with pytest.raises(NotFound):
        commit("save_jobs", [*(job.evolve(seq=1) for job in jobs), make.job()])
    assert {job.seq for job in commit("jobs", [job.id for job in jobs]).values()} == {0}
    commit("save_jobs", [job.evolve(seq=1) for job in jobs])
    assert {job.seq for job in commit("jobs", [job.id for job in jobs]).values()} == {1}
    commit("save_jobs", [])


def test_jobs_are_listed_newest_first_page_by_page(make, commit):
    jobs = [make.job(owner="acme" if n % 2 else "other") for n in range(10)]
    for job in jobs:
        commit("add_job", job)
    newest = jobs[::-1]
    assert commit("list_jobs", limit=3) == newest[:3]
    assert commit("list_jobs", limit=3, before=newest[2].id) == newest[3:6]
    assert commit("list_jobs", owner="acme") == newest[::2]
    assert commit("list_jobs", owner="acme", before=newest[0].id, limit=2) == newest[2:6:2]
    assert commit("list_jobs", before=jobs[0].id) == []


def test_jobs_are_listed_by_status_metadata_and_dataset(make, commit):
    one = make.job(request={"metadata": {"team": "a", "run": "1"}}, status=Status.TRAINING)
    two = make.job(request={"metadata": {"team": "a", "run": "2"}}, dataset="ds_2")
    three = make.job(request={"metadata": {"team": "b"}}, dataset="ds_2")
    for job in (one, two, three):
        commit("add_job", job)
    assert commit("list_jobs", statuses=[Status.TRAINING, Status.FAILED]) == [one]
    assert commit("list_jobs", metadata={"team": "a"}) == [two, one]
    assert commit("list_jobs", metadata={"team": "a", "run": "2"}) == [two]
    assert commit("list_jobs", metadata={"team": "A"}) == []
    assert commit("list_jobs", dataset="ds_2") == [three, two]
    assert commit("list_jobs", dataset="ds_2", statuses=[Status.TRAINING]) == []
    three = three.evolve(status=Status.TRAINING)
    commit("save_job", three)
    assert commit("list_jobs", statuses=[Status.TRAINING]) == [three, one]
    assert commit("count_jobs") == {Status.TRAINING: 2, Status.PENDING: 1}


def test_secrets_of_a_job_come_back_oldest_first(make, commit):
    job, bare = make.job(), make.job()
    secrets = [Secret("whsec_old"), Secret("whsec_new")]
    commit("add_job", job, webhook_secrets=secrets)
    commit("add_job", bare)
    assert [secret.reveal() for secret in commit("webhook_secrets", job.id)] == [
        "whsec_old",
        "whsec_new",
    ]
    assert commit("webhook_secrets", bare.id) == []


# --- due work ---------------------------------------------------------------------------------


def test_due_jobs_are_claimed_oldest_first_and_once(make, commit):
    late, later, future, never = (
        make.job(due_at=due) for due in (make.after(-20), make.after(-10), make.after(1), None)
    )
    for job in (later, never, future, late):
        commit("add_job", job)
    until = make.after(30)
    assert commit("claim_due_jobs", make.now, until, 1) == [late.evolve(due_at=until)]
    assert commit("claim_due_jobs", make.now, until, 9) == [later.evolve(due_at=until)]
    assert commit("claim_due_jobs", make.now, until, 9) == []
    assert commit("job", late.id).due_at == until
    # not done by then: somebody else's turn, with what became due meanwhile
    assert [job.id for job in commit("claim_due_jobs", until, make.after(60), 9)] == [
        future.id,
        late.id,
        later.id,
    ]


def test_a_due_time_that_moves_counts_as_it_stands(make, commit):
    job = make.job(due_at=make.now)
    commit("add_job", job)
    commit("save_job", job.evolve(due_at=make.after(10)))
    assert commit("claim_due_jobs", make.after(9), make.after(99), 5) == []
    commit("save_job", job.evolve(due_at=None))
    assert commit("claim_due_jobs", make.after(99), make.after(100), 5) == []
    commit("save_job", job.evolve(due_at=make.now))
    assert len(commit("claim_due_jobs", make.now, make.now, 5)) == 1
    assert len(commit("claim_due_jobs", make.now, make.after(99), 5)) == 1


def test_leases_and_datasets_are_claimed_likewise(make, commit):
    lease, dataset = make.lease("job_1", due_at=make.now), make.dataset(due_at=make.now)
    commit("add_lease", lease)
    commit("add_lease", make.lease("job_2"))
    commit("add_dataset", dataset)
    until = make.after(30)
    assert commit("claim_due_leases", make.now, until, 5) == [lease.evolve(due_at=until)]
    assert commit("claim_due_datasets", make.now, until, 5) == [dataset.evolve(due_at=until)]
    assert commit("claim_due_leases", make.now, until, 5) == []
    assert commit("claim_due_datasets", make.now, until, 5) == []


def test_two_claimers_never_get_the_same_row(store, make, commit):
    for _ in range(60):
        job = make.job(due_at=make.now)
        commit("add_job", job)
        commit("add_outgoing", [make.outgoing(job.id, 1), make.outgoing(job.id, 2)])
    claimed_jobs, claimed_rows = [], []

    def claim(_):
        while True:
            with store.transaction() as tx:
                jobs = tx.claim_due_jobs(make.now, make.after(60), 7)
                rows = tx.claim_due_outgoing(make.now, make.after(60), 7)
            claimed_jobs.extend(job.id for job in jobs)
            claimed_rows.extend(rows)
            if not jobs and not rows:
                return

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(claim, range(4)))
    assert len(claimed_jobs) == len(set(claimed_jobs)) == 60
    assert len(claimed_rows) == len(set(claimed_rows)) == 60


# --- attempts ---------------------------------------------------------------------------------


def test_attempts_are_found_by_number(make, commit):
    first = make.attempt("job_1", 1, secret=Secret("whsec_1"), nonce="n", hello_at=make.now)
    second = make.attempt("job_1", 2)
    commit("add_attempt", second)
    commit("add_attempt", first)
    assert commit("list_attempts", "job_1") == [first, second]
    assert commit("attempt", "job_1", 1).secret.reveal() == "whsec_1"
    second = second.evolve(secret=Secret("whsec_2"), nonce="m")
    commit("save_attempt", second)
    assert commit("attempt", "job_1", 2, lock=True) == second


def test_attempts_of_jobs_that_ended_are_found_until_they_are_cleared(make, commit):
    ended = make.job(status=Status.FAILED, finished_at=make.now)
    alive = make.job(status=Status.TRAINING)
    for job in (ended, alive):
        commit("add_job", job)
        commit("add_attempt", make.attempt(job.id, 1))
    second = make.attempt(ended.id, 2)
    commit("add_attempt", second)
    assert commit("attempts_over", make.now, 10) == []
    assert [item.number for item in commit("attempts_over", make.after(1), 10)] == [1, 2]
    assert len(commit("attempts_over", make.after(1), 1)) == 1
    commit("save_attempt", second.evolve(cleared=True))
    assert [item.number for item in commit("attempts_over", make.after(1), 10)] == [1]


def test_an_attempt_is_unique(make, commit):
    attempt = make.attempt("job_1", 1)
    commit("add_attempt", attempt)
    with pytest.raises(Conflict):
        commit("add_attempt", attempt)
    assert commit("list_attempts", "job_1") == [attempt]


def test_a_lease_is_found_by_its_token(make, commit):
    lease = make.lease("job_1", token_hash="t1", token_expires_at=make.after(60))
    commit("add_lease", lease)
    commit("add_lease", make.lease("job_2"))
    commit("add_lease", make.lease("job_3"))
    assert commit("lease_by_token", "t1", lock=True) == lease
    with pytest.raises(Conflict):
        commit("add_lease", make.lease("job_4", token_hash="t1"))
    assert commit("leases_of", "job_4") == []


def test_leases_since_a_time_are_the_young_ones(make, commit):
    old = make.lease("job_1", created_at=make.after(-1))
    young = [make.lease("job_2"), make.lease("job_3", created_at=make.after(1))]
    for lease in (old, *young):
        commit("add_lease", lease)
    assert commit("leases_since", make.now) == young


def test_leases_between_two_times_come_a_page_at_a_time(make, commit):
    kept = [make.lease(f"job_{n}", created_at=make.after(n // 2)) for n in range(5)]
    late = make.lease("job_late", created_at=make.after(3))
    for lease in (make.lease("job_old", created_at=make.after(-1)), *kept, late):
        commit("add_lease", lease)
    found, after = [], None
    while page := commit("leases_between", make.now, make.after(3), after=after, limit=2):
        assert len(page) <= 2
        found += page
        after = (page[-1].created_at, page[-1].id)
    assert found == sorted(kept, key=lambda lease: (lease.created_at, lease.id))


def test_a_second_machine_may_be_held_beside_one_that_is_slow(make, commit):
    commit("add_lease", make.lease("job_1"))
    hedge = make.lease("job_1", hedge=True)
    commit("add_lease", hedge)
    assert hedge in commit("open_leases")
    with pytest.raises(Conflict):
        commit("add_lease", make.lease("job_1", hedge=True))


def test_an_absurd_attempt_number_is_simply_not_found(commit):
    with pytest.raises(NotFound):
        commit("attempt", "job_1", 2**53 - 1)


# --- leases -----------------------------------------------------------------------------------


def test_a_lease_comes_back_as_it_was_stored(make, commit):
    lease = make.lease(
        "job_1",
        status=LeaseStatus.RENTED,
        offer_id="o",
        machine_id="m",
        gpu_name="RTX 4090",
        geo="NO",
        price=340_000,
        storage_price=2_000,
        instance_id="c1",
        rented_at=make.after(1),
        ready_at=make.after(2),
        releasing_at=make.after(3),
        released_at=make.after(4),
        due_at=make.after(5),
        tries=2,
        absent=1,
        why="cheapest",
        cost=12,
    )
    commit("add_lease", lease)
    assert commit("lease", lease.id, lock=True) == lease


def test_a_label_is_used_once_for_ever(make, commit):
    lease = make.lease("job_1", status=LeaseStatus.RELEASED)
    commit("add_lease", lease)
    with pytest.raises(Conflict):
        commit("add_lease", make.lease("job_2", label=lease.label))


def test_an_attempt_has_one_open_lease_at_a_time(make, commit):
    first = make.lease("job_1")
    commit("add_lease", first)
    with pytest.raises(Conflict):
        commit("add_lease", make.lease("job_1"))
    commit("add_lease", make.lease("job_1", attempt=2))
    first = first.to(LeaseStatus.RELEASED)
    commit("save_lease", first)
    second = make.lease("job_1")
    commit("add_lease", second)
    assert [lease.id for lease in commit("leases_of", "job_1")][::2] == [first.id, second.id]
    with pytest.raises(Conflict):
        commit("save_lease", first.evolve(status=LeaseStatus.RENTED))


def test_open_leases_and_what_they_may_still_cost(make, commit):
    assert commit("open_leases") == []
    assert commit("reserved") == 0
    one = make.lease("job_1", reserved=400_000)
    two = make.lease("job_2", reserved=100_001)
    over = make.lease("job_3", reserved=9_000_000, status=LeaseStatus.RELEASED)
    for lease in (one, two, over):
        commit("add_lease", lease)
    assert commit("open_leases") == [one, two]
    assert commit("offers_taken", [one.offer_id, "another"]) == {one.offer_id}
    assert commit("offers_taken", []) == set()
    assert commit("reserved") == 500_001
    commit("save_lease", one.to(LeaseStatus.RELEASED))
    assert commit("reserved") == 100_001


# --- events -----------------------------------------------------------------------------------


def test_events_come_back_in_order_and_by_page(make, commit):
    events = [
        make.report("job_1", seq, data={"n": seq}, type="transition" if seq % 3 == 0 else "x")
        for seq in range(1, 8)
    ]
    assert commit("add_events", [events[2], events[0], *events[3:], events[1]]) == [True] * 7
    commit("add_events", [make.event("job_2", 1)])
    assert commit("events", "job_1") == events
    assert commit("events", "job_1", after=2, limit=3) == events[2:5]
    assert commit("events", "job_1", type="transition") == [events[2], events[5]]
    assert commit("events", "job_1", type="transition", after=3) == [events[5]]
    assert commit("events", "job_1", after=7) == []
    assert commit("add_events", []) == []


def test_a_report_that_comes_again_is_no_event(make, commit):
    report = make.report("job_1", 1)
    assert commit("add_events", [report]) == [True]
    again = make.report("job_1", 2, agent_seq=1)
    other_name = make.report("job_1", 2, agent_seq=1, webhook_id="another")
    other_number = make.report("job_1", 2, agent_seq=9, webhook_id=report.webhook_id)
    for repeat in (report, again, other_name, other_number):
        assert commit("add_events", [repeat]) == [False]
    next_attempt = make.report("job_1", 2, agent_seq=1, attempt=2, webhook_id="job_1.2.1")
    fresh = make.report("job_1", 3, agent_seq=2)
    assert commit("add_events", [again, next_attempt, other_name, fresh, fresh]) == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert [event.seq for event in commit("events", "job_1")] == [1, 2, 3]
    assert commit("known_reports", ["job_1.1.1", "job_1.1.2", "job_1.1.3"]) == {
        "job_1.1.1",
        "job_1.1.2",
    }


def test_a_report_that_comes_twice_at_once_is_stored_once(store, make):
    def receive(number):
        with store.transaction() as tx:
            return tx.add_events([make.report("job_1", 1, agent_seq=1, at=make.after(number))])

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(receive, range(4)))
    assert sorted(answers) == [[False], [False], [False], [True]]


def test_two_different_events_cannot_have_the_same_number(make, commit):
    """Else a report would be acknowledged and lost."""
    commit("add_events", [make.report("job_1", 1)])
    for other in (make.report("job_1", 1, agent_seq=2), make.event("job_1", 1)):
        with pytest.raises(Conflict):
            commit("add_events", [other])
        with pytest.raises(Conflict):
            commit("add_events", [make.report("job_1", 7), other])
    assert len(commit("events", "job_1")) == 1


# --- what goes out ----------------------------------------------------------------------------


def test_a_job_s_webhooks_go_out_in_order(make, commit):
    first, second, third = (make.outgoing("job_1", seq) for seq in (1, 2, 3))
    commit("add_outgoing", [second, first])
    commit("add_outgoing", [third])
    until = make.after(30)
    assert commit("next_outgoing", "job_1") == first
    assert commit("claim_due_outgoing", make.now, until, 9) == ["job_1"]
    # the second waits for the first, whether that is being sent or waits for its next try
    assert commit("claim_due_outgoing", make.now, until, 9) == []
    first = first.evolve(tries=1, due_at=make.after(300))
    commit("save_outgoing", first)
    assert commit("claim_due_outgoing", make.after(299), until, 9) == []
    commit("save_outgoing", first.evolve(status=OutgoingStatus.DELIVERED, due_at=None))
    assert commit("next_outgoing", "job_1") == second
    assert commit("claim_due_outgoing", make.now, until, 9) == ["job_1"]
    commit("save_outgoing", second.evolve(status=OutgoingStatus.EXHAUSTED))
    commit("save_outgoing", third.evolve(status=OutgoingStatus.DISABLED))
    assert commit("next_outgoing", "job_1") is None
    assert commit("claim_due_outgoing", make.after(9999), until, 9) == []
    assert [row.seq for row in commit("list_outgoing", "job_1")] == [1, 2, 3]


def test_one_job_s_dead_endpoint_holds_up_no_other_job(make, commit):
    commit("add_outgoing", [make.outgoing("job_1", 1, due_at=make.after(600))])
    commit("add_outgoing", [make.outgoing("job_1", seq) for seq in range(2, 30)])
    commit("add_outgoing", [make.outgoing("job_2", 1), make.outgoing("job_3", 1, due_at=None)])
    assert commit("claim_due_outgoing", make.now, make.after(30), 5) == ["job_2"]


def test_the_oldest_due_webhooks_are_claimed_first(make, commit):
    for age in (1, 3, 2):
        commit("add_outgoing", [make.outgoing(f"job_{age}", 1, due_at=make.after(-age))])
    until = make.after(30)
    assert commit("claim_due_outgoing", make.now, until, 2) == ["job_3", "job_2"]
    assert commit("claim_due_outgoing", make.now, until, 2) == ["job_1"]


def test_an_outgoing_webhook_comes_back_as_it_was_stored(make, commit):
    row = make.outgoing("job_1", 1, payload={"a": [1, {"b": None}]}, tries=2)
    commit("add_outgoing", [row])
    commit("add_outgoing", [])
    assert commit("outgoing", row.id, lock=True) == row
    for other in (row, make.outgoing("job_1", 1)):
        with pytest.raises(Conflict):
            commit("add_outgoing", [other])


def test_deliveries_are_logged_newest_first(make, commit):
    tries = [
        Delivery(
            outgoing="msg_1",
            job="job_1",
            tried_at=make.after(n // 2),
            answer=500 + n,
            took_ms=n,
            error="",
        )
        for n in range(5)
    ]
    for delivery in tries:
        commit("log_delivery", delivery)
    assert commit("deliveries", "job_1") == tries[::-1]
    assert commit("deliveries", "job_1", limit=2) == tries[:2:-1]
    assert commit("deliveries", "job_2") == []


# --- datasets and artefacts -------------------------------------------------------------------


def test_a_dataset_comes_back_as_it_was_stored(make, commit):
    dataset = make.dataset(
        files=({"name": "a.jpg", "bytes": 3, "sha256": "ab"}, {"name": "b.jpg", "bytes": 4}),
        report={"kept": 2},
        status=DatasetStatus.BUILDING,
        zip_key="k",
        zip_bytes=2**40,
        zip_sha256="cd",
        due_at=make.now,
        tries=1,
    )
    commit("add_dataset", dataset)
    assert commit("dataset", dataset.id, lock=True) == dataset
    ready = dataset.evolve(status=DatasetStatus.READY, due_at=None)
    commit("save_dataset", ready)
    assert commit("dataset", dataset.id) == ready
    with pytest.raises(Conflict):
        commit("add_dataset", dataset)
    commit("delete_dataset", dataset.id)
    commit("delete_dataset", dataset.id)
    with pytest.raises(NotFound):
        commit("dataset", dataset.id)


def test_a_dataset_is_old_when_no_unfinished_job_needs_it(make, commit):
    unused, ended, needed, young = (
        make.dataset(created_at=make.after(age)) for age in (-30, -40, -50, 0)
    )
    for dataset in (unused, ended, needed, young):
        commit("add_dataset", dataset)
    commit("add_job", make.job(dataset=ended.id, status=Status.COMPLETED))
    commit("add_job", make.job(dataset=needed.id, status=Status.COMPLETED))
    commit("add_job", make.job(dataset=needed.id, status=Status.STALLED))
    assert commit("datasets_before", make.now, 9) == [ended, unused]
    assert commit("datasets_before", make.now, 1) == [ended]


def artefact(make, job, name, **given):
    return Artefact(
        **{
            "job": job,
            "name": name,
            "attempt": 1,
            "key": f"{job}/{name}",
            "bytes": 10,
            "sha256": "ab",
            "created_at": make.now,
        }
        | given
    )


def test_an_artefact_is_replaced_by_a_newer_one_of_its_name(make, commit):
    a, b = artefact(make, "job_1", "a"), artefact(make, "job_1", "b")
    commit("put_artefacts", [b, a])
    assert commit("artefacts", "job_1") == [a, b]
    a = artefact(make, "job_1", "a", attempt=2, verified=True, created_at=make.after(1))
    commit("put_artefacts", [a])
    commit("put_artefacts", [])
    assert commit("artefacts", "job_1") == [b, a]
    assert commit("artefacts", "job_2") == []


def test_old_artefacts_are_listed_until_they_are_marked_expired(make, commit):
    old = artefact(make, "job_1", "a", created_at=make.after(-20))
    older = artefact(make, "job_2", "a", created_at=make.after(-30))
    commit("put_artefacts", [old, older, artefact(make, "job_3", "a")])
    assert commit("artefacts_before", make.now, 9) == [older, old]
    assert commit("artefacts_before", make.now, 1) == [older]
    commit(
        "put_artefacts", [artefact(make, "job_2", "a", created_at=make.after(-30), expired=True)]
    )
    assert commit("artefacts_before", make.now, 9) == [old]


# --- keys -------------------------------------------------------------------------------------


def api_key(make, **given):
    return ApiKey(
        **{
            "id": "key_1",
            "owner": "acme",
            "name": "ci",
            "hash": "hash",
            "scopes": frozenset({"jobs:read", "jobs:write"}),
            "created_at": make.now,
        }
        | given
    )


def test_an_api_key_is_found_by_its_hash(make, commit):
    key = api_key(make)
    commit("add_api_key", key)
    assert commit("api_key_by_hash", "hash") == key
    revoked = api_key(make, revoked_at=make.after(1))
    commit("save_api_key", revoked)
    assert commit("api_keys") == [revoked]
    for other in (api_key(make, hash="other"), api_key(make, id="key_2")):
        with pytest.raises(Conflict):
            commit("add_api_key", other)


def idempotent(make, **given):
    return Idempotent(
        **{"owner": "acme", "key": "key-1", "body_hash": "b", "created_at": make.now} | given
    )


def test_a_repeated_request_gets_the_first_one_s_answer(make, commit):
    assert commit("begin_idempotent", idempotent(make)) is None
    assert commit("begin_idempotent", idempotent(make, body_hash="c")) == idempotent(make)
    assert commit("begin_idempotent", idempotent(make, owner="other")) is None
    commit("finish_idempotent", "acme", "key-1", {"status": 201})
    assert commit("begin_idempotent", idempotent(make)).answer == {"status": 201}


def test_an_idempotency_key_is_forgotten_after_its_time(make, commit):
    for number in range(3):
        row = idempotent(make, key=f"key-{number}", created_at=make.after(number))
        commit("begin_idempotent", row)
    assert commit("drop_idempotent_before", make.after(2), 1) == 1
    assert commit("drop_idempotent_before", make.after(2), 10) == 1
    assert commit("drop_idempotent_before", make.after(2), 10) == 0
    assert commit("begin_idempotent", idempotent(make, key="key-0")) is None
    assert commit("begin_idempotent", idempotent(make, key="key-2")) is not None


@pytest.mark.parametrize("first_succeeds", [True, False])
def test_the_second_of_two_requests_at_once_waits_for_the_first(store, make, first_succeeds):
    begun, answers = threading.Event(), []

    def first():
        with store.transaction() as tx:
            answers.append(tx.begin_idempotent(idempotent(make)))
            begun.set()
            tx.finish_idempotent("acme", "key-1", {"status": 201})
            if not first_succeeds:
                raise Interrupted

    def second():
        begun.wait(10)
        with store.transaction() as tx:
            return tx.begin_idempotent(idempotent(make))

    with ThreadPoolExecutor(2) as threads:
        one, two = threads.submit(first), threads.submit(second)
        stored = two.result(30)
        assert isinstance(one.exception(30), Interrupted | None)
    assert answers == [None]
    assert (stored is not None and stored.answer == {"status": 201}) is first_succeeds


# --- hosts, money, beats ----------------------------------------------------------------------


def test_hosts_are_remembered(make, commit):
    host = HostRecord(machine_id="m2", good=1, boot_s=31.5, download_mbps=400.0)
    commit("save_host", host)
    commit("save_host", HostRecord(machine_id="m1"))
    failed = HostRecord(
        machine_id="m2", good=1, bad=1, last_failed_at=make.now, last_reason="oom", steps_per_s=1.5
    )
    commit("save_host", failed)
    assert commit("host", "m2") == failed
    assert commit("hosts") == [HostRecord(machine_id="m1"), failed]


def test_spend_is_counted_once_per_lease(make, commit):
    assert commit("spend_since", make.now) == commit("spend_of", "job_1") == 0
    commit("add_spend", lease="l1", job="job_1", at=make.after(-7200), amount=100)
    commit("add_spend", lease="l2", job="job_1", at=make.after(-60), amount=30)
    commit("add_spend", lease="l3", job="job_2", at=make.now, amount=5)
    assert commit("spend_since", make.after(-60)) == 35
    assert commit("spend_since", make.after(-7200)) == 135
    assert commit("spend_since", make.after(0.001)) == 0
    assert commit("spend_of", "job_1") == 130
    commit("add_spend", lease="l1", job="job_1", at=make.now, amount=200)
    assert commit("spend_of", "job_1") == 230
    assert commit("spend_since", make.after(-60)) == 235
    assert isinstance(commit("spend_of", "job_1"), int)


def orphan(make, id="77", **changes):
    times = {"started_at": make.now, "seen_at": make.now}
    return Orphan(**{"id": id, "label": "stoker/job_x/1-0", "price": 5, **times, **changes})


def test_orphans_are_found_by_their_start_their_label_and_whether_they_are_there(make, commit):
    first = orphan(make, "9", started_at=make.after(-60), machine_id="m1", gpu_name="RTX 4090")
    second = orphan(make, "10", label="stoker/b", job="job_1")
    for one in (second, first, first):
        commit("save_orphan", one)
    assert commit("orphan", "9") == first
    assert commit("orphan", "8") is None
    assert commit("open_orphans") == [first, second]
    assert commit("orphans_between", make.after(-60), make.now) == [first]
    assert commit("orphans_between", make.after(-59), make.after(1)) == [second]
    assert commit("orphans_labelled", "stoker/b") == [second]
    assert commit("orphans_labelled", "stoker/c") == []
    gone = first.evolve(ended_at=make.after(1), gone_at=make.after(30), price=2**53)
    commit("save_orphan", gone)
    assert commit("orphan", "9") == gone
    assert commit("open_orphans") == [second]
    commit("save_orphan", first)  # it is there again
    assert commit("open_orphans") == [first, second]
    assert commit("orphans_labelled", first.label) == [first]


def test_a_lease_is_found_by_its_label(make, commit):
    lease = make.lease("job_1")
    commit("add_lease", lease)
    commit("add_lease", make.lease("job_2"))
    assert commit("lease_by_label", lease.label) == lease
    assert commit("lease_by_label", "stoker/other") is None


def test_the_last_beat_of_a_name_counts(make, commit):
    commit("beat", "sweep", make.now)
    commit("beat", "worker", make.now, {"pid": 7})
    commit("beat", "sweep", make.after(1))
    assert commit("beats") == {"sweep": (make.after(1), {}), "worker": (make.now, {"pid": 7})}


# --- many jobs at once ------------------------------------------------------------------------


def test_leases_and_transitions_of_many_jobs_come_in_one_answer(make, commit):
    mine = [make.lease("job_1", attempt=1), make.lease("job_1", attempt=2)]
    for lease in (*mine, make.lease("job_2"), make.lease("job_3")):
        commit("add_lease", lease)
    of_jobs = commit("leases_of_jobs", ["job_1", "job_2", "job_unknown"])
    assert of_jobs["job_1"] == mine
    assert len(of_jobs["job_2"]) == 1
    assert of_jobs["job_unknown"] == []
    assert set(of_jobs) == {"job_1", "job_2", "job_unknown"}
    steps = [make.event("job_1", seq, type="transition", data={"to": "x"}) for seq in (1, 3)]
    others = [make.report("job_1", 2), make.event("job_2", 1, type="transition")]
    commit("add_events", [*steps, *others])
    assert commit("transitions_of", ["job_1", "job_9"]) == {"job_1": steps, "job_9": []}
    assert commit("transitions_of", []) == commit("leases_of_jobs", []) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CIVITAI:77", ["b"]),  # the base, in whatever case
        ("100%", ["a"]),  # a metadata value; % and _ are no patterns
        ("r_n", ["a"]),
        ("customer", ["a"]),  # a metadata key
        ("m4711", ["b"]),  # the machine that it had, by its whole id
        ("m47", []),
        ("job_s", ["b", "a"]),
        ("nothing like it", []),
        ("\x00", []),
    ],
)
def test_jobs_are_searched_by_what_people_remember(make, commit, text, found):
    names = {"job_sa": "a", "job_sb": "b"}
    said = {"metadata": {"customer_no": "100% Größe"}}
    commit("add_job", make.job(id="job_sa", request={"base": "hf:acme/tiny", **said}))
    commit("add_job", make.job(id="job_sb", request={"base": "civitai:777"}))
    commit("add_lease", make.lease("job_sb", machine_id="m4711"))
    assert [names[job.id] for job in commit("list_jobs", text=text)] == found


# --- retention --------------------------------------------------------------------------------


def test_old_history_goes_when_its_job_has_ended(make, commit):
    ended, running = make.job(status=Status.COMPLETED), make.job(status=Status.TRAINING)
    old, done = make.after(-100), OutgoingStatus.DELIVERED
    for job in (ended, running):
        commit("add_job", job)
        commit("add_events", [make.report(job.id, 1, at=old), make.report(job.id, 2)])
        commit("add_outgoing", [make.outgoing(job.id, 1, created_at=old, status=done)])
        commit("add_outgoing", [make.outgoing(job.id, 2, created_at=old)])
        for tried_at in (old, make.now):
            commit(
                "log_delivery",
                Delivery(outgoing="m", job=job.id, tried_at=tried_at, answer=200, took_ms=1),
            )
    assert commit("drop_events_before", make.after(-50), 2) == 2
    assert commit("drop_events_before", make.after(-50), 100) == 1
    assert commit("drop_events_before", make.after(-50), 100) == 0
    assert [event.seq for event in commit("events", ended.id)] == [2]
    assert commit("known_reports", [f"{ended.id}.1.1", f"{ended.id}.1.2"]) == {f"{ended.id}.1.2"}
    # what is still waiting is still owed
    assert [row.seq for row in commit("list_outgoing", ended.id)] == [2]
    assert len(commit("deliveries", ended.id)) == 1
    assert len(commit("events", running.id)) == len(commit("list_outgoing", running.id)) == 2
    assert len(commit("deliveries", running.id)) == 2
