"""A machine is lost or taken away; another one goes on from what this one had saved."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil

import pytest

#: A trainer that saves when it is told to stop, as ours does.
SAVES = """
def save(step, **files):
    folder = os.path.join(job["work_dir"], f"step-{step}")
    os.makedirs(os.path.join(folder, "deep"))
    for name in ("lora.safetensors", "deep/state.bin"):
        open(os.path.join(folder, name), "w").write(f"{name} of step {step}")
    say("checkpoint", step=step, path=folder, best=True)
"""
WAITS = (
    SAVES
    + """
save(1)
say("started", total=9)
assert json.loads(sys.stdin.readline())["order"] == "stop"
save(2)
sys.exit(75)
"""
)


@pytest.fixture
def saved(stoker, until):
    """Waits for the first checkpoint to be reported."""
    return lambda: until(lambda: stoker.has("training.checkpoint"))


def checkpoints(stoker):
    return [item.data for item in stoker.reports if item.type == "training.checkpoint"]


def puts(stoker):
    return [
        item.path.split("?")[0].removeprefix("/s3/put/")
        for item in stoker.requests
        if item.method == "PUT"
    ]


# --- saving ---


def test_a_checkpoint_is_known_when_its_manifest_is_stored_after_all_else(stoker, start, saved):
    stoker.faults["put"] += [503, "cut"]
    agent = start(SAVES + "save(7); sys.stdin.readline(); complete()")
    saved()
    agent.agent.terminate()
    assert agent.join() == 0
    names = list(dict.fromkeys(name for name in puts(stoker) if name.startswith("checkpoints/7-")))
    assert [name.split("/", 2)[2] for name in names] == [
        "deep/state.bin",
        "lora.safetensors",
        "manifest.json",
    ]
    (said,) = checkpoints(stoker)
    assert [item["name"] for item in said["files"]] == names
    assert json.loads(stoker.uploads[names[2]]) == {
        "job": "job_1",
        "attempt": 1,
        "step": 7,
        "files": [
            {
                "name": name.split("/", 2)[2],
                "bytes": len(stoker.uploads[name]),
                "sha256": hashlib.sha256(stoker.uploads[name]).hexdigest(),
            }
            for name in names[:2]
        ],
    }


def test_a_checkpoint_that_the_trainer_drops_meanwhile_is_uploaded_all_the_same(
    stoker, start, saved
):
    """A line may be slower than the trainer, which keeps only its last ones."""

    def drop(handler):
        shutil.rmtree(agent.home / "work" / "step-7", ignore_errors=True)

    stoker.faults["put"] += [drop]
    agent = start(SAVES + "save(7); sys.stdin.readline(); complete()")
    saved()
    agent.agent.terminate()
    agent.join()
    (said,) = checkpoints(stoker)
    assert all(stoker.uploads[item["name"]] for item in said["files"])


def test_what_was_saved_before_a_crash_still_arrives(stoker, start):
    assert start(SAVES + "save(7)\nraise SystemExit(1)").join() == 1
    assert [item["step"] for item in checkpoints(stoker)] == [7]
    assert stoker.facts().index("training.checkpoint") < stoker.facts().index("error")


# --- a machine that is taken away ---


def test_a_machine_that_is_taken_away_saves_first_and_says_so(stoker, start, saved):
    agent = start(WAITS)
    saved()
    agent.agent.terminate()
    agent.agent.terminate()  # whoever stops a container may say it to each of its processes
    assert agent.join(9.0) == 1
    assert [item["step"] for item in checkpoints(stoker)] == [1, 2]
    assert stoker.milestones()[-1] == "error"
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("agent.terminated", True)
    assert stoker.destroyed.is_set()


@pytest.mark.parametrize("trouble", ["deaf trainer", "dead storage"])
def test_a_machine_that_cannot_save_in_time_says_so_in_time(stoker, start, faults, trouble, saved):
    """What was uploaded before is what the next one goes on from."""
    code = WAITS
    if trouble == "deaf trainer":
        code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS
        code = code.replace("assert json.loads(sys.stdin.readline())", "time.sleep(600) #")
    agent = start(code, grace_s=1.0)
    saved()
    if trouble == "dead storage":
        stoker.always["put"] = faults.hang
    agent.agent.terminate()
    assert agent.join(9.0) == 1
    assert [item["step"] for item in checkpoints(stoker)] == [1]
    assert stoker.report("error").data["code"] == "agent.terminated"
    assert stoker.destroyed.is_set()


def test_a_machine_that_is_taken_away_while_it_uploads_the_result_finishes(stoker, start, until):
    def taken(handler):
        agent.agent.terminate()

    stoker.faults["put"] += [taken]
    agent = start()
    assert agent.join() == 0
    assert stoker.uploads["lora.safetensors"] == b"result"
    assert not stoker.has("error")


def test_a_machine_that_is_taken_away_before_the_training_has_nothing_to_save(
    stoker, start, faults, until
):
    stoker.always["get"] = faults.hang
    agent = start()
    until(lambda: stoker.has("heartbeat"))
    agent.agent.terminate()
    assert agent.join(5.0) == 1
    assert stoker.report("error").data["code"] == "agent.terminated"
    assert stoker.destroyed.is_set()


# --- going on ---


@pytest.fixture
def moved(stoker, start, saved):
    """A second attempt that is offered checkpoints of steps 1 and 2; starts its agent."""
    agent = start(WAITS)
    saved()
    agent.agent.terminate()
    agent.join()
    stoker.move()
    return functools.partial(start, name="another")


def of_step(stoker, step, name):
    """The full name of a file in the checkpoint of a step."""
    files = [
        item["name"]
        for said in checkpoints(stoker)
        if said["step"] == step
        for item in said["files"]
    ]
    return next(item for item in files if item.endswith(name))


def positioned(stoker):
    return [item.data for item in stoker.reports if item.type == "files.positioned"][-1]


USES = """
found = {}
for folder, _, names in os.walk(job["resume_dir"] or "nowhere"):
    for name in names:
        inside = os.path.relpath(os.path.join(folder, name), job["resume_dir"])
        if name != "manifest.json":
            found[inside.split("/", 1)[1] + " " + inside.split("-")[0]] = open(
                os.path.join(folder, name)).read()
