"""The agent's door: its own file, hello, fresh URLs."""

from __future__ import annotations

import hashlib
import threading

import pytest

from gpu_agent import wire
from gpu_agent.recipe import Recipe
from gpu_agent.wire import Fact
from state import record
from state.errors import StokerError
from state.job import Reason, Status
from state.lease import LeaseStatus

#: What is refused before any database is asked needs none.
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)


class NeverThere(StokerError):
    """As the resolver of base models says: no later try will help."""

    retryable = False


class NotNow(StokerError):
    retryable = True


def test_the_agents_file_is_served_and_named_by_its_hash(edge, client):
    answer = client.get("/agent/v1/gpu_agent.pyz")
    assert answer.data == edge.deps.bundle.bytes
    assert answer.headers["ETag"].strip('"') == hashlib.sha256(answer.data).hexdigest()


def test_hello_gives_a_job_and_nothing_that_outlives_it(edge):
    job = edge.job()
    edge.rent(job)
    answer = edge.hello()
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    spec = wire.JobSpec.from_bytes(answer.data)
    assert (spec.job, spec.attempt, spec.method) == (job.id, 1, "lora")
    assert spec.base.url.startswith("https://models.test/")
    assert (spec.dataset.bytes, spec.dataset.sha256) == (1234, "cd" * 32)
    assert spec.report_url == f"https://stoker.test/agent/v1/jobs/{job.id}/attempts/1/reports"
    assert spec.files_url == f"https://stoker.test/agent/v1/jobs/{job.id}/attempts/1/files"
    assert spec.lease_ends_at == edge.clock().timestamp() + 12 * 3600
    assert Recipe.from_dict(spec.recipe) == Recipe()
    wire.secret_key(spec.secret)
    assert "agent.hello" in edge.events(job.id)


def test_a_base_of_many_files_is_told_whole_and_each_can_be_asked_for_again(edge):
    part = wire.Download(url="https://cdn.test/v?sig=1", name="vae/config.json", bytes=2)
    edge.base_parts = (part,)
    agent = edge.agent()
    assert agent.spec.base_parts == (part,)
    answer = agent.files({"get": ["base/vae/config.json", "base/nothing.json"]})
    assert set(answer.get_json()["get"]) == {"base/vae/config.json"}


def test_a_lost_answer_is_given_again(edge):
    edge.rent(edge.job())
    first = wire.JobSpec.from_bytes(edge.hello().data)
    edge.clock.advance(59)
    assert wire.JobSpec.from_bytes(edge.hello().data).secret == first.secret
    edge.clock.advance(2)
    assert edge.hello().status_code == 401


def test_a_second_party_with_the_token_is_refused_and_the_token_revoked(edge, problem):
    job = edge.job()
    edge.rent(job)
    assert edge.hello(nonce="nonce-one").status_code == 200
    problem(edge.hello(nonce="nonce-two"), 401, "bad_token")
    assert edge.events(job.id).count("agent.token_reused") == 1
    problem(edge.hello(nonce="nonce-one"), 401, "bad_token")
    problem(edge.hello(nonce="nonce-two"), 401, "bad_token")
    assert edge.events(job.id).count("agent.token_reused") == 1
    seqs = edge.stored(job.id).seq
    assert seqs == len(edge.events(job.id)), "the job's events still count without gaps"


