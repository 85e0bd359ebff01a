"""What a job left behind, as its owner reads it: log, curves, checkpoints, samples, money."""

from __future__ import annotations

from datetime import timedelta

from gpu_agent.wire import Fact
from orchestrator.api import reads
from state import brakes, record
from state.events import Artefact
from state.job import Reason
from state.lease import LeaseStatus
from state.rehearsal import Rehearsal

READY = (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED)
SHA = "ab" * 32


def training(edge):
    agent = edge.agent()
    for fact in READY:
        assert agent.report(fact).status_code == 200
    return agent


def again(edge, job_id):
    """The job's next attempt, on another machine, as far as training."""
    with edge.store.transaction() as tx:
        record.stall(tx, job_id, Reason(code="host.lost", message="gone"), edge.clock())
        job = record.retry(tx, job_id, edge.clock.advance(60))
    agent = edge.agent(job, token=f"token-of-attempt-{job.attempt}")
    for fact in READY:
        assert agent.report(fact).status_code == 200
    return agent


def test_log_lines_are_read_in_pages_and_each_comes_once(edge, client, alice):
    agent = training(edge)
    for number in range(7):
        agent.report(Fact.LOG_LINES, lines=[f"line {number}a", f"line {number}b"])
        agent.report(Fact.HEARTBEAT)
    path, seen, after = f"/v1/jobs/{agent.spec.job}/logs", [], 0
    while True:
        page = client.get(path, query_string={"after": after, "limit": 3}, headers=alice).json
        reads.Logs.model_validate(page)
        assert len(page["data"]) <= 4
        seen += [line["text"] for line in page["data"]]
        after = page["next_after"]
        if not page["has_more"]:
            break
    assert seen == [f"line {number}{half}" for number in range(7) for half in "ab"]
    assert client.get(path, query_string={"after": after}, headers=alice).json["data"] == []


def test_a_log_of_nonsense_has_no_lines(edge, client, alice):
    agent = training(edge)
    for lines in ("no list", [1, None, {"text": "x"}], {}, None):
        agent.report(Fact.LOG_LINES, lines=lines)
    assert client.get(f"/v1/jobs/{agent.spec.job}/logs", headers=alice).json["data"] == []


def test_curves_are_named_and_drawn_across_attempts(edge, client, alice, problem):
    first = training(edge)
    path = f"/v1/jobs/{first.spec.job}/metrics"
    assert client.get(path, headers=alice).json == {"names": [], "series": []}
    first.report(Fact.TRAINING_PROGRESS, step=2, total=4, points=[[1, 0.9, 1e-4], [2, 0.8, 1e-4]])
    second = again(edge, first.spec.job)
    points = [[2, 0.7, 1e-4], [3, 0.6, 1e-4], {"step": 3, "validation_loss": 0.5}]
    second.report(Fact.TRAINING_PROGRESS, step=3, total=4, points=points)
    names = {item["name"]: item for item in client.get(path, headers=alice).json["names"]}
    assert set(names) == {"loss", "lr", "validation_loss"}
    assert names["loss"] == {"name": "loss", "points": 4, "step": 3, "value": 0.6}
    shown = client.get(f"{path}?name=loss&name=steps_per_s", headers=alice).json["series"]
    assert [(p["attempt"], p["step"], p["value"]) for p in shown[0]["points"]] == [
        (1, 1, 0.9), (1, 2, 0.8), (2, 2, 0.7), (2, 3, 0.6),
    ]  # fmt: skip
    assert (shown[0]["total"], shown[0]["thinned"]) == (4, False)
    assert shown[1] == {"name": "steps_per_s", "total": 0, "thinned": False, "points": []}
    fault = problem(client.get(f"{path}?name=lose", headers=alice), 422, "unknown_metric")
    assert "validation_loss" in fault["errors"][0]["detail"]


def test_a_long_curve_is_thinned_and_says_so(edge, client, alice):
    agent = training(edge)
    values = [0.5] * 3000
    values[1500] = 7.0
    rows = [[step, value, 1e-4] for step, value in enumerate(values, 1)]
    for start in range(0, 3000, 1000):
        agent.report(Fact.TRAINING_PROGRESS, step=start, points=rows[start : start + 1000])
    query = {"name": "loss", "max_points": 100}
    path = f"/v1/jobs/{agent.spec.job}/metrics"
    (loss,) = client.get(path, query_string=query, headers=alice).json["series"]
    assert (loss["total"], loss["thinned"]) == (3000, True)
    assert len(loss["points"]) <= 100
    assert (loss["points"][0]["step"], loss["points"][-1]["step"]) == (1, 3000)
    assert 7.0 in [point["value"] for point in loss["points"]]


