"""`completed` is said of files that the server holds itself, and looked at there."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from gpu_agent.wire import Fact
from state.job import Status
from tasks.verify import Verifier, attempt_key, result_key

NAME = "lora.safetensors"
GOOD, OTHER = b"weights", b"poison!"
UPLOADED = {
    "files": [{"name": NAME, "bytes": len(GOOD), "sha256": hashlib.sha256(GOOD).hexdigest()}]
}


@pytest.fixture
def verifier(world: Any, storage: Any) -> Verifier:
    """Of a job whose agent has uploaded its weights, and says so."""
    world.add_job()
    for fact in (Fact.GPU_READY, Fact.IMAGES_READY, Fact.MODEL_READY, Fact.FILES_POSITIONED):
        world.report(fact)
    storage.objects[attempt_key("job_1", 1, NAME)] = GOOD
    world.report(Fact.WEIGHTS_UPLOADED, UPLOADED)
    return Verifier(store=world.store, storage=storage, clock=world.clock)


def test_what_was_announced_completes_the_job(world: Any, storage: Any, verifier: Verifier) -> None:
    assert verifier.verify("job_1")
    assert world.job().status is Status.COMPLETED
    assert storage.objects[result_key("job_1", NAME)] == GOOD


@pytest.mark.parametrize("when", ["get_file", "copy", "verify", "verify_safetensors"])
def test_weights_that_are_exchanged_meanwhile_are_never_the_result(
    world: Any, storage: Any, verifier: Verifier, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has an address to put them at for an hour, whatever it said and we read before."""
    real = getattr(storage, when)

    def exchange(*args: Any, **named: Any) -> Any:
        answer = real(*args, **named)
        storage.objects[attempt_key("job_1", 1, NAME)] = OTHER
        return answer

    monkeypatch.setattr(storage, when, exchange)
    verifier.verify("job_1")
    assert world.job().status is Status.COMPLETED
    assert storage.objects[result_key("job_1", NAME)] == GOOD


@pytest.mark.parametrize("found", [OTHER, b"", None])
def test_other_weights_than_announced_stall_the_job(
    world: Any, storage: Any, verifier: Verifier, found: bytes | None
) -> None:
    del storage.objects[attempt_key("job_1", 1, NAME)]
    if found is not None:
        storage.objects[attempt_key("job_1", 1, NAME)] = found
    assert not verifier.verify("job_1")
    assert (world.job().status, world.job().reason.code) == (Status.STALLED, "weights.invalid")
    with world.store.transaction() as tx:
        assert tx.artefacts("job_1") == []