def test_two_hellos_at_once_with_other_nonces_let_one_in(edge):
    edge.rent(edge.job())
    answers = []

    def say(nonce):
        answers.append(edge.hello(nonce=nonce).status_code)

    threads = [threading.Thread(target=say, args=(f"nonce-{i:04}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [401] * 7


def test_an_expired_or_unknown_token_is_refused_in_the_same_words(edge, problem):
    edge.rent(edge.job())
    unknown = problem(edge.hello("another"), 401)
    edge.clock.advance(30 * 60)
    expired = problem(edge.hello(), 401)
    assert unknown["detail"] == expired["detail"]


@pytest.mark.parametrize("why", ["cancelled", "older attempt", "another machine was first"])
def test_a_hello_for_what_is_over_is_told_to_stop(edge, problem, why):
    job = edge.job()
    edge.rent(job)
    if why == "another machine was first":
        edge.rent(job, token="of the other", hedge=True)
        assert edge.hello("of the other").status_code == 200
    with edge.store.transaction() as tx:
        if why == "cancelled":
            record.cancel(tx, job.id, edge.clock())
        if why == "older attempt":
            record.stall(tx, job.id, Reason(code="gpu.lost", message="gone"), edge.clock())
            record.retry(tx, job.id, edge.clock())
    answer = edge.hello()
    problem(answer, 410, "stale_attempt")
    assert wire.orders_from_bytes(answer.data) == [wire.Order.STOP]


def test_what_a_machine_is_stands_in_the_jobs_history(edge):
    job = edge.job()
    edge.rent(job)
    machine = {
        "gpu_name": "NVIDIA GeForce RTX 4090",
        "gpus": 1,
        "vram_mb": 24564,
        "driver": "570.86.10",
        "cuda": "12.8",
        "disk_free_gb": 38.5,
        "instance": "4711",
    }
    assert edge.hello(machine={**machine, "colour": "blue"}).status_code == 200
    with edge.store.transaction() as tx:
        (event,) = tx.events(job.id, type="agent.hello")
    assert event.data["machine"] == {**machine, "cuda": 12.8}


def test_a_machine_that_is_not_what_was_rented_goes_and_costs_no_attempt(edge, problem):
    job = edge.job()
    edge.rent(job)
    answer = edge.hello(machine={"gpu_name": "NVIDIA GeForce RTX 3060", "gpus": 1})
    problem(answer, 410, "stale_attempt")
    assert wire.orders_from_bytes(answer.data) == [wire.Order.STOP]
    stored = edge.stored(job.id)
    assert (stored.status, stored.attempt) == (Status.PENDING_GPU, 1)
    assert stored.excluded_machines == ("m1",)
    with edge.store.transaction() as tx:
        (event,) = tx.events(job.id, type="machine.failed")
        (lease,) = tx.leases_of(job.id)
        host = tx.host("m1")
    assert event.data["reason"]["code"] == "host.lied"
    assert "RTX 3060 and no RTX 4090" in event.data["reason"]["message"]
    assert lease.status is LeaseStatus.RELEASING
    assert (host.lies, host.bad) == (1, 1)
    problem(edge.hello(), 410, "stale_attempt")


@without_database
@pytest.mark.parametrize(
    "machine",
    [
        [],
        "RTX 4090",
        {"gpus": "1"},
        {"gpus": -1},
        {"gpus": True},
        {"vram_mb": 2**70},
        {"vram_mb": 1.5},
        {"gpu_name": "x" * 101},
        {"gpu_name": "a\x00b"},
        {"cuda": "twelve"},
        {"cuda": [12]},
        {"disk_free_gb": "much"},
        {"disk_free_gb": -1},
        {"driver": 550},
    ],
    ids=repr,
)
def test_a_machine_that_cannot_be_understood_is_refused_and_nothing_happens(edge, problem, machine):
    job = edge.job()
    edge.rent(job)
    problem(edge.hello(machine=machine), 422, "invalid")
    assert edge.stored(job.id) == job
    assert edge.hello().status_code == 200


@without_database
@pytest.mark.parametrize(("max_attempts", "least"), [(2, 25.0), (1, 0.0)])
def test_a_slow_line_is_refused_except_on_the_last_try(edge, max_attempts, least):
    edge.rent(edge.job(max_attempts=max_attempts))
    assert wire.JobSpec.from_bytes(edge.hello().data).min_download_mbps == least


@without_database
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"token": "bootstrap-token-of-the-test", "nonce": "nonce-one"}',
        b'{"token": 1, "nonce": "nonce-one", "version": 1}',
        b'{"token": "", "nonce": "nonce-one", "version": 1}',
        b'{"token": "t", "nonce": "short", "version": 1}',
        b'{"token": "t", "nonce": "nonce\\u0000one", "version": 1}',
        b'{"token": "t", "nonce": "nonce-one", "version": 99}',
        b'{"token": "t", "nonce": "nonce-one", "version": true}',
    ],
)
def test_a_garbled_hello_is_refused_and_leaves_the_token_alone(edge, client, problem, body):
    edge.rent(edge.job())
    problem(client.post("/agent/v1/hello", data=body), 422)
    assert edge.hello().status_code == 200


def test_half_a_character_in_a_token_is_just_another_unknown_token(client, problem):
    body = b'{"token": "\\ud800", "nonce": "nonce-one", "version": 1}'
    problem(client.post("/agent/v1/hello", data=body), 401)


