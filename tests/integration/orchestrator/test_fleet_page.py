"""The Fleet page: what runs, what needs somebody, and what it costs."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from gpu_agent.wire import Fact
from orchestrator.dashboard import fleet
from orchestrator.dashboard.fleet import View
from state import brakes, record, usual
from state.job import Reason, Status
from state.lease import LeaseStatus
from state.usual import Usual

XSS = "<script>alert(1)</script>"


def rows_of(page: str) -> dict[str, str]:
    """Each job's row of the table."""
    return dict(re.findall(r'<tr id="row-(\w+)"(.*?)</tr>', page, re.DOTALL))


def attention_of(page: str) -> str:
    return page.partition('id="attention"')[2].partition("</section>")[0]


def stall(edge: Any, job: Any, message: str = "the agent was not heard for 47 s") -> None:
    with edge.store.transaction() as tx:
        reason = Reason(code="agent.silent", message=message)
        record.stall(tx, job.id, reason, edge.clock())


def post(edge: Any, browser: Any, path: str, **data: str) -> Any:
    token = edge.csrf_of(browser.get("/"))
    return browser.post(path, data={"csrf_token": token, **data})


def test_an_empty_fleet_says_the_next_command(edge: Any) -> None:
    page = edge.page().get("/").text
    assert "No job yet" in page
    assert "stoker train PHOTOS" in page


def test_a_row_says_how_far_its_job_is_where_and_for_how_much(edge: Any) -> None:
    agent = edge.agent(edge.job(metadata={"order": "A-17"}))
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        agent.report(fact)
    edge.clock.advance(3600)
    agent.report(Fact.TRAINING_PROGRESS, step=412, total=1000, steps_per_s=2.5, eta_s=235.0)
    (row,) = rows_of(edge.page().get("/").text).values()
    for words in ("412 / 1000", "2.50 steps/s", "3 min 55 s", "RTX 4090", "m1", "order=A-17"):
        assert words in row
    assert 'data-money="360000" data-rate="360000"' in row  # an hour at $0.36, and ticking
    assert 'aria-label="pending 0 s, pendingGpu 0 s' in row
    assert "training 1 h 00 min" in row


def test_a_stalled_job_stands_first_and_its_row_has_its_reason(edge: Any) -> None:
    well, ill = edge.job(), edge.job()
    edge.rent(ill)
    stall(edge, ill)
    page = edge.page().get("/").text
    assert ill.id in attention_of(page)
    assert well.id not in attention_of(page)
    assert page.index('id="attention"') < page.index('id="totals"') < page.index('id="rows"')
    assert "the agent was not heard for 47 s" in rows_of(page)[ill.id]
    assert f"/jobs/{ill.id}/retry" in attention_of(page)


def test_money_that_burns_wrongly_stands_before_what_mends_itself(edge: Any) -> None:
    waits, costs, kept = edge.job(), edge.job(max_cost=100_000), edge.job()
    stall(edge, waits)
    edge.agent(costs, token="a")
    edge.rent(kept, token="b")
    with edge.store.transaction() as tx:
        record.cancel(tx, kept.id, edge.clock())
    edge.clock.advance(1200)
    page = edge.page().get("/").text
    above = attention_of(page)
    assert above.index(costs.id) < above.index(waits.id)
    assert above.index(kept.id) < above.index(waits.id)
    assert "has spent its cap of $0.1000" in above
    assert "its machine was to be destroyed, and may still bill" in above
    assert "Sweep now" in above


def test_a_job_that_takes_much_longer_than_usual_is_a_problem(edge: Any) -> None:
    job = edge.job()
    with edge.store.transaction() as tx:
        spans = {Status.PENDING_GPU: Usual(p50=60.0, p95=90.0, count=20)}
        usual.keep(tx, spans, edge.clock())
    browser = edge.page()
    edge.clock.advance(100)
    page = browser.get("/").text
    assert "usually 1 min 00 s" in rows_of(page)[job.id]
    assert "longer than usual" not in page
    edge.clock.advance(300)
    assert "pendingGpu for much longer than usual" in rows_of(browser.get("/").text)[job.id]


def test_only_problems_leaves_out_what_is_well(edge: Any) -> None:
    ill, well, lost, over = edge.job(), edge.job(), edge.job(), edge.job()
    stall(edge, ill)
    with edge.store.transaction() as tx:
        final = Reason(code="dataset.refused", message="no image", retryable=False)
        record.stall(tx, lost.id, final, edge.clock())
        record.cancel(tx, over.id, edge.clock())
    browser = edge.page()
    assert set(rows_of(browser.get("/").text)) == {ill.id, well.id, lost.id, over.id}
    assert set(rows_of(browser.get("/?problems=1").text)) == {ill.id, lost.id}
    edge.clock.advance(25 * 3600)  # yesterday's failure is history
    with edge.store.transaction() as tx:
        tx.save_job(tx.job(well.id).evolve(entered_at=edge.clock()))
    assert lost.id not in rows_of(edge.page().get("/?problems=1").text)


