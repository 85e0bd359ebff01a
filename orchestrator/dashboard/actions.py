"""What buttons do: each a POST that goes back to the page it came from, and says what happened."""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, flash, redirect, request, url_for
from werkzeug.wrappers import Response

from gpu_agent.wire import Order
from orchestrator.api import auth, sweeps
from orchestrator.api.jobs import visible
from orchestrator.api.problems import Refusal, refusal_of
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import brakes, record
from state.errors import NotFound, StokerError
from state.job import Job
from state.store import Transaction


def register(pages: Blueprint, deps: Deps, waker: Waker) -> None:
    """Put the buttons' views into `pages`."""

    def change(job_id: str, move: Callable[[Transaction, str], Job], done: str) -> Response:
        try:
            with deps.store.transaction() as tx:
                job = move(tx, visible(tx, job_id, auth.caller()).id)
        except NotFound:
            raise
        except (StokerError, Refusal) as error:
            # The page was older than the job: say so beside the job as it is now.
            flash(refusal_of(error).detail, "error")
        else:
            waker(job.id, record.wakes(job))
            flash(done, "ok")
        if request.form.get("back") == "fleet":
            return redirect(url_for("pages.fleet"), 303)
        return redirect(url_for("pages.job", job_id=job_id), 303)

    @pages.post("/jobs/<job_id>/cancel")
    def cancel_job(job_id: str) -> Response:
        def move(tx: Transaction, name: str) -> Job:
            return record.cancel(tx, name, deps.clock())

        return change(job_id, move, f"Job {job_id} is cancelled; its machine is given back.")

    @pages.post("/jobs/<job_id>/retry")
    def retry_job(job_id: str) -> Response:
        def move(tx: Transaction, name: str) -> Job:
            return record.retry(tx, name, deps.clock())

        return change(job_id, move, f"Job {job_id} looks for another machine now.")

    @pages.post("/jobs/<job_id>/checkpoint")
    def checkpoint_job(job_id: str) -> Response:
        def move(tx: Transaction, name: str) -> Job:
            return record.order(tx, name, Order.CHECKPOINT_NOW, deps.clock())

        return change(job_id, move, "A checkpoint is ordered; it comes within a minute or so.")

    @pages.post("/jobs/<job_id>/sample")
    def sample_job(job_id: str) -> Response:
        def move(tx: Transaction, name: str) -> Job:
            return record.order(tx, name, Order.SAMPLE_NOW, deps.clock())

        return change(job_id, move, "Samples are ordered; they come within a minute or so.")

    def back() -> Response:
        """To the page whose button it was: Fleet, or Money & hosts."""
        page = "pages.money" if request.form.get("back") == "money" else "pages.fleet"
        return redirect(url_for(page), 303)

    @pages.post("/renting/stop")
    def stop_renting() -> Response:
        said = request.form.get("why", "").replace("\0", "").strip()[:200]
        why = said or f"{auth.caller().owner} said so on a page"
        with deps.store.transaction() as tx:
            brakes.switch(tx, stopped=True, why=why, now=deps.clock())
        flash("No machine is rented any more, until you resume it.", "ok")
        return back()

    @pages.post("/renting/resume")
    def resume_renting() -> Response:
        with deps.store.transaction() as tx:
            brakes.switch(tx, stopped=False, why="", now=deps.clock())
        if deps.settings.kill_switch:
            flash("STOKER_KILL_SWITCH is set: nothing is rented until it is unset.", "error")
        else:
            flash("Machines are rented again.", "ok")
        return back()

    @pages.post("/sweep")
    def sweep_now() -> Response:
        sweeps.sweep(deps, dry_run=False)
        flash("The account is looked at within seconds; what nobody needs is destroyed.", "ok")
        return back()