def test_a_base_model_that_is_away_now_leaves_the_token_good(edge, problem):
    job = edge.job()
    edge.rent(job)
    edge.base_error = NotNow("the site is down")
    answer = edge.hello()
    assert problem(answer, 503, "base_unavailable")["retryable"] is True
    assert answer.headers["Retry-After"]
    edge.base_error = None
    edge.clock.advance(600)
    assert edge.hello(nonce="another-nonce").status_code == 200


def test_a_base_model_that_does_not_exist_ends_the_job_with_the_reason(edge, problem, soon):
    job = edge.job()
    edge.rent(job)
    edge.base_error = NeverThere("civitai has no version 1")
    problem(edge.hello(), 410)
    stored = edge.stored(job.id)
    assert stored.status is Status.FAILED
    assert stored.reason.code == "model.unavailable"
    assert "civitai has no version 1" in stored.reason.message
    soon(lambda: ("deallocate", job.id) in edge.woken)


def checkpoint(step, *names, size=9):
    """What an agent says of an uploaded checkpoint."""
    folder = f"checkpoints/{step}-a1b2c3"
    files = [
        {"name": f"{folder}/{name}", "bytes": size, "sha256": "ef" * 32}
        for name in names or ("state.pt", "manifest.json")
    ]
    return {"step": step, "files": files}


@pytest.fixture
def trains(edge):
    """An agent that trains."""
    agent = edge.agent(edge.job())
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        agent.report(fact)
    return agent


@pytest.fixture
def move(edge):
    """Loses the machine of an agent; the agent of the next one."""

    def do(agent, token="another"):  # noqa: S107 -- a test's
        with edge.store.transaction() as tx:
            reason = Reason(code="gpu.lost", message="gone")
            record.stall(tx, agent.spec.job, reason, edge.clock())
            again = record.retry(tx, agent.spec.job, edge.clock())
            for lease in tx.leases_of(again.id):
                if lease.open:
                    tx.save_lease(lease.to(LeaseStatus.RELEASED, released_at=edge.clock()))
        return edge.agent(again, token=token)

    return do


def test_a_first_attempt_has_nothing_to_resume_from(trains):
    assert trains.spec.resume == ()


def test_a_later_attempt_is_offered_the_newest_checkpoint_and_the_one_before_it(trains, move):
    for step in (100, 200, 300):
        trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(step))
    offered = move(trains).spec.resume
    assert [item.name for item in offered] == [
        "checkpoints/300-a1b2c3/state.pt",
        "checkpoints/300-a1b2c3/manifest.json",
        "checkpoints/200-a1b2c3/state.pt",
        "checkpoints/200-a1b2c3/manifest.json",
    ]
    prefix = f"jobs/{trains.spec.job}/attempts/1/checkpoints"
    assert f"{prefix}/300-a1b2c3/state.pt" in offered[0].url
    assert (offered[0].bytes, offered[0].sha256) == (9, "ef" * 32)


def test_a_third_attempt_may_fall_back_to_what_the_first_left(trains, move):
    trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(100))
    second = move(trains)
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        second.report(fact)
    second.report(Fact.TRAINING_CHECKPOINT, **checkpoint(150))
    offered = move(second, "third").spec.resume
    assert [f"attempts/{n}/" in item.url for n, item in zip((2, 2, 1, 1), offered, strict=True)]
    assert [item.name.split("/")[1] for item in offered[::2]] == ["150-a1b2c3", "100-a1b2c3"]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"files": []},
        {"files": "all"},
        {"files": [7]},
        checkpoint(200, "state.pt"),
        checkpoint(200, "manifest.json", "state.pt"),
        checkpoint(200, "../../x", "manifest.json"),
        checkpoint(200, "state.pt", "manifest.json", size=0),
        {"files": checkpoint(200, "state.pt")["files"] + checkpoint(9, "manifest.json")["files"]},
        checkpoint(200, *(f"f{number}" for number in range(100)), "manifest.json"),
    ],
)
@without_database
def test_what_is_no_whole_checkpoint_is_not_offered(trains, move, said):
    """Its manifest, which goes last, says that all of it is in storage."""
    trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(100))
    assert trains.report(Fact.TRAINING_CHECKPOINT, **said).status_code == 200
    assert {item.name.split("/")[1] for item in move(trains).spec.resume} == {"100-a1b2c3"}


def test_a_checkpoint_of_a_machine_that_was_given_up_does_not_count(trains, move, problem):
    trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(100))
    second = move(trains)
    problem(trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(900)), 410)
    put = [{"name": "checkpoints/900-a1b2c3/state.pt", "bytes": 9, "sha256": "ef" * 32}]
    problem(trains.files({"put": put}), 410)
    offered = move(second, "third").spec.resume
    assert {item.name.split("/")[1] for item in offered} == {"100-a1b2c3"}


