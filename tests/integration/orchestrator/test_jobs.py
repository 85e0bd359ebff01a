"""Ordering trainings, watching them, changing their course."""

from __future__ import annotations

import threading

import pytest

from gpu_agent.wire import Fact
from orchestrator.api import schemas
from state import record
from state.events import Artefact, DatasetStatus, Delivery
from state.job import Reason

#: What is refused before any database is asked needs none.
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)


def order(edge, owner="alice", **more):
    return {"dataset_id": edge.dataset(owner).id, "base": "civitai:12345", **more}


def test_a_job_is_ordered_and_shown(edge, client, alice, soon):
    body = order(edge, recipe={"steps": 200}, metadata={"user": "7"})
    answer = client.post("/v1/jobs", json=body, headers=alice)
    assert answer.status_code == 202
    job = answer.json
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "pendingGpu"
    assert job["recipe"]["steps"] == 200
    assert job["recipe"]["rank"] == 16, "what was not said is shown with its default"
    assert job["metadata"] == {"user": "7"}
    assert job["cost"]["cap"] == 5_000_000
    assert [(step["source"], step["target"]) for step in job["transitions"]] == [
        ("pending", "pendingGpu")
    ]
    shown = client.get(f"/v1/jobs/{job['id']}", headers=alice).json
    assert {**shown, "webhook_secret": None} == job
    soon(lambda: ("allocate", job["id"]) in edge.woken)


def test_an_order_asks_for_no_gpu_that_is_too_small_for_its_model(edge, client, alice):
    small = {"min_vram_gb": 12.0, "disk_gb": 40.0}
    body = order(edge, base_family="flux", gpu=small)
    job = client.post("/v1/jobs", json=body, headers=alice).json
    assert job["gpu"]["min_vram_gb"] > 16, "a 12 GB card would be paid for and be of no use"
    assert job["gpu"]["disk_gb"] > 40
    body = order(edge, base_family="sd1", gpu=small)
    assert client.post("/v1/jobs", json=body, headers=alice).json["gpu"]["min_vram_gb"] == 12.0


def test_an_order_may_say_how_its_model_fits_a_small_gpu(edge, client, alice):
    recipe = {"base_precision": "nf4", "resolution": 512}
    body = order(edge, base_family="sdxl", gpu={"min_vram_gb": 6.0}, recipe=recipe)
    named = {**body, "gpu": {"min_vram_gb": 6.0, "gpu_names": ["RTX 3060"]}}
    assert client.post("/v1/jobs", json=named, headers=alice).status_code == 202
    whole = {**recipe, "base_precision": "same", "gradient_checkpointing": "off"}
    usual = client.post("/v1/jobs", json={**body, "recipe": whole}, headers=alice).json
    rounded = client.post("/v1/jobs", json=body, headers=alice).json
    assert rounded["gpu"]["min_vram_gb"] < usual["gpu"]["min_vram_gb"]


def test_an_order_for_gpus_that_are_all_too_small_is_refused(edge, client, alice, problem):
    gpu = {"gpu_names": ["RTX 3060"]}
    body = order(edge, base_family="flux", gpu=gpu)
    (fault,) = problem(client.post("/v1/jobs", json=body, headers=alice), 422)["errors"]
    assert fault["pointer"] == "/gpu/gpu_names"
    assert "12.288 GB" in fault["detail"]
    gpu["gpu_names"].append("RTX 4090")
    assert client.post("/v1/jobs", json=body, headers=alice).status_code == 202


def test_a_job_may_be_ordered_before_its_images_are_there(edge, client, alice):
    dataset = edge.dataset(status=DatasetStatus.OPEN)
    answer = client.post(
        "/v1/jobs", json={"dataset_id": dataset.id, "base": "hf:owner/repo"}, headers=alice
    )
    assert answer.json["status"] == "pending"


def test_a_job_for_a_refused_dataset_is_refused(edge, client, alice, problem):
    dataset = edge.dataset(status=DatasetStatus.REFUSED)
    body = {"dataset_id": dataset.id, "base": "civitai:1"}
    problem(client.post("/v1/jobs", json=body, headers=alice), 409, "conflict")


