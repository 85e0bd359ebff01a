"""Both stores keep what test keys rehearse, and apart from what costs money."""

from __future__ import annotations

from datetime import timedelta

import pytest

from state.lease import LeaseStatus
from state.rehearsal import Rehearsal


def test_what_a_job_rehearses_is_kept(store, make, commit):
    part = Rehearsal(fixture="test_oom", time_scale=12.5)
    rehearsed, real = make.job(request={"rehearsal": part}), make.job()
    for job in (rehearsed, real):
        commit("add_job", job)
    assert commit("job", rehearsed.id).request.rehearsal == part
    assert commit("job", real.id).request.rehearsal is None
    assert commit("jobs", [rehearsed.id])[rehearsed.id].request.rehearsal == part


@pytest.mark.parametrize("label", ["test:60:stoker/j/1-a", "test:1:x/j/1-a"])
def test_a_rehearsals_lease_is_none_of_those_that_cost_money(store, make, commit, label):
    job, start = make.job(), make.now - timedelta(hours=1)
    commit("add_job", job)
    # named as if it were one of a rehearsal, but for the mark
    real = make.lease(job.id, 1, label="test/stoker/j/1-b", reserved=7, offer_id="1")
    rehearsed = make.lease(job.id, 2, label=label, reserved=1000, offer_id="2")
    for lease in (real, rehearsed):
        commit("add_lease", lease)
    assert commit("open_leases") == commit("leases_since", start) == [real]
    assert commit("leases_between", start, make.after(60)) == [real]
    assert commit("open_rehearsals") == [rehearsed]
    assert commit("reserved") == 7
    assert commit("offers_taken", ["1", "2"]) == {"1", "2"}
    assert commit("leases_of", job.id) == [real, rehearsed]
    commit("save_lease", rehearsed.to(LeaseStatus.RELEASED))
    assert commit("open_rehearsals") == []