# --- fresh URLs ---


def test_fresh_urls_for_uploads_and_downloads(edge):
    agent = edge.agent()
    name = "samples/step-100.png"
    put = [{"name": name, "bytes": 5, "sha256": "0" * 64}]
    answer = agent.files({"put": put, "get": ["dataset", "base"]})
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    key = f"jobs/{agent.spec.job}/attempts/1/{name}"
    assert answer.json["put"][name] == {
        "url": f"https://s3.test/{key}?X-Amz-Signature=put",
        "headers": {"Content-Length": "5"},
    }
    assert answer.json["get"]["dataset"]["bytes"] == 1234
    assert answer.json["get"]["base"]["name"] == "base.safetensors"


def test_fresh_urls_for_a_checkpoint_as_long_as_it_is_in_storage(edge, trains, move):
    """An hour after hello the first ones are no good any more."""
    trains.report(Fact.TRAINING_CHECKPOINT, **checkpoint(100))
    second = move(trains)
    state, manifest = (item.name for item in second.spec.resume)
    edge.storage.sizes[f"jobs/{trains.spec.job}/attempts/1/{state}"] = 9
    unknown = "checkpoints/7-a1b2c3/state.pt"
    answer = second.files({"get": [state, manifest, unknown]})
    assert answer.status_code == 200
    assert list(answer.json["get"]) == [state]
    assert answer.json["get"][state]["sha256"] == "ef" * 32
    assert f"attempts/1/{state}" in answer.json["get"][state]["url"]


@without_database
@pytest.mark.parametrize(
    "put",
    [
        {"name": "../weights", "bytes": 1, "sha256": "0" * 64},
        {"name": "a/../b", "bytes": 1, "sha256": "0" * 64},
        {"name": "/etc/passwd", "bytes": 1, "sha256": "0" * 64},
        {"name": "a//b", "bytes": 1, "sha256": "0" * 64},
        {"name": "a/.b", "bytes": 1, "sha256": "0" * 64},
        {"name": "a\x00b", "bytes": 1, "sha256": "0" * 64},
        {"name": "a?b", "bytes": 1, "sha256": "0" * 64},
        {"name": "a" * 201, "bytes": 1, "sha256": "0" * 64},
        {"name": "a\n", "bytes": 1, "sha256": "0" * 64},
        {"name": "a", "bytes": 0, "sha256": "0" * 64},
        {"name": "a", "bytes": 10**12, "sha256": "0" * 64},
        {"name": "a", "bytes": True, "sha256": "0" * 64},
        {"name": "a", "bytes": 1, "sha256": "0"},
        {"name": "a"},
        "a",
    ],
)
def test_no_url_for_a_name_that_leads_elsewhere_or_a_size_out_of_bounds(edge, problem, put):
    problem(edge.agent().files({"put": [put]}), 422)


@without_database
@pytest.mark.parametrize(
    "wanted",
    [
        b"",
        b"[]",
        {"put": "all"},
        {"put": [{"name": f"f{i}", "bytes": 1, "sha256": "0" * 64} for i in range(101)]},
        {"put": [{"name": "a", "bytes": 1, "sha256": "0" * 64}] * 2},
        {"get": ["secrets"]},
        {"get": [[]]},
        {"get": ["checkpoints/" + "x" * 200]},
    ],
)
def test_a_garbled_request_for_urls_is_refused(edge, problem, wanted):
    problem(edge.agent().files(wanted), 422)


def test_urls_are_for_the_attempt_that_signs_and_only_while_it_lasts(edge, client, problem):
    agent = edge.agent()
    path = agent.path.replace("/reports", "/files")
    problem(client.post(path, data=b"{}"), 401)
    other = edge.agent(token="other")
    body = b"{}"
    problem(client.post(path, data=body, headers=other.signed(body, "files")), 401)
    problem(client.post("/agent/v1/jobs/job_x/attempts/1/files", data=b"{}"), 401)
    problem(client.post("/agent/v1/jobs/%00/attempts/99999999999999999999/files"), 401)
    with edge.store.transaction() as tx:
        record.cancel(tx, agent.spec.job, edge.clock())
    answer = agent.files({"get": ["dataset"]})
    problem(answer, 410)
    assert wire.orders_from_bytes(answer.data) == [wire.Order.STOP]