def stored(name, size=7):
    return {"name": name, "bytes": size, "sha256": SHA}


def test_whole_checkpoints_are_listed_newest_first(edge, client, alice):
    agent = training(edge)
    for step, best in ((100, True), (200, False)):
        folder = f"checkpoints/{step}-abcdef"
        files = [stored(f"{folder}/state.pt", 1000), stored(f"{folder}/manifest.json")]
        agent.report(Fact.TRAINING_CHECKPOINT, step=step, best=best, files=files)
    # without its manifest no attempt goes on from it
    half = [stored("checkpoints/300-abcdef/state.pt")]
    agent.report(Fact.TRAINING_CHECKPOINT, step=300, best=False, files=half)
    found = client.get(f"/v1/jobs/{agent.spec.job}/checkpoints", headers=alice).json["data"]
    assert [(item["step"], item["best"], item["bytes"]) for item in found] == [
        (200, False, 1007), (100, True, 1007),
    ]  # fmt: skip
    assert not any(item["expired"] for item in found)


def sampled(agent, image, **more):
    said = {"step": 100, "prompt": "a photo of ohwx", "seed": 1, **stored(f"samples/{image}")}
    assert agent.report(Fact.TRAINING_SAMPLE, **{**said, **more}).status_code == 200


def test_samples_say_what_they_show_and_lead_to_their_image(edge, client, alice, problem):
    agent = training(edge)
    sampled(agent, "step-000100-0-1.png")
    path = f"/v1/jobs/{agent.spec.job}/samples"
    (shown,) = client.get(path, headers=alice).json["data"]
    assert (shown["prompt"], shown["step"], shown["seed"]) == ("a photo of ohwx", 100, 1)
    answer = client.get(shown["url"], headers=alice)
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith(
        f"https://s3.test/jobs/{agent.spec.job}/attempts/1/samples/step-000100-0-1.png?"
    )
    assert answer.headers["Cache-Control"] == "no-store"
    problem(client.get(f"{path}/step-000200-0-1.png", headers=alice), 404)
    problem(client.get(f"{path}/step-000100-0-1.png?attempt=2", headers=alice), 404)


def test_an_image_that_two_attempts_made_is_the_later_ones(edge, client, alice):
    first = training(edge)
    sampled(first, "step-000100-0-1.png")
    sampled(again(edge, first.spec.job), "step-000100-0-1.png")
    path = f"/v1/jobs/{first.spec.job}/samples"
    urls = [item["url"] for item in client.get(path, headers=alice).json["data"]]
    assert [url.partition("?")[2] for url in urls] == ["attempt=1", "attempt=2"]
    where = [
        client.get(url, headers=alice).headers["Location"]
        for url in (urls[0], f"{path}/step-000100-0-1.png")
    ]
    assert "/attempts/1/" in where[0]
    assert "/attempts/2/" in where[1]


def test_an_image_that_was_deleted_is_gone_unless_it_is_among_the_results(
    edge, client, alice, problem
):
    agent = training(edge)
    job_id = agent.spec.job
    for name in ("kept.png", "deleted.png"):
        sampled(agent, name)
    with edge.store.transaction() as tx:
        tx.save_attempt(tx.attempt(job_id, 1).evolve(cleared=True))
        kept = Artefact(
            job=job_id,
            name="samples/kept.png",
            attempt=1,
            key=f"jobs/{job_id}/result/samples/kept.png",
            bytes=7,
            sha256=SHA,
            created_at=edge.clock(),
            verified=True,
        )
        tx.put_artefacts([kept])
    listed = client.get(f"/v1/jobs/{job_id}/samples", headers=alice).json["data"]
    assert {item["name"]: item["expired"] for item in listed} == {
        "kept.png": False,
        "deleted.png": True,
    }
    where = client.get(f"/v1/jobs/{job_id}/samples/kept.png", headers=alice).headers["Location"]
    assert "/result/samples/kept.png" in where
    gone = client.get(f"/v1/jobs/{job_id}/samples/deleted.png", headers=alice)
    problem(gone, 410, "expired")


def test_a_sample_that_no_agent_of_ours_reports_is_none(edge, client, alice):
    agent = training(edge)
    for name in ("../../etc/passwd", "lora.safetensors"):
        sampled(agent, "a.png", name=name)
    sampled(agent, "a.png", bytes="7")
    sampled(agent, "a.png", sha256="x")
    assert client.get(f"/v1/jobs/{agent.spec.job}/samples", headers=alice).json["data"] == []