assert found == {
    f"{name} {step}": f"{name} of step {step}"
    for step in STEPS
    for name in ("lora.safetensors", "deep/state.bin")
}, found
complete()
"""


def uses(*steps):
    """A trainer that finds the checkpoints of these steps, and no others."""
    return USES.replace("STEPS", repr(steps))


def test_another_machine_gets_the_last_checkpoint_and_the_one_before(stoker, moved):
    assert moved(uses(1, 2)).join() == 0
    assert positioned(stoker) == {"resumed": True, "refused": []}
    assert stoker.report("weights.uploaded").attempt == 2


def truncate(stoker, name):
    stoker.objects[name] = stoker.objects[name][:-1]


def flip_a_bit(stoker, name):
    stoker.objects[name] = stoker.objects[name][:-1] + b"!"


def lose(stoker, name):
    del stoker.objects[name]


@pytest.mark.parametrize("name", ["deep/state.bin", "lora.safetensors", "manifest.json"])
@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, lose])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(stoker, moved, spoil, name):
    spoil(stoker, of_step(stoker, 2, name))
    assert moved(uses(1)).join() == 0
    told = positioned(stoker)
    assert told["resumed"]
    assert len(told["refused"]) == 1
    assert told["refused"][0].startswith("2-")


@pytest.mark.parametrize(
    "change", [{"step": 3}, {"job": "job_2"}, {"files": []}, {"files": 7}, {"files": [{}]}]
)
def test_a_manifest_that_tells_of_something_else_is_not_believed(stoker, moved, change):
    name = of_step(stoker, 2, "manifest.json")
    stoker.objects[name] = json.dumps({**json.loads(stoker.objects[name]), **change}).encode()
    stoker.spec["resume"] = tuple(
        stoker.download(item.name, item.name) for item in stoker.spec["resume"]
    )
    assert moved(uses(1)).join() == 0
    assert "manifest" in positioned(stoker)["refused"][0]


def test_without_a_whole_checkpoint_the_training_starts_anew_and_that_is_told(stoker, moved):
    for step in (1, 2):
        lose(stoker, of_step(stoker, step, "state.bin"))
    assert moved(uses()).join() == 0
    told = positioned(stoker)
    assert not told["resumed"]
    assert len(told["refused"]) == 2


def test_a_name_that_leads_elsewhere_is_refused(stoker, start):
    stoker.offer(state=b"state")
    stoker.spec["resume"] = (stoker.download("state", "checkpoints/2-abcdef/../../../escaped"),)
    agent = start(uses())
    assert agent.join() == 0
    assert not [*agent.home.parent.rglob("escaped*")]
    assert "no name for a file" in positioned(stoker)["refused"][0]


def test_addresses_that_have_expired_are_asked_for_again(stoker, moved):
    """They are good for an hour; pulling a large base model may take longer."""
    first = f"/s3/{stoker.spec['resume'][0].name}"

    def expired(handler):
        return 403 if handler.path.startswith(first) and "canary-0" in handler.path else "ok"

    stoker.always["get"] = expired
    stoker.spec["resume"] = tuple(
        replaced(item, item.url.rpartition("-")[0] + "-0") for item in stoker.spec["resume"]
    )
    assert moved(uses(1, 2)).join() == 0


def replaced(item, url):
    return type(item)(url=url, name=item.name, bytes=item.bytes, sha256=item.sha256)


def test_a_line_that_fails_costs_the_machine_and_not_the_checkpoint(stoker, moved):
    """To start anew would throw away what only waits in storage."""
    first = f"/s3/{stoker.spec['resume'][0].name}"
    stoker.always["get"] = lambda handler: 503 if handler.path.startswith(first) else "ok"
    assert moved(uses()).join() == 1
    error = [item for item in stoker.reports if item.type == "error"][-1]
    assert error.attempt == 2
    assert (error.data["code"], error.data["retryable"]) == ("download.failed", True)
