"""A lease's few moves, as its page has them: `intended` to `released`, never back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from state.errors import IllegalMove
from state.lease import MOVES, Lease, LeaseStatus

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize("target", list(LeaseStatus))
@pytest.mark.parametrize("source", list(LeaseStatus))
def test_a_lease_makes_only_its_legal_moves(source: LeaseStatus, target: LeaseStatus) -> None:
    lease = Lease(
        id="l",
        job="job_1",
        attempt=1,
        label="test/job_1/1-0",
        created_at=NOW,
        expires_at=NOW + timedelta(hours=1),
        status=source,
    )
    if target is source or target in MOVES[source]:
        assert lease.to(target).status is target
    else:
        with pytest.raises(IllegalMove):
            lease.to(target)


def test_what_is_released_stays_so() -> None:
    assert MOVES[LeaseStatus.RELEASED] == frozenset()