def test_the_receipt_counts_each_machine_and_says_who_counted(edge, client, alice):
    first = training(edge)
    edge.clock.advance(1800)
    again(edge, first.spec.job)
    edge.clock.advance(3600)
    with edge.store.transaction() as tx:
        old, _ = tx.leases_of(first.spec.job)
        gone = edge.clock() - timedelta(minutes=59)
        settled = {"cost": 190_000, "billed": 200_000, "due_at": None}
        released = old.to(LeaseStatus.RELEASED, released_at=gone, ended_at=gone, **settled)
        tx.save_lease(released)
    shown = client.get(f"/v1/jobs/{first.spec.job}/cost", headers=alice).json
    reads.JobCost.model_validate(shown)
    old, new = shown["machines"]
    assert (old["status"], old["billed"], old["settled"], old["counts"]) == (
        "released", 200_000, True, 200_000,
    )  # fmt: skip
    assert old["at_most"] is None
    assert new["counts"] == new["counted"]["total"] == 360_000
    assert new["at_most"] > new["counts"]
    assert shown["so_far"] == 560_000
    assert shown["left"] == 5_000_000 - 560_000
    assert shown["per_hour"] == 360_000
    assert shown["display"]["so_far"] == "$0.5600"
    assert shown["quoted"] is None


def test_a_job_is_explained_from_order_to_end(edge, client, alice):
    job = edge.job()
    path = f"/v1/jobs/{job.id}/explain"

    def explained():
        answer = client.get(path, headers=alice)
        assert answer.status_code == 200, answer.text
        reads.Explanation.model_validate(answer.json)
        return answer.json

    with edge.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="a drill", now=edge.clock())
    held = explained()
    assert (held["waits_for"], held["brakes"][0]["code"]) == ("brake", "kill_switch.on")
    with edge.store.transaction() as tx:
        brakes.switch(tx, stopped=False, why="", now=edge.clock())
    assert explained()["waits_for"] == "offer"
    agent = edge.agent(job)
    for fact in READY:
        agent.report(fact)
    agent.report(Fact.TRAINING_PROGRESS, step=4, total=9)
    edge.clock.advance(20)
    runs = explained()
    assert (runs["waits_for"], runs["headline"]) == ("training", "It trains: step 4/9.")
    assert runs["sentences"][0] == runs["headline"]
    heard = {item["name"]: item for item in runs["signals"]}["agent"]
    assert (heard["age_s"], heard["well"]) == (20.0, True)
    assert [item["at"] for item in runs["deadlines"]] == sorted(
        item["at"] for item in runs["deadlines"]
    )
    paths = {item["name"]: (item["method"], item["path"]) for item in runs["options"]}
    assert paths["cancel"] == ("POST", f"/v1/jobs/{job.id}/cancel")
    assert client.post(paths["cancel"][1], headers=alice).status_code == 202
    over = explained()
    assert (over["waits_for"], over["deadlines"]) == ("nothing", [])


def test_a_rehearsal_is_held_by_no_brake_of_real_machines(edge, client):
    with edge.store.transaction() as tx:
        brakes.switch(tx, stopped=True, why="a drill", now=edge.clock())
    real, rehearsed = edge.job(), edge.job(rehearsal=Rehearsal())
    operator = edge.key("op", "operator")
    waits = [
        client.get(f"/v1/jobs/{job.id}/explain", headers=operator).json["waits_for"]
        for job in (real, rehearsed)
    ]
    assert waits == ["brake", "offer"]


def test_what_others_left_behind_is_not_there(edge, client, problem):
    job = edge.job("alice")
    bob, operator = edge.key("bob"), edge.key("op", "operator")
    for what in ("logs", "metrics", "checkpoints", "samples", "samples/a.png", "cost", "explain"):
        problem(client.get(f"/v1/jobs/{job.id}/{what}", headers=bob), 404)
        problem(client.get(f"/v1/jobs/{job.id}/{what}"), 401)
    assert client.get(f"/v1/jobs/{job.id}/cost", headers=operator).status_code == 200


def test_a_question_that_is_not_understood_is_refused(edge, client, alice, problem):
    job = edge.job()
    for query in (
        "logs?limit=0",
        "logs?after=-1",
        "logs?until=3",
        "metrics?max_points=1",
        "metrics?nam=loss",
    ):
        problem(client.get(f"/v1/jobs/{job.id}/{query}", headers=alice), 422)
