"""When a list of the account's instances is likelier wrong than right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from state.lease import Lease, LeaseStatus
from state.renting import not_believable

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def lease(number: int, **given: Any) -> Lease:
    """Of an instance that a list has shown."""
    fields = {
        "id": f"l{number}",
        "job": f"job_{number}",
        "attempt": 1,
        "label": f"test/job_{number}/1-0",
        "created_at": NOW,
        "expires_at": NOW + timedelta(hours=1),
        "status": LeaseStatus.RENTED,
        "instance_id": str(number),
        "seen_at": NOW,
    }
    return Lease(**{**fields, **given})


def test_a_list_without_any_of_ours_is_not_believed() -> None:
    assert not_believable([lease(1), lease(2)], set())
    assert not_believable([lease(1), lease(2)], {"another's"})


def test_a_list_with_one_of_ours_is_believed_of_the_others_too() -> None:
    assert not not_believable([lease(1), lease(2)], {"2"})


def test_one_machine_may_well_have_vanished() -> None:
    assert not not_believable([lease(1)], set())


def test_what_was_never_seen_or_is_going_says_nothing_of_a_list() -> None:
    young = lease(2, seen_at=None)
    going = lease(3, status=LeaseStatus.RELEASING)
    assert not not_believable([lease(1), young, going], set())