def test_jobs_are_filtered_searched_and_paged(edge: Any) -> None:
    mine = [edge.job("ann", metadata={"order": f"A-{number}"}) for number in range(3)]
    other = edge.job("bob")
    stall(edge, other)
    browser = edge.page()

    def ids(query: str) -> set[str]:
        return set(rows_of(browser.get(f"/?{query}").text))

    assert ids("owner=ann") == {job.id for job in mine}
    assert ids("status=stalled") == {other.id}
    assert ids("q=a-1") == {mine[1].id}
    assert ids(f"q={mine[2].id}") == {mine[2].id}
    oldest, middle, newest = sorted(job.id for job in mine)
    assert ids(f"before={newest}&owner=ann") == {oldest, middle}
    assert ids("q=nothing") == set()
    assert "No job is like this" in browser.get("/?q=nothing").text
    for bad in ("status=lost", "before=%00", "before=a/b"):
        assert browser.get(f"/?{bad}").status_code == 422


def test_a_full_page_leads_to_the_next(edge: Any) -> None:
    jobs = [edge.job() for _ in range(fleet.ROWS + 2)]
    browser, seen, path = edge.page(), [], "/?owner=alice"
    while path:
        page = browser.get(path).text
        seen += rows_of(page)
        found = re.search(r'href="([^"]*)" rel="next"', page)
        path = found[1].replace("&amp;", "&") if found else ""
    assert seen == sorted((job.id for job in jobs), reverse=True)
    assert "Newest" in page


def test_what_customers_write_is_shown_as_text(edge: Any) -> None:
    job = edge.job(metadata={"note": XSS})
    stall(edge, job, message=XSS)
    page = edge.page().get(f"/?q={XSS}").text
    assert rows_of(page)
    assert XSS not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3


def test_buttons_do_what_they_say(edge: Any) -> None:
    job, browser = edge.job(), edge.page()
    edge.rent(job)
    stall(edge, job)
    assert browser.post(f"/jobs/{job.id}/retry").status_code == 400  # without its token
    answer = post(edge, browser, f"/jobs/{job.id}/retry", back="fleet")
    assert (answer.status_code, answer.location) == (303, "/")
    assert edge.stored(job.id).status is Status.PENDING_GPU
    assert edge.stored(job.id).attempt == 2
    post(edge, browser, f"/jobs/{job.id}/retry", back="fleet")  # a second click
    assert edge.stored(job.id).attempt == 2
    post(edge, browser, f"/jobs/{job.id}/cancel", back="fleet")
    assert edge.stored(job.id).status is Status.CANCELLED
    post(edge, browser, f"/jobs/{job.id}/retry", back="fleet")  # from a page that was older
    assert 'class="notice error"' in browser.get("/").text
    assert edge.stored(job.id).status is Status.CANCELLED
    assert post(edge, browser, "/jobs/job_unknown/cancel").status_code == 404


def test_renting_is_stopped_and_resumed(edge: Any) -> None:
    browser = edge.page()
    assert "Stop renting" in browser.get("/").text
    post(edge, browser, "/renting/stop")
    with edge.store.transaction() as tx:
        assert "operations said so" in brakes.switched_off(tx.beats(), False).message
    assert "Resume renting" in attention_of(browser.get("/").text)
    post(edge, browser, "/renting/resume")
    with edge.store.transaction() as tx:
        assert brakes.switched_off(tx.beats(), False) is None


def test_a_sweep_is_ordered(edge: Any) -> None:
    assert post(edge, edge.page(), "/sweep").status_code == 303
    assert edge.page().post("/sweep").status_code == 400


def test_parts_for_the_stream_are_what_changed_and_nothing_else(edge: Any) -> None:
    one, other = edge.job(), edge.job()
    view = View()

    def look() -> fleet.Look:
        with edge.store.transaction() as tx:
            return fleet.look(tx, view, edge.deps)

    def parts(before: fleet.Look | None, after: fleet.Look) -> str:
        with edge.app.test_request_context(), edge.store.transaction() as tx:
            return fleet.fragments(tx, before, after)

    first = look()
    edge.clock.advance(1)
    assert look().rows == first.rows  # time alone is no news
    everything = parts(None, first)
    assert all(f'id="{name}"' in everything for name in ("attention", "totals", "jobs"))
    assert "csrf" not in everything
    edge.rent(one)
    second = look()
    changed = parts(first, second)
    assert f'id="row-{one.id}"' in changed
    assert other.id not in changed
    edge.job()
    assert 'id="jobs"' in parts(second, look())


def test_a_machine_of_a_job_that_is_over_is_never_overlooked(edge: Any) -> None:
    job = edge.job()
    edge.rent(job)
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
        (lease,) = tx.leases_of(job.id)
        kept = lease.evolve(status=LeaseStatus.RENTED)
        tx.save_lease(kept)
    edge.clock.advance(timedelta(seconds=1).total_seconds())
    assert "is cancelled, and still has a machine" in attention_of(edge.page().get("/").text)
