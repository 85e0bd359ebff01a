"""Every invariant, the code that keeps it, and what happens to our tests without that code.

A mutation takes one such piece of code away. Each test that it names must then fail: an invariant
that no test would miss is only a wish. `python -m tests.mutations > docs/invariants.md` writes the
page; `pytest tests/mutations --mutants` tries every mutation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """`old` stands once in the file `path`; with `new` in its place each of `tests` fails.

    `what` says what the code then does. A test is a pytest node id without its parameters, or
    with them where only some of its cases fail.
    """

    invariant: str
    what: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


#: By name: what is promised, and where the code is that keeps the promise.
INVARIANTS: dict[str, tuple[str, str]] = {
    "I1": (
        "Every instance was preceded by a committed intent: a lease with its unique label.",
        "`tasks/allocate.py`: `_intend` commits before `create` is called; `_launch` passes on "
        "the label.",
    ),
    "I2": (
        "Once faults end, no instance lives without a live job.",
        "`tasks/deallocate.py`: `sweep` destroys what is ours and unowned; `tend` destroys again "
        "until the instance is gone.",
    ),
    "I3": (
        "A job has one live instance; two only while a boot is hedged, or while nobody can know "
        "whether a create call made one.",
        "`state/renting.py`: `wanted`; the unique index on open leases, in both stores; "
        "`tasks/deallocate.py`: `_settle`.",
    ),
    "I4": (
        "Machines go when their job ends, and a job costs no more than its cap.",
        "`state/record.py`: an end releases, in its own transaction; `tasks/allocate.py` and "
        "`state/money.py`: a lease is as long as the job can pay, and budgets are decided one at "
        "a time.",
    ),
    "I5": (
        "A lease is `released` only when two readable lists in a row lack its instance.",
        "`tasks/deallocate.py`: `ABSENT_LISTS`, and `renting.settled` for what is too young for "
        "any list.",
    ),
    "I6": (
        "What does not bear our prefix is never touched.",
        "`tasks/deallocate.py`: `sweep` looks at our prefix only.",
    ),
    "I7": (
        "A list that cannot be read, or that cannot be true, ends nothing.",
        "`infra/vast.py`: a list is whole or unreadable; `tasks/deallocate.py`: `tend` and "
        "`sweep` do nothing without one, and ask for the instance itself; `state/renting.py`: "
        "`not_believable`.",
    ),
    "I8": (
        "A report that was answered with 2xx is in the events exactly once.",
        "`orchestrator/webhook.py`: commit before the answer; `infra/database.py`: the commit is "
        "on disk; `state/record.py` and both stores: a webhook id is taken once.",
    ),
    "I9": (
        "Reports lead to the same state, however often and in whatever order they come.",
        "`state/machine.py`: facts are kept as a set, and a job advances as far as they permit.",
    ),
    "I10": (
        "A job's history is a path of the table, its end is final, its events are numbered "
        "without gaps.",
        "`state/machine.py`: `TABLE`, `move`; `state/lease.py`: `MOVES`; `state/record.py`: "
        "`note` counts.",
    ),
    "I11": (
        "Whoever speaks for an old attempt changes nothing.",
        "`state/machine.py`: `learn`; `state/record.py`: `verified`, `knock`, `machine_failed`.",
    ),
    "I12": (
        "What is committed is owed, in order and without gaps, until it was delivered or given up "
        "on the record.",
        "`state/record.py`: events and outbox are one transaction; `tasks/relay.py`: a claim runs "
        "out.",
    ),
    "I13": (
        "A dead endpoint delays nobody else.",
        "`tasks/relay.py`: `Lanes`; the stores: each job has its own queue.",
    ),
    "I14": (
        "With every message lost all jobs still end.",
        "`state/record.py`: a change sets `due_at`; `tasks/reconcile.py`: what is due is found, "
        "and a claim runs out.",
    ),
    "I15": (
        "Two beats, two workers, a message twice: nothing happens twice.",
        "`tasks/allocate.py` and `state/record.py`: asked again under the job's lock; "
        "`infra/statements.py`: `FOR UPDATE SKIP LOCKED`; `tasks/relay.py`: a row is claimed "
        "before it is sent.",
    ),
    "I16": (
        "`completed` means that the server holds the weights, and has read them.",
        "`state/machine.py`: the row wants `weights.verified`; `tasks/verify.py`: our own copy is "
        "read; `infra/safetensors.py`.",
    ),
    "I17": (
        "No secret is in what we log, show, or keep in the clear.",
        "`state/events.py`: `Secret`; `infra/logs.py`: `mask_secrets`; `tasks/allocate.py`: only "
        "the token's hash is kept; `infra/provider.py`: `LaunchSpec`; `infra/crypto.py`.",
    ),
    "I18": (
        "A signature that is false, old, or another attempt's is answered 401, or 422, and "
        "changes nothing.",
        "`gpu_agent/wire.py`: `verify`; `orchestrator/webhook.py`: report, URL and id agree.",
    ),
    "I19": (
        "We connect to no address that is not public, whatever a name server says.",
        "`infra/guard.py`: all addresses are checked, and the checked one is called.",
    ),
    "I20": (
        "Every live job moves on, or stalls within its deadline.",
        "`state/policy.py`: `decide`; `state/record.py`: a state entered has a deadline.",
    ),
    "I21": (
        "A pass costs what is due, not what exists.",
        "The stores: an index on `due_at`; in memory a heap.",
    ),
    "I22": (
        "The same seed gives the same simulation.",
        "`orchestrator/sim/kernel.py`: one seeded random, one order of events.",
    ),
    "I23": (
        "What a test key orders neither rents, ends, pays for nor blames a real machine; what is "
        "real never runs on one that pretends.",
        "`orchestrator/api/auth.py` and `jobs.py`: the key decides; `state/rehearsal.py`: the "
        "mark; `tasks/allocate.py`, `tasks/deallocate.py`: each kind is left alone by the "
        "other's renter and keeper; the stores: no rehearsal among the leases that cost money; "
        "`infra/rehearsal/market.py`: only what bears the mark.",
    ),
}

_RENTING = "tests/unit/tasks/test_renting.py::"
_RACES = "tests/unit/tasks/test_races.py::"
_TEST_MODE = "tests/integration/orchestrator/test_rehearsals.py::"
_RECONCILE = "tests/unit/tasks/test_reconcile.py::"
_RELAY = "tests/unit/tasks/test_relay.py::"
_LANES = "tests/unit/tasks/test_relay_lanes.py::"
_VERIFY = "tests/unit/tasks/test_verify.py::"
_MACHINE = "tests/unit/state/test_machine.py::"
_RECORD = "tests/unit/state/test_record.py::"
_STORE = "tests/integration/store/test_contract.py::"
_AT_ONCE = "tests/integration/store/test_at_once.py::"
_POSTGRESQL = "tests/integration/store/test_postgresql.py::"
_RECEIVER = "tests/integration/orchestrator/test_webhook.py::"
_HOSTILE = "tests/integration/provider/test_vast_hostile.py::"
_GUARD = "tests/unit/infra/test_models_guard.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        invariant="I1",
        what="no lease is written before the create call",
        path="tasks/allocate.py",
        old="            tx.add_lease(lease)\n",
        new="",
        tests=(_RENTING + "test_a_process_that_dies_after_create_leaves_the_lease_as_owner",),
    ),
    Mutation(
        invariant="I1",
        what="the instance does not bear the lease's label",
        path="tasks/allocate.py",
        old="            label=lease.label,\n",
        new='            label=f"{self.terms.deployment}/{lease.job}",\n',
        tests=(
            _RENTING + "test_a_lost_answer_is_adopted_by_its_label",
            _RENTING + "test_a_process_that_dies_after_create_leaves_the_lease_as_owner",
        ),
    ),
    Mutation(
        invariant="I2",
        what="the sweep destroys nothing",
        path="tasks/deallocate.py",
        old="        if keeper.destroy(instance_id):\n            orphans.ended",
        new="        if instance_id:\n            orphans.ended",
        tests=(
            _RENTING + "test_an_orphan_with_our_prefix_goes_at_the_second_sweep",
            "tests/unit/tasks/test_dead_mans_switch.py::"
            "test_a_machine_whose_lease_was_released_by_mistake_goes_at_the_second_sweep",
        ),
    ),
    Mutation(
        invariant="I2",
        what="destroy is asked once and never again",
        path="tasks/deallocate.py",
        old="            if doomed and not lease.absent and self.destroy(doomed):\n",
        new="            if doomed and not lease.tries and self.destroy(doomed):\n",
        tests=(_RENTING + "test_a_destroy_that_fails_is_repeated_until_it_is_seen",),
    ),
    Mutation(
        invariant="I3",
        what="a job is given a machine whatever it holds",
        path="state/renting.py",
        old="    held = [lease for lease in leases if lease.open]\n",
        new="    held: list[Lease] = []\n",
        tests=(_RENTING + "test_being_woken_ten_times_rents_once",),
    ),
    Mutation(
        invariant="I3",
        what="the store in memory takes a second open lease",
        path="state/memory.py",
        old="        if lease.open and other != lease.id:\n",
        new="        if False:\n",
        tests=(_STORE + "test_an_attempt_has_one_open_lease_at_a_time[memory]",),
    ),
    Mutation(
        invariant="I3",
        what="the database takes a second open lease",
        path="infra/migrations/versions/0002_machines.py",
        old='        ["job", "attempt", "hedge"],\n        unique=True,\n',
        new='        ["job", "attempt", "hedge"],\n        unique=False,\n',
        tests=(_STORE + "test_an_attempt_has_one_open_lease_at_a_time[postgresql]",),
    ),
    Mutation(
        invariant="I3",
        what="a create call without an answer is given up at the first list without its instance",
        path="tasks/deallocate.py",
        old="lease.absent >= ABSENT_LISTS and renting.settled(lease, now, self.rules):\n",
        new="True:\n",
        tests=(
            _RENTING + "test_a_lost_request_is_tried_again_only_after_it_is_proven_lost",
            _RENTING
            + "test_one_list_that_misses_an_instance_does_not_prove_that_it_was_never_made",
        ),
    ),
    Mutation(
        invariant="I3",
        what="the slower machine of a hedged boot stays",
        path="state/record.py",
        old="    pen.release(job, LOST_RACE, but=seen.lease.id)\n",
        new="",
        tests=(
            "tests/unit/tasks/test_hedging.py::"
            "test_the_first_to_say_hello_has_the_job_and_the_other_goes",
        ),
    ),
    Mutation(
        invariant="I4",
        what="a job's end releases nothing; its machines stay until their leases end",
        path="state/record.py",
        old=(
            "        if target not in ACTIVE and target is not Status.PENDING:\n"
            '            self.release(job, f"its job is {target}")\n'
        ),
        new="",
        tests=(
            _RECORD + "test_whatever_ends_or_stalls_a_job_lets_its_machine_go_in_one_transaction",
        ),
    ),
    Mutation(
        invariant="I4",
        what="a lease is as long as leases may be, whatever the job can pay",
        path="tasks/allocate.py",
        old="            span=span,\n",
        new="            span=self.rules.lease,\n",
        tests=(_RENTING + "test_a_job_never_rents_beyond_its_cap",),
    ),
    Mutation(
        invariant="I4",
        what="nothing is set aside for a machine that is about to be rented",
        path="tasks/search.py",
        old="    return made.evolve(reserved=money.worst(made))\n",
        new="    return made\n",
        tests=("tests/unit/tasks/test_hedging.py::test_both_machines_are_reserved_and_paid_for",),
    ),
    Mutation(
        invariant="I4",
        what="two jobs may decide at once, each on the same money",
        path="tasks/allocate.py",
        old='            tx.lock("rehearse" if self.terms.rehearsed else "rent")\n',
        new="",
        tests=(_AT_ONCE + "test_two_jobs_that_rent_at_once_stay_within_the_limit_together",),
    ),
    Mutation(
        invariant="I4",
        what="a job goes on when its lease ends",
        path="tasks/deallocate.py",
        old="            if now >= lease.expires_at:\n                record.machine_failed(",
        new="            if False:\n                record.machine_failed(",
        tests=(
            "tests/unit/tasks/test_money.py::"
            "test_money_that_is_used_up_in_training_orders_a_last_checkpoint_and_ends_the_job",
        ),
    ),
    Mutation(
        invariant="I4",
        what="a lease that ended is kept while its job goes on",
        path="state/renting.py",
        old='    if now >= lease.expires_at:\n        return "its lease ended"\n',
        new="",
        tests=(
            "tests/unit/tasks/test_dead_mans_switch.py::"
            "test_a_lease_that_ends_takes_its_machine_though_its_weights_wait_to_be_verified",
        ),
    ),
    Mutation(
        invariant="I5",
        what="one list without the instance counts as its end",
        path="tasks/deallocate.py",
        old="ABSENT_LISTS = 2\n",
        new="ABSENT_LISTS = 1\n",
        tests=(_RENTING + "test_released_means_seen_gone_in_two_lists",),
    ),
    Mutation(
        invariant="I5",
        what="lists prove the end of what is too young to be in them",
        path="tasks/deallocate.py",
        old="        if lease.absent >= ABSENT_LISTS and proven:\n",
        new="        if lease.absent >= ABSENT_LISTS:\n",
        tests=(_RACES + "test_a_machine_too_young_for_any_list_is_not_taken_for_gone",),
    ),
    Mutation(
        invariant="I6",
        what="the sweep takes every instance of the account for ours",
        path="tasks/deallocate.py",
        old=(
            "    ours = [instance for instance in listed "
            'if instance.label.startswith(f"{deployment}/")]\n'
        ),
        new="    ours = list(listed)\n",
        tests=(_RENTING + "test_an_orphan_with_our_prefix_goes_at_the_second_sweep",),
    ),
    Mutation(
        invariant="I7",
        what="tending takes an unreadable list for an empty one",
        path="tasks/deallocate.py",
        old=(
            '            _log.warning("the provider\'s list could not be read", error=str(error))\n'
            "            return self._again([lease.id for lease in leases], confirmed)\n"
        ),
        new="            listed = []\n",
        tests=(_RACES + "test_lists_that_cannot_be_read_do_not_show_that_a_machine_is_gone",),
    ),
    Mutation(
        invariant="I7",
        what="the sweep takes an unreadable list for an empty one",
        path="tasks/deallocate.py",
        old='        return Swept(unreadable=str(error) or "unreadable")\n',
        new="        listed = []\n",
        tests=(
            _RENTING + "test_an_unreadable_list_releases_and_destroys_nothing",
            _RACES + "test_lists_that_cannot_be_read_give_up_no_machine",
        ),
    ),
    Mutation(
        invariant="I7",
        what="a list without any of our machines is believed",
        path="state/renting.py",
        old=(
            "    return len(rented) > 1 "
            "and not any(lease.instance_id in listed for lease in rented)\n"
        ),
        new="    return False\n",
        tests=(
            "tests/unit/state/test_renting.py::test_a_list_without_any_of_ours_is_not_believed",
        ),
    ),
    Mutation(
        invariant="I7",
        what="the list alone says that a machine is gone; the machine itself is not asked for",
        path="tasks/deallocate.py",
        old="        vanished = vanished and keeper.is_gone(lease.instance_id)\n",
        new="",
        tests=(_RACES + "test_an_empty_list_gives_up_no_machine_that_can_be_asked_for",),
    ),
    Mutation(
        invariant="I7",
        what="an answer of the market without rows is an empty list",
        path="infra/vast.py",
        old="""                raise Unreadable(f"Vast's list of {key}: {self._said(answer)}")\n""",
        new="                return\n",
        tests=(_HOSTILE + "test_a_list_that_cannot_be_read_is_never_an_empty_list",),
    ),
    Mutation(
        invariant="I7",
        what="a list that breaks off is the whole list",
        path="infra/vast.py",
        old="""raise Unreadable(f"Vast's list of {key} has no end that can be trusted")\n""",
        new="return\n",
        tests=(
            _HOSTILE + "test_a_cursor_that_runs_in_circles_is_unreadable",
            _HOSTILE + "test_a_list_that_shows_fewer_than_it_found_is_unreadable",
        ),
    ),
    Mutation(
        invariant="I8",
        what="a report is acknowledged though its commit failed",
        path="orchestrator/webhook.py",
        old="        return self.committer.submit(report, timeout_s=COMMIT_TIMEOUT_S)\n",
        new=(
            "        try:\n"
            "            return self.committer.submit(report, timeout_s=COMMIT_TIMEOUT_S)\n"
            "        except Exception:\n"
            "            return record.Taken(record.Outcome.APPLIED)\n"
        ),
        tests=(_RECEIVER + "test_without_a_database_a_report_is_kept_by_its_agent[memory]",),
    ),
    Mutation(
        invariant="I8",
        what="a report is acknowledged before it is on disk",
        path="orchestrator/group_commit.py",
        old="        if not waiter.wait(timeout_s):\n",
        new="        if False:\n",
        tests=(
            "tests/unit/orchestrator/test_group_commit.py::"
            "test_nobody_is_answered_before_its_item_is_on_disk",
        ),
    ),
    Mutation(
        invariant="I8",
        what="the database may acknowledge a commit that is not on disk",
        path="infra/database.py",
        old='        "synchronous_commit": "on",\n',
        new="",
        tests=(
            _POSTGRESQL + "test_commits_are_durable_and_times_are_utc_whatever_the_server_prefers",
        ),
    ),
    Mutation(
        invariant="I8",
        what="a report that comes again is applied again",
        path="state/record.py",
        old="        elif report.webhook_id in known:\n",
        new="        elif False:\n",
        tests=(
            _RECEIVER + "test_a_repeated_report_is_answered_alike_and_changes_nothing[memory]",
            _RECORD + "test_a_report_that_comes_again_is_one_event",
        ),
    ),
    Mutation(
        invariant="I8",
        what="the store in memory takes a webhook id twice",
        path="state/memory.py",
        old="        if report in data.reports or event.webhook_id in data.webhook_ids:\n",
        new="        if False:\n",
        tests=(_STORE + "test_a_report_that_comes_again_is_no_event[memory]",),
    ),
    Mutation(
        invariant="I8",
        what="what is known of a report is read before its job is locked",
        path="state/record.py",
        old=(
            "    jobs = tx.jobs({report.job for report in reports}, lock=True)\n"
            "    known = tx.known_reports([report.webhook_id for report in reports])\n"
        ),
        new=(
            "    known = tx.known_reports([report.webhook_id for report in reports])\n"
            "    jobs = tx.jobs({report.job for report in reports}, lock=True)\n"
        ),
        tests=(
            _AT_ONCE + "test_reports_of_a_job_that_come_to_two_processes_at_once_are_each_one_event"
            "[1-Outcome.DUPLICATE]",
        ),
    ),
    Mutation(
        invariant="I8",
        what="the database takes a webhook id twice",
        path="infra/migrations/versions/0001_first.py",
        old='        ["webhook_id"],\n        unique=True,\n',
        new='        ["webhook_id"],\n        unique=False,\n',
        tests=(_STORE + "test_a_report_that_comes_again_is_no_event[postgresql]",),
    ),
    Mutation(
        invariant="I9",
        what="a job forgets a fact when it learns the next",
        path="state/machine.py",
        old="    job, passed = _advance(job.evolve(known=job.known | {str(fact)}), fact, at)\n",
        new="    job, passed = _advance(job.evolve(known=frozenset({str(fact)})), fact, at)\n",
        tests=(_MACHINE + "test_facts_in_any_order_lead_through_the_same_states",),
    ),
    Mutation(
        invariant="I9",
        what="a fact leads one state on, and no further",
        path="state/machine.py",
        old="        job = _enter(job, target, at)\n\n\ndef learn(",
        new="        return _enter(job, target, at), passed\n\n\ndef learn(",
        tests=(
            _MACHINE + "test_facts_in_any_order_lead_through_the_same_states",
            _RECEIVER + "test_facts_in_any_order_lead_to_training[memory]",
        ),
    ),
    Mutation(
        invariant="I10",
        what="a move that the table lacks is passed over in silence",
        path="state/machine.py",
        old=(
            '    if target is None:\n        raise IllegalMove(f"job {job.id}", what, job.status)\n'
        ),
        new="    if target is None:\n        return job, []\n",
        tests=(
            _MACHINE + "test_every_state_times_every_move",
            _MACHINE + "test_a_job_without_its_dataset_cannot_be_retried_onto_a_gpu",
        ),
    ),
    Mutation(
        invariant="I10",
        what="what is over can still be cancelled",
        path="state/machine.py",
        old="Row(Move.CANCEL, source, _S.CANCELLED) for source in (*_WAITING, _S.STALLED)),\n",
        new="Row(Move.CANCEL, source, _S.CANCELLED) for source in _S),\n",
        tests=(_MACHINE + "test_a_terminal_state_is_never_left",),
    ),
    Mutation(
        invariant="I10",
        what="a lease may move anywhere",
        path="state/lease.py",
        old="        if status is not self.status and status not in MOVES[self.status]:\n",
        new="        if False:\n",
        tests=("tests/unit/state/test_lease.py::test_a_lease_makes_only_its_legal_moves",),
    ),
    Mutation(
        invariant="I10",
        what="the count of a job's events skips numbers",
        path="state/record.py",
        old="        job = job.evolve(seq=job.seq + 1)\n",
        new="        job = job.evolve(seq=job.seq + 2)\n",
        tests=(_RECORD + "test_events_and_webhooks_are_numbered_without_gaps",),
    ),
    Mutation(
        invariant="I11",
        what="facts of other attempts count",
        path="state/machine.py",
        old="    if attempt != job.attempt or job.status not in ACTIVE:\n",
        new="    if job.status not in ACTIVE:\n",
        tests=(
            _MACHINE + "test_a_fact_of_an_old_attempt_changes_nothing",
            _RECEIVER + "test_a_stale_attempt_is_told_to_stop[memory-older attempt]",
        ),
    ),
    Mutation(
        invariant="I11",
        what="facts count when the job is over",
        path="state/machine.py",
        old="    if attempt != job.attempt or job.status not in ACTIVE:\n",
        new="    if attempt != job.attempt:\n",
        tests=(
            _MACHINE + "test_every_state_times_every_fact",
            _RECEIVER + "test_a_stale_attempt_is_told_to_stop[memory-cancelled]",
        ),
    ),
    Mutation(
        invariant="I11",
        what="the verification of an old attempt's weights completes the new one",
        path="state/record.py",
        old=(
            "    if job.attempt != attempt:\n"
            '        raise IllegalMove(f"job {job.id}", '
            'f"weights.verified of attempt {attempt}", job.status)\n'
        ),
        new="",
        tests=(_RECORD + "test_the_verification_of_an_old_attempt_completes_nothing",),
    ),
    Mutation(
        invariant="I11",
        what="the machine of an old attempt may still fetch the job",
        path="state/record.py",
        old="    over = lease.attempt != job.attempt or not job.active or not lease.open\n",
        new="    over = not job.active or not lease.open\n",
        tests=(_RECORD + "test_the_machine_of_an_old_attempt_is_not_let_in",),
    ),
    Mutation(
        invariant="I11",
        what="the end of an old attempt's machine stalls the new one",
        path="state/record.py",
        old="    if not job.active or job.attempt != lease.attempt or job.lease not in (",
        new="    if not job.active or job.lease not in (",
        tests=(_RECORD + "test_the_end_of_an_old_attempts_machine_is_nothing_to_the_new_one",),
    ),
    Mutation(
        invariant="I12",
        what="webhooks are owed and never written down",
        path="state/record.py",
        old="        if self._outgoing:\n            self.tx.add_outgoing(self._outgoing)\n",
        new="",
        tests=(
            _RELAY + "test_transitions_arrive_in_order",
            _RECORD + "test_events_and_webhooks_are_numbered_without_gaps",
        ),
    ),
    Mutation(
        invariant="I12",
        what="the count of a job's webhooks skips numbers",
        path="state/record.py",
        old="        job = job.evolve(owed=job.owed + 1)\n",
        new="        job = job.evolve(owed=job.owed + 2)\n",
        tests=(_RECORD + "test_events_and_webhooks_are_numbered_without_gaps",),
    ),
    Mutation(
        invariant="I12",
        what="what a relay that died had claimed is never due again",
        path="tasks/relay.py",
        old="            row = row.evolve(due_at=now + CLAIM, tries=row.tries + 1)\n",
        new="            row = row.evolve(due_at=None, tries=row.tries + 1)\n",
        tests=(_RELAY + "test_a_relay_that_died_is_followed_by_another",),
    ),
    Mutation(
        invariant="I12",
        what="half of a transaction that failed remains",
        path="state/memory.py",
        old="                transaction.roll_back()\n",
        new="                pass\n",
        tests=(_STORE + "test_a_transaction_that_raises_leaves_nothing_behind[memory]",),
    ),
    Mutation(
        invariant="I12",
        what="half of a transaction that failed is in the database",
        path="infra/store.py",
        old="                _roll_back(connection, raw)\n                raise\n",
        new="                _commit(raw)\n                raise\n",
        tests=(_STORE + "test_a_transaction_that_raises_leaves_nothing_behind[postgresql]",),
    ),
    Mutation(
        invariant="I12",
        what="a job's newest webhook goes first",
        path="state/memory.py",
        old="data.outgoing[waiting[min(waiting)]] if waiting",
        new="data.outgoing[waiting[max(waiting)]] if waiting",
        tests=(_RELAY + "test_transitions_arrive_in_order",),
    ),
    Mutation(
        invariant="I12",
        what="any answer of an endpoint is a delivery",
        path="tasks/relay.py",
        old="        if answer is not None and 200 <= answer.status < 300:\n",
        new="        if answer is not None:\n",
        tests=(
            _RELAY + "test_what_each_answer_means",
            _RELAY + "test_a_failed_webhook_holds_back_its_jobs_next_ones",
        ),
    ),
    Mutation(
        invariant="I13",
        what="a slow host may hold every thread",
        path="tasks/relay.py",
        old="            if host in self._slow or stuck >= TO_ONE_SLOW:\n",
        new="            if False:\n",
        tests=(_LANES + "test_a_slow_host_gets_few_threads_and_to_be_put_off_is_no_try",),
    ),
    Mutation(
        invariant="I13",
        what="any host may hold every thread",
        path="tasks/relay.py",
        old="            elif len(sends) >= TO_ONE:\n                return 1.0\n",
        new="",
        tests=(_LANES + "test_a_host_that_answers_again_has_all_its_threads_back",),
    ),
    Mutation(
        invariant="I14",
        what="a job that wants a GPU waits for a message",
        path="state/record.py",
        old="            return job.evolve(due_at=self.now)\n",
        new="            return job\n",
        tests=(_RECONCILE + "test_with_every_message_lost_work_is_still_found",),
    ),
    Mutation(
        invariant="I14",
        what="what was claimed for a message that got lost is never claimed again",
        path="tasks/reconcile.py",
        old="    until = now + CLAIM\n",
        new="    until = now + timedelta(days=365)\n",
        tests=(_RECONCILE + "test_a_wake_up_that_was_lost_comes_again",),
    ),
    Mutation(
        invariant="I14",
        what="owed webhooks wait for a message",
        path="tasks/reconcile.py",
        old='    for job_id in webhooks:\n        wake("relay", [job_id])\n',
        new="",
        tests=(_RECONCILE + "test_with_every_message_lost_work_is_still_found",),
    ),
    Mutation(
        invariant="I14",
        what="a machine that must go waits for a message",
        path="state/record.py",
        old='"releasing_at": self.now, "due_at": self.now, "tries": 0}\n',
        new='"releasing_at": self.now, "tries": 0}\n',
        tests=(
            _RECONCILE + "test_with_every_message_lost_work_is_still_found",
            _RECORD + "test_whatever_ends_or_stalls_a_job_lets_its_machine_go_in_one_transaction",
        ),
    ),
    Mutation(
        invariant="I15",
        what="what was asked before the market was is not asked again under the job's lock",
        path="tasks/allocate.py",
        old=(
            "            if not self._wanted(tx, job):\n"
            "                return None\n"
            "            leases = "
        ),
        new="            leases = ",
        tests=(_RACES + "test_two_workers_with_the_same_message_rent_once",),
    ),
    Mutation(
        invariant="I15",
        what="two workers may claim the same row",
        path="infra/statements.py",
        old=(
            "        .with_for_update(of=table, skip_locked=True)\n"
            "    )\n"
            "    if table is outgoing:\n"
        ),
        new="    )\n    if table is outgoing:\n",
        tests=(_STORE + "test_two_claimers_never_get_the_same_row[postgresql]",),
    ),
    Mutation(
        invariant="I15",
        what="a webhook that another relay is sending is sent again",
        path="tasks/relay.py",
        old="    return waits and row.due_at is not None and row.due_at <= now\n",
        new="    return waits and row.due_at is not None\n",
        tests=(_RELAY + "test_two_relays_at_once_send_a_row_once",),
    ),
    Mutation(
        invariant="I15",
        what="two processes may change a job at once",
        path="state/record.py",
        old="    jobs = tx.jobs({report.job for report in reports}, lock=True)\n",
        new="    jobs = tx.jobs({report.job for report in reports})\n",
        tests=(
            _AT_ONCE
            + "test_reports_of_a_job_that_come_to_two_processes_at_once_are_each_one_event",
        ),
    ),
    Mutation(
        invariant="I15",
        what="a row that is asked for with its lock is read without",
        path="infra/statements.py",
        old=(
            "    statement = select(*(table.c[name] for name in names))"
            ".where(*_matches(table, keys))\n"
            "    return _sql(statement.with_for_update() if lock else statement)\n"
        ),
        new=(
            "    statement = select(*(table.c[name] for name in names))"
            ".where(*_matches(table, keys))\n"
            "    return _sql(statement)\n"
        ),
        tests=(_STORE + "test_a_locked_row_is_read_by_the_next_only_after_the_change[postgresql]",),
    ),
    Mutation(
        invariant="I16",
        what="the agent's word completes a job",
        path="state/machine.py",
        old="_S.COMPLETED, (Fact.WEIGHTS_UPLOADED, Move.WEIGHTS_VERIFIED)),\n",
        new="_S.COMPLETED, (Fact.WEIGHTS_UPLOADED,)),\n",
        tests=(_MACHINE + "test_weights_are_not_completed_before_the_server_verified_them",),
    ),
    Mutation(
        invariant="I16",
        what="weights are not read before they count",
        path="tasks/verify.py",
        old="            self.storage.verify_safetensors(target, bytes=size, sha256=sha256)\n",
        new="            pass\n",
        tests=(_VERIFY + "test_other_weights_than_announced_stall_the_job",),
    ),
    Mutation(
        invariant="I16",
        what="what is read is not our own copy",
        path="tasks/verify.py",
        old="        self.storage.copy(attempt_key(job.id, job.attempt, name), target)\n",
        new="        target = attempt_key(job.id, job.attempt, name)\n",
        tests=(_VERIFY + "test_weights_that_are_exchanged_meanwhile_are_never_the_result",),
    ),
    Mutation(
        invariant="I16",
        what="numbers that are not finite are weights",
        path="infra/safetensors.py",
        old="            if not finite(piece, place.tensor.dtype):\n",
        new="            if False:\n",
        tests=(
            "tests/unit/infra/test_safetensors.py::test_weights_with_a_number_gone_wild_are_refused",
        ),
    ),
    Mutation(
        invariant="I16",
        what="the weights may have another checksum than was announced",
        path="infra/storage.py",
        old="    if got != _digest(sha256):\n",
        new="    if False:\n",
        tests=(
            "tests/integration/storage/test_verify.py::test_other_bytes_than_announced_are_refused",
        ),
    ),
    Mutation(
        invariant="I17",
        what="a secret shows itself to whoever prints it",
        path="state/events.py",
        old="        return \"Secret('***')\"\n",
        new="        return str.__repr__(self)\n",
        tests=(
            "tests/unit/infra/test_crypto.py::test_a_sealed_secret_opens_again_and_shows_nothing",
        ),
    ),
    Mutation(
        invariant="I17",
        what="log lines are written as they come",
        path="infra/logs.py",
        old="                mask_secrets,\n",
        new="",
        tests=(
            "tests/unit/orchestrator/test_logs.py::test_a_secret_is_masked_wherever_it_stands",
            "tests/unit/orchestrator/test_logs.py::test_values_under_telling_names_are_masked",
        ),
    ),
    Mutation(
        invariant="I17",
        what="the bootstrap token is kept in the clear",
        path="tasks/allocate.py",
        old="            token_hash=hashlib.sha256(token.encode()).hexdigest(),\n",
        new="            token_hash=token,\n",
        tests=(_RENTING + "test_the_machine_is_told_its_url_and_a_token_and_nothing_else",),
    ),
    Mutation(
        invariant="I17",
        what="what a machine is given shows when its order is printed",
        path="infra/provider.py",
        old="    env: Mapping[str, str] = field(default_factory=dict, repr=False)\n",
        new="    env: Mapping[str, str] = field(default_factory=dict)\n",
        tests=(_RENTING + "test_the_machine_is_told_its_url_and_a_token_and_nothing_else",),
    ),
    Mutation(
        invariant="I17",
        what="secrets are stored as they are",
        path="infra/crypto.py",
        old="        return self._fernet.encrypt(secret.reveal().encode())\n",
        new="        return secret.reveal().encode()\n",
        tests=(
            "tests/unit/infra/test_crypto.py::test_a_sealed_secret_opens_again_and_shows_nothing",
        ),
    ),
    Mutation(
        invariant="I18",
        what="a signature is good for ever",
        path="gpu_agent/wire.py",
        old="    if abs(now - int(stamp)) > TOLERANCE:\n",
        new="    if False:\n",
        tests=(
            "tests/wire/test_golden.py::test_old_signatures_are_accepted_in_their_time_only",
            _RECEIVER + "test_a_forged_report_is_refused_and_changes_nothing[an old time-memory]",
        ),
    ),
    Mutation(
        invariant="I18",
        what="any signature will do",
        path="gpu_agent/wire.py",
        old="    if not any(matches):\n",
        new="    if not matches:\n",
        tests=(
            "tests/wire/test_garbage.py::test_a_body_with_one_other_byte_is_refused",
            "tests/wire/test_garbage.py::test_another_attempts_secret_does_not_sign_for_this_one",
            _RECEIVER
            + "test_a_forged_report_is_refused_and_changes_nothing[another secret-memory]",
        ),
    ),
    Mutation(
        invariant="I18",
        what="one attempt may report for another",
        path="orchestrator/webhook.py",
        old="    if named != (call.job, call.attempt, webhook_id):\n",
        new="    if False:\n",
        tests=(
            _RECEIVER + "test_an_agent_cannot_report_for_another_one[memory]",
            _RECEIVER + "test_a_webhook_id_that_is_not_the_reports_is_refused[memory]",
        ),
    ),
    Mutation(
        invariant="I19",
        what="any address may be called",
        path="infra/guard.py",
        old="    if not all(allowed(address) for address in addresses):\n",
        new="    if False:\n",
        tests=(
            _GUARD + "test_one_private_address_among_public_ones_is_enough_to_refuse",
            "tests/trust/test_addresses.py::test_one_bad_address_of_several_spoils_them_all",
        ),
    ),
    Mutation(
        invariant="I19",
        what="the name is looked up a second time, for the connection",
        path="infra/guard.py",
        old="        line = _connect(addresses, port, deadline)\n",
        new=(
            "        addresses = [ipaddress.ip_address(text) for text in resolver(host, port)]\n"
            "        line = _connect(addresses, port, deadline)\n"
        ),
        tests=(
            _GUARD + "test_name_that_changes_its_address_after_the_check_gains_nothing",
            "tests/trust/test_addresses.py::"
            "test_a_name_that_turns_private_at_the_second_look_is_looked_at_once",
        ),
    ),
    Mutation(
        invariant="I19",
        what="addresses that carry a private one inside are public",
        path="infra/guard.py",
        old=("any(address.version == net.version and address in net for net in _NOT_PUBLIC):\n"),
        new="False:\n",
        tests=(_GUARD + "test_addresses_of_private_networks_are_not_public",),
    ),
    Mutation(
        invariant="I20",
        what="no deadline is looked at",
        path="state/policy.py",
        old=(
            "    if job.deadline_at is not None and now >= job.deadline_at:\n"
            "        return Decision(step=Step.STALL, reason=_overdue(job, policy))\n"
        ),
        new="",
        tests=(_RENTING + "test_a_gpu_that_nobody_offers_is_explained_and_times_out",),
    ),
    Mutation(
        invariant="I20",
        what="a silent agent is waited for until the deadline of its state",
        path="state/policy.py",
        old=(
            "    if silent_at is not None and now >= silent_at:\n"
            "        return Decision(step=Step.STALL, reason=_silent(job, now))\n"
        ),
        new="",
        tests=(_RENTING + "test_a_silent_agent_stalls_within_a_minute_and_its_machine_goes",),
    ),
    Mutation(
        invariant="I20",
        what="a state that is entered has no deadline",
        path="state/record.py",
        old="        job = job.evolve(deadline_at=self.now + span if span else None)\n",
        new="        job = job.evolve(deadline_at=None)\n",
        tests=(_RENTING + "test_a_gpu_that_nobody_offers_is_explained_and_times_out",),
    ),
    Mutation(
        invariant="I20",
        what="a stalled job waits for somebody to try it again",
        path="state/policy.py",
        old="        if job.retry_at is not None and now >= job.retry_at:\n",
        new="        if False:\n",
        tests=(_RENTING + "test_a_vanished_machine_stalls_its_job_and_another_is_rented",),
    ),
    Mutation(
        invariant="I20",
        what="an agent that lives and gets nothing done is waited for",
        path="state/policy.py",
        old=(
            "    if frozen_at is not None and now >= frozen_at:\n"
            "        return Decision(step=Step.STALL, reason=_frozen(job, now))\n"
        ),
        new="",
        tests=(
            "tests/unit/tasks/test_stalls.py::"
            "test_an_agent_that_lives_but_gets_nothing_done_is_seen_within_a_minute",
        ),
    ),
    Mutation(
        invariant="I21",
        what="the store in memory looks at every row for those that are due",
        path="state/memory.py",
        old="        taken: dict[str, None] = {}\n",
        new=(
            "        times = ((self._due(row), key) for key, row in self.items())\n"
            "        due = sorted((when, key) for when, key in times if when and when <= now)\n"
            "        return [key for _, key in due[:limit]]\n"
            "        taken: dict[str, None] = {}\n"
        ),
        tests=(
            "tests/unit/state/test_memory.py::"
            "test_what_a_transaction_costs_does_not_grow_with_the_store",
        ),
    ),
    Mutation(
        invariant="I21",
        what="the database has no index on due jobs",
        path="infra/migrations/versions/0001_first.py",
        old='        "jobs_due", "jobs", ["due_at"], unique=False,',
        new='        "jobs_due", "jobs", ["created_at"], unique=False,',
        tests=(_POSTGRESQL + "test_what_is_due_is_found_by_index",),
    ),
    Mutation(
        invariant="I22",
        what="the simulation's random has no seed",
        path="orchestrator/sim/kernel.py",
        old="        self.random = Random(seed)\n",
        new="        self.random = Random()\n",
        tests=(
            "tests/unit/sim/test_sim.py::"
            "test_the_same_seed_gives_the_same_trace_and_another_does_not",
        ),
    ),
    Mutation(
        invariant="I23",
        what="a real machine is rented for a rehearsal",
        path="tasks/allocate.py",
        old="            if (job.request.rehearsal is not None) is not self.terms.rehearsed:\n",
        new="            if False:\n",
        tests=(
            _TEST_MODE + "test_the_real_renter_rents_for_no_rehearsal",
            _TEST_MODE + "test_a_rehearsals_renter_rents_for_nothing_real",
        ),
    ),
    Mutation(
        invariant="I23",
        what="any keeper judges any lease",
        path="tasks/deallocate.py",
        old="        if lease.rehearsed is not self.rehearsed:\n            return None\n",
        new="",
        tests=(
            _TEST_MODE + "test_the_real_keeper_leaves_rehearsals_alone",
            _TEST_MODE + "test_a_rehearsals_keeper_leaves_what_is_real_alone",
        ),
    ),
    Mutation(
        invariant="I23",
        what="open rehearsals are open leases",
        path="state/memory.py",
        old="        return [lease for lease in opened if not lease.rehearsed]\n",
        new="        return opened\n",
        tests=(_TEST_MODE + "test_a_rehearsal_counts_nowhere_in_the_money",),
    ),
    Mutation(
        invariant="I23",
        what="what a rehearsal cost is written down as spent",
        path="tasks/deallocate.py",
        old="            if not lease.rehearsed:  # for",
        new="            if True:  # for",
        tests=(
            _TEST_MODE + "test_a_rehearsal_counts_nowhere_in_the_money",
            _TEST_MODE + "test_a_rehearsal_is_asked_no_invoice_for",
        ),
    ),
    Mutation(
        invariant="I23",
        what="a machine that pretends is remembered as a host",
        path="state/record.py",
        old="        if not lease.rehearsed:\n            self.tx.save_host(host)",
        new="        if True:\n            self.tx.save_host(host)",
        tests=(_TEST_MODE + "test_a_rehearsal_counts_nowhere_in_the_money",),
    ),
    Mutation(
        invariant="I23",
        what="the market of tests takes what bears no mark",
        path="infra/rehearsal/market.py",
        old="        if not (offer.id.startswith(PREFIX) and rehearsal.is_marked(spec.label)):\n",
        new="        if False:\n",
        tests=(_TEST_MODE + "test_the_market_of_tests_refuses_what_bears_no_mark",),
    ),
    Mutation(
        invariant="I23",
        what="a test key orders what is real, unless it asks for a test",
        path="orchestrator/api/jobs.py",
        old="        return replace(order.request, rehearsal=order.rehearsal or Rehearsal())\n",
        new="        return replace(order.request, rehearsal=order.rehearsal)\n",
        tests=(_TEST_MODE + "test_jobs_and_webhooks_say_their_mode",),
    ),
    Mutation(
        invariant="I23",
        what="a test key acts for the owner of live ones",
        path="orchestrator/api/auth.py",
        old="owner=key.owner + TEST_OWNER, scopes",
        new="owner=key.owner, scopes",
        tests=(_TEST_MODE + "test_neither_mode_sees_the_other",),
    ),
    Mutation(
        invariant="I23",
        what="an operator's word and the real market's state stop rehearsals",
        path="tasks/allocate.py",
        old="            return brakes.Book(leases=tx.open_rehearsals(), beats={})\n",
        new="            return brakes.Book(leases=tx.open_rehearsals(), beats=tx.beats())\n",
        tests=(_TEST_MODE + "test_a_real_market_that_is_down_stops_no_rehearsal",),
    ),
)