@pytest.mark.parametrize("whose", ["nobody", "bob", "nonsense"])
def test_a_job_for_an_unknown_dataset_is_refused(edge, client, alice, problem, whose):
    known = {"nobody": "ds_nothing", "bob": edge.dataset("bob").id, "nonsense": "../\x00"}
    body = {"dataset_id": known[whose], "base": "civitai:1"}
    answer = problem(client.post("/v1/jobs", json=body, headers=alice), 422, "unknown_dataset")
    assert answer["errors"][0]["pointer"] == "/dataset_id"


@without_database
@pytest.mark.parametrize(
    ("more", "pointer"),
    [
        ({"recipe": {"rank": 0}}, "/recipe/rank"),
        ({"recipe": {"steps": -1}}, "/recipe/steps"),
        ({"recipe": {"stepps": 10}}, "/recipe/stepps"),
        ({"recipe": {"a/b~c": 1}}, "/recipe/a~1b~0c"),
        ({"recipe": {"learning_rate": 1e400}}, "/recipe/learning_rate"),
        ({"recipe": []}, "/recipe"),
        ({"base": "12345"}, "/base"),
        ({"base": "civitai:abc"}, "/base"),
        ({"base": "hf:../../etc"}, "/base"),
        ({"base": "s3:../secrets"}, "/base"),
        ({"base": "s3:jobs/job_1/result/weights.safetensors"}, "/base"),
        ({"base": "http://models.example/x.safetensors"}, "/base"),
        ({"base": "file:///etc/passwd"}, "/base"),
        ({"base": "https://"}, "/base"),
        ({"webhook": {"url": "http://example.com"}}, "/webhook/url"),
        ({"webhook": {"url": "https://user:pass@example.com"}}, "/webhook/url"),
        ({"webhook": {"url": "https://[::1"}}, "/webhook/url"),
        ({"webhook": {"url": "https://example.com", "secret": "whsec_AAAA"}}, "/webhook/secret"),
        ({"webhook": {"url": "https://example.com", "secret": "mine"}}, "/webhook/secret"),
        ({"webhook": {}}, "/webhook/url"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "/metadata"),
        ({"metadata": {"a": "\x00"}}, "/metadata/a"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
        ({"max_cost": 0}, "/max_cost"),
        ({"max_cost": 1.5}, "/max_cost"),
        ({"max_attempts": 11}, "/max_attempts"),
        ({"gpu": {"min_vram_gb": "24"}}, "/gpu/min_vram_gb"),
        ({"gpu": {"vram": 24}}, "/gpu/vram"),
        ({"method": "magic"}, "/method"),
        ({"sttatus": "x"}, "/sttatus"),
    ],
)
def test_a_faulty_order_is_refused_and_names_the_fault(edge, client, alice, problem, more, pointer):
    answer = client.post("/v1/jobs", json={**order(edge), **more}, headers=alice)
    faults = problem(answer, 422)["errors"]
    assert any(fault["pointer"].startswith(pointer) for fault in faults), faults
    assert client.get("/v1/jobs", headers=alice).json["data"] == []


def test_a_webhook_secret_is_made_and_shown_once(edge, client, alice):
    body = order(edge, webhook={"url": "https://example.com/hook"})
    made = client.post("/v1/jobs", json=body, headers=alice)
    assert made.json["webhook_secret"].startswith("whsec_")
    assert made.headers["Cache-Control"] == "no-store"
    shown = client.get(f"/v1/jobs/{made.json['id']}", headers=alice)
    assert made.json["webhook_secret"] not in shown.text
    with edge.store.transaction() as tx:
        kept = [item.reveal() for item in tx.webhook_secrets(made.json["id"])]
    assert kept == [made.json["webhook_secret"]]


# --- Idempotency-Key ---


def test_the_same_key_answers_the_same_job_with_its_secret(edge, client, alice):
    body = order(edge, webhook={"url": "https://example.com/hook"})
    headers = {**alice, "Idempotency-Key": "order-1"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    edge.clock.advance(3600)
    second = client.post("/v1/jobs", json=body, headers=headers)
    assert second.status_code == 202
    assert second.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert second.json == first.json
    assert len(client.get("/v1/jobs", headers=alice).json["data"]) == 1


def test_a_key_with_another_body_is_refused(edge, client, alice, problem):
    headers = {**alice, "Idempotency-Key": "order-1"}
    client.post("/v1/jobs", json=order(edge), headers=headers)
    again = client.post("/v1/jobs", json=order(edge, max_cost=1), headers=headers)
    problem(again, 422, "idempotency_key_reused")


def test_two_customers_may_use_the_same_key(edge, client, alice):
    key = {"Idempotency-Key": "order-1"}
    first = client.post("/v1/jobs", json=order(edge), headers={**alice, **key})
    bob = edge.key("bob")
    second = client.post("/v1/jobs", json=order(edge, "bob"), headers={**bob, **key})
    assert second.status_code == 202
    assert first.json["id"] != second.json["id"]


def test_a_refused_order_does_not_use_up_its_key(edge, client, alice):
    headers = {**alice, "Idempotency-Key": "order-1"}
    bad = {"dataset_id": "ds_nothing", "base": "civitai:1"}
    assert client.post("/v1/jobs", json=bad, headers=headers).status_code == 422
    assert client.post("/v1/jobs", json=order(edge), headers=headers).status_code == 202


def test_twenty_parallel_orders_with_one_key_are_one_job(edge, alice):
    body, headers = order(edge), {**alice, "Idempotency-Key": "order-1"}
    answers = []

    def send():
        answers.append(edge.client().post("/v1/jobs", json=body, headers=headers))

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len(edge.client().get("/v1/jobs", headers=alice).json["data"]) == 1


@without_database
@pytest.mark.parametrize("key", ["", "x" * 256, "with space"])
def test_a_nonsense_key_is_refused(edge, client, alice, problem, key):
    headers = {**alice, "Idempotency-Key": key}
    problem(client.post("/v1/jobs", json=order(edge), headers=headers), 422)


# --- watching ---


def test_pages_hold_every_job_once_newest_first(edge, client, alice):
    made = []
    for _ in range(5):
        made.append(edge.job().id)
        edge.clock.advance(1)
    edge.job("bob")
    seen, cursor = [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = client.get("/v1/jobs", query_string=query, headers=alice).json
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if not page["has_more"]:
            break
    assert seen == made[::-1]
    assert cursor is None


def test_jobs_are_found_by_status_and_metadata(edge, client, alice):
    red = edge.job(metadata={"team": "red"})
    edge.job(metadata={"team": "blue"})
    gone = edge.job()
    with edge.store.transaction() as tx:
        record.cancel(tx, gone.id, edge.clock())

    def found(**query):
        page = client.get("/v1/jobs", query_string=query, headers=alice).json
        return [job["id"] for job in page["data"]]

    assert found(**{"metadata[team]": "red"}) == [red.id]
    assert len(found(status="cancelled")) == 1
    assert len(found(status=["cancelled", "pendingGpu"])) == 3
    assert found(status="training") == []


@without_database
@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=x",
        "status=done",
        "cursor=%00",
        "colour=red",
        "metadata[]=x",
        "metadata[a]=%00",
    ],
)
def test_a_query_that_is_not_understood_is_refused(client, alice, problem, query):
    problem(client.get(f"/v1/jobs?{query}", headers=alice), 422)


def test_an_unchanged_job_costs_a_304(edge, client, alice):
    job = edge.job()
    first = client.get(f"/v1/jobs/{job.id}", headers=alice)
    headers = {**alice, "If-None-Match": first.headers["ETag"]}
    again = client.get(f"/v1/jobs/{job.id}", headers=headers)
    assert (again.status_code, again.data) == (304, b"")
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    changed = client.get(f"/v1/jobs/{job.id}", headers=headers)
    assert changed.status_code == 200
    assert changed.json["status"] == "cancelled"


def test_a_long_poll_answers_when_the_job_changes(edge, client, alice):
    job = edge.job()

    def cancel_after_two_looks(seconds):
        edge.clock.advance(seconds)
        looks.append(seconds)
        if len(looks) == 2:
            with edge.store.transaction() as tx:
                record.cancel(tx, job.id, edge.clock())

    looks = []
    object.__setattr__(edge.deps, "pause", cancel_after_two_looks)
    answer = client.get(f"/v1/jobs/{job.id}?wait=30", headers=alice)
    assert answer.json["status"] == "cancelled"
    assert len(looks) == 2


def test_a_long_poll_ends_without_news_too(edge, client, alice, problem):
    job = edge.job()
    tag = client.get(f"/v1/jobs/{job.id}", headers=alice).headers["ETag"]
    began = edge.clock()
    headers = {**alice, "If-None-Match": tag}
    assert client.get(f"/v1/jobs/{job.id}?wait=5", headers=headers).status_code == 304
    assert (edge.clock() - began).total_seconds() == 5
    problem(client.get(f"/v1/jobs/{job.id}?wait=31", headers=alice), 422)


def test_a_running_job_shows_its_machine_cost_progress_and_states(edge, client, alice):
    agent = edge.agent()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        assert agent.report(fact).status_code == 200
    agent.report(Fact.TRAINING_PROGRESS, step=10, total=100, loss=0.5)
    edge.clock.advance(3600)
    job = client.get(f"/v1/jobs/{agent.spec.job}", headers=alice).json
    schemas.Job.model_validate(job)
    assert job["status"] == "training"
    assert job["host"] == {"machine_id": "m1", "gpu": "RTX 4090", "geo": "NO"}
    assert job["cost"]["so_far"] == job["cost"]["quoted_per_hour"] == 360_000
    assert job["cost"]["display"] == "$0.3600"
    assert job["progress"]["training"]["step"] == 10
    assert [job["progress"][key] for key in ("step", "total", "loss")] == [10, 100, 0.5]
    assert (job["cost"]["cap_display"], job["cost"]["quoted"]) == ("$5.00", None)
    assert [step["target"] for step in job["transitions"]] == [
        "pendingGpu", "pendingImages", "pendingModel", "training",
    ]  # fmt: skip
    events = client.get(f"/v1/jobs/{agent.spec.job}/events", headers=alice).json
    assert [item["seq"] for item in events["data"]] == list(range(1, len(events["data"]) + 1))
    attempts = client.get(f"/v1/jobs/{agent.spec.job}/attempts", headers=alice).json["data"]
    assert attempts[0]["leases"][0]["gpu"] == "RTX 4090"


def test_a_jobs_curves_are_the_points_of_its_events(edge, client, alice):
    agent = edge.agent()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        agent.report(fact)
    steps = [[1, 0.5, 1e-4, 0.2], [2, 0.4, 1e-4, 0.1], {"step": 2, "memory_mib": 900}]
    validation = [{"step": 2, "validation_loss": 0.3, "validation_levels": [[0.125, 0.6, 0.01]]}]
    agent.report(Fact.TRAINING_PROGRESS, step=2, total=4, points=steps)
    agent.report(Fact.TRAINING_PROGRESS, validation_loss=0.3, points=validation)
    events = client.get(f"/v1/jobs/{agent.spec.job}/events", headers=alice).json["data"]
    assert [point for event in events for point in event["data"].get("points", [])] == [
        *steps,
        *validation,
    ]
    training = client.get(f"/v1/jobs/{agent.spec.job}", headers=alice).json["progress"]["training"]
    assert training["validation_loss"] == 0.3
    assert "points" not in training


def test_events_are_read_in_pages(edge, client, alice):
    agent = edge.agent()
    for _ in range(5):
        agent.report(Fact.HEARTBEAT)
    path = f"/v1/jobs/{agent.spec.job}/events"
    seen, after = [], 0
    while True:
        page = client.get(path, query_string={"after": after, "limit": 3}, headers=alice).json
        seen += [item["seq"] for item in page["data"]]
        after = page["next_after"]
        if not page["has_more"]:
            break
    assert seen == list(range(1, len(edge.events(agent.spec.job)) + 1))


def test_secrets_of_the_agent_are_in_no_public_answer(edge, client, alice):
    agent = edge.agent()
    agent.report(Fact.GPU_READY)
    for part in ("", "/events", "/attempts", "/artifacts", "/deliveries"):
        text = client.get(f"/v1/jobs/{agent.spec.job}{part}", headers=alice).text
        assert agent.spec.secret not in text
        assert "token_hash" not in text


# --- changing its course ---


def test_cancelling_is_final_and_twice_is_harmless(edge, client, alice, problem):
    job = edge.job()
    for _ in range(2):
        answer = client.post(f"/v1/jobs/{job.id}/cancel", headers=alice)
        assert answer.status_code == 202
        assert answer.json["status"] == "cancelled"
    problem(client.post(f"/v1/jobs/{job.id}/retry", headers=alice), 409, "illegal_move")


def test_bids_and_hedging_are_a_choice_of_each_job(edge, client, alice):
    usual = client.post("/v1/jobs", json=order(edge), headers=alice).json
    assert (usual["interruptible"], usual["hedge"], usual["interruptions"]) == (False, True, 0)
    body = order(edge, interruptible=True, hedge=False)
    chosen = client.post("/v1/jobs", json=body, headers=alice).json
    assert (chosen["interruptible"], chosen["hedge"]) == (True, False)
    stored = edge.stored(chosen["id"]).request
    assert (stored.interruptible, stored.hedge) == (True, False)


def test_a_stalled_job_says_where_why_whether_and_when(edge, client, alice):
    agent = edge.agent()
    agent.report(Fact.GPU_READY)
    edge.clock.advance(5)
    agent.report(Fact.IMAGES_PROGRESS, bytes=400, bytes_total=1234, moved=400)
    job_id = agent.spec.job
    message = "no byte of the dataset for 50 s at byte 400/1234"
    with edge.store.transaction() as tx:
        reason = Reason(code="pendingImages.frozen", message=message)
        record.stall(tx, job_id, reason, edge.clock.advance(50))
    shown = client.get(f"/v1/jobs/{job_id}", headers=alice).json
    assert shown["stalled_from"] == "pendingImages"
    assert shown["reason"] == {"code": reason.code, "message": message, "retryable": True}
    assert shown["retry_at"] > shown["entered_at"]
    assert shown["transitions"][-1]["reason"] == shown["reason"]
    assert shown["progress"]["images"] == {"bytes": 400, "bytes_total": 1234}
    assert "bytes" not in shown["progress"]  # nothing comes any more


def test_a_stalled_job_can_be_retried_at_once(edge, client, alice, problem, soon):
    job = edge.job()
    problem(client.post(f"/v1/jobs/{job.id}/retry", headers=alice), 409, "illegal_move")
    with edge.store.transaction() as tx:
        record.stall(tx, job.id, Reason(code="gpu.lost", message="gone"), edge.clock())
    shown = client.get(f"/v1/jobs/{job.id}", headers=alice).json
    assert (shown["status"], shown["stalled_from"]) == ("stalled", "pendingGpu")
    assert shown["reason"]["code"] == "gpu.lost"
    answer = client.post(f"/v1/jobs/{job.id}/retry", headers=alice)
    assert (answer.status_code, answer.json["status"]) == (202, "pendingGpu")
    assert answer.json["attempt"] == 2
    # whoever lost that answer asks again
    again = client.post(f"/v1/jobs/{job.id}/retry", headers=alice)
    assert (again.status_code, again.json["attempt"]) == (202, 2)
    soon(lambda: ("allocate", job.id) in edge.woken)


def test_orders_ride_on_the_answer_to_the_agents_next_report(edge, client, alice, problem):
    agent = edge.agent()
    path = f"/v1/jobs/{agent.spec.job}"
    problem(client.post(f"{path}/checkpoint", headers=alice), 409)
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        agent.report(fact)
    assert client.post(f"{path}/checkpoint", headers=alice).status_code == 202
    assert client.post(f"{path}/sample", headers=alice).status_code == 202
    assert agent.report(Fact.HEARTBEAT).json == {"orders": ["checkpoint_now", "sample_now"]}
    assert agent.report(Fact.HEARTBEAT).json == {"orders": []}


def test_another_customers_job_is_not_there(edge, client, problem):
    job, bob = edge.job("alice"), edge.key("bob")
    path = f"/v1/jobs/{job.id}"
    for part in ("", "/events", "/attempts", "/artifacts", "/artifacts/x", "/deliveries"):
        problem(client.get(path + part, headers=bob), 404, "not_found")
    for part in ("/cancel", "/retry", "/checkpoint", "/sample"):
        problem(client.post(path + part, headers=bob), 404, "not_found")
    assert client.get("/v1/jobs", headers=bob).json["data"] == []
    assert edge.stored(job.id).status == "pendingGpu"
    operator = edge.key("ops", "operator")
    assert client.get(path, headers=operator).status_code == 200
    assert len(client.get("/v1/jobs", headers=operator).json["data"]) == 1


@pytest.mark.parametrize("name", ["job_x", "%00", "..", "x" * 500, "%ff", "'; drop table jobs"])
def test_a_nonsense_id_is_not_found(client, alice, problem, name):
    problem(client.get(f"/v1/jobs/{name}", headers=alice), 404)


# --- files ---


def artefact(edge, job, **changes):
    row = {
        "job": job.id,
        "name": "weights.safetensors",
        "attempt": 1,
        "key": f"jobs/{job.id}/result/weights.safetensors",
        "bytes": 10,
        "sha256": "ab" * 32,
        "created_at": edge.clock(),
        "verified": True,
        **changes,
    }
    with edge.store.transaction() as tx:
        tx.put_artefacts([Artefact(**row)])


def test_a_file_is_listed_and_downloaded_by_a_short_lived_url(edge, client, alice):
    job = edge.job()
    artefact(edge, job)
    listed = client.get(f"/v1/jobs/{job.id}/artifacts", headers=alice).json["data"]
    assert (listed[0]["bytes"], listed[0]["sha256"]) == (10, "ab" * 32)
    answer = client.get(listed[0]["url"], headers=alice)
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith(
        f"https://s3.test/jobs/{job.id}/result/weights.safetensors?X-Amz-Signature="
    )


def test_a_file_that_is_not_there_says_why(edge, client, alice, problem):
    job = edge.job()
    path = f"/v1/jobs/{job.id}/artifacts/weights.safetensors"
    problem(client.get(path, headers=alice), 409, "not_ready")
    artefact(edge, job, verified=False)
    problem(client.get(path, headers=alice), 409, "not_ready")
    artefact(edge, job, expired=True)
    problem(client.get(path, headers=alice), 410, "expired")
    with edge.store.transaction() as tx:
        record.cancel(tx, job.id, edge.clock())
    problem(client.get(f"/v1/jobs/{job.id}/artifacts/other", headers=alice), 404, "not_found")


def test_deliveries_show_each_try(edge, client, alice):
    job = edge.job(webhook_url="https://example.com/hook")
    with edge.store.transaction() as tx:
        owed = tx.list_outgoing(job.id)
        tx.log_delivery(
            Delivery(outgoing=owed[0].id, job=job.id, tried_at=edge.clock(), answer=500, took_ms=12)
        )
    shown = client.get(f"/v1/jobs/{job.id}/deliveries", headers=alice).json["data"]
    assert [item["type"] for item in shown] == ["job.pending_gpu"]
    assert shown[0]["tries"][0]["answer"] == 500
