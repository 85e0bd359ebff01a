"""Fleet: what runs now, what needs somebody, and what it costs."""

from __future__ import annotations

from flask import Blueprint, render_template

from orchestrator.api import present
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import alarms


def register(pages: Blueprint, deps: Deps, waker: Waker) -> None:
    """Put the page's views into `pages`."""

    @pages.get("/")
    def fleet() -> str:
        now, settings = deps.clock(), deps.settings
        with deps.store.transaction() as tx:
            jobs = [
                present.job_summary(job, tx.leases_of(job.id), now)
                for job in tx.list_jobs(limit=50)
            ]
            stand = alarms.standing(tx, settings.limits, now, kill_switch=settings.kill_switch)
        return render_template("fleet.html", jobs=jobs, alarms=stand, now=now)
