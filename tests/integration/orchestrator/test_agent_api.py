"""The agent's door: its own file, hello, fresh URLs."""

from __future__ import annotations

import hashlib
import threading

import pytest

from gpu_agent import wire
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
    assert wire.Recipe.from_dict(spec.recipe) == wire.Recipe()
    wire.secret_key(spec.secret)
    assert "agent.hello" in edge.events(job.id)


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


def test_a_later_attempt_resumes_from_the_last_uploaded_checkpoint(edge):
    job = edge.job()
    agent = edge.agent(job)
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        agent.report(fact)
    file = {"name": "checkpoints/100.safetensors", "bytes": 9, "sha256": "ef" * 32}
    agent.report(Fact.TRAINING_CHECKPOINT, step=100, files=[file])
    agent.report(Fact.TRAINING_CHECKPOINT, step=200, files=[{**file, "name": "../../x"}])
    with edge.store.transaction() as tx:
        record.stall(tx, job.id, Reason(code="gpu.lost", message="gone"), edge.clock())
        again = record.retry(tx, job.id, edge.clock())
        for lease in tx.leases_of(job.id):
            tx.save_lease(lease.to(LeaseStatus.RELEASED, released_at=edge.clock()))
    edge.rent(again, token="second")
    spec = wire.JobSpec.from_bytes(edge.hello("second").data)
    assert [item.name for item in spec.resume] == [file["name"]]
    assert f"jobs/{job.id}/attempts/1/checkpoints/100.safetensors" in spec.resume[0].url


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
