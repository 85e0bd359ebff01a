"""What a trainer may do to the agent, and what the server hears of it."""

from __future__ import annotations

import os

import pytest


def failed(stoker, agent):
    """The error that was reported, when the agent has ended."""
    assert agent.join() == 1
    assert stoker.destroyed.is_set()
    assert not stoker.has("weights.uploaded")
    return stoker.report("error").data


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_is_reported_with_the_last_lines(stoker, start):
    error = failed(stoker, start("raise ZeroDivisionError('the loss went west')"))
    assert (error["code"], error["retryable"]) == ("trainer.crashed", True)
    assert "ended with 1" in error["message"]
    assert any("the loss went west" in line for line in error["log_tail"])


def test_a_killed_trainer_is_reported_with_its_signal(stoker, start):
    error = failed(stoker, start("os.kill(os.getpid(), signal.SIGKILL)"))
    assert error["code"] == "trainer.crashed"
    assert "signal 9" in error["message"]


def test_memory_that_ran_out_is_called_so(stoker, start):
    code = """
    sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\\n")
    sys.exit(1)
    """
    error = failed(stoker, start(code))
    assert (error["code"], error["retryable"]) == ("trainer.oom", True)


@pytest.mark.parametrize("retryable", [True, False])
def test_the_trainers_own_word_on_its_failure_is_passed_on(stoker, start, retryable):
    code = f"""
    say("error", code="training.diverged", message="the loss is not finite", retryable={retryable})
    sys.exit(1)
    """
    error = failed(stoker, start(code))
    assert error["code"] == "training.diverged"
    assert error["message"] == "the loss is not finite"
    assert error["retryable"] is retryable


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("pass", "ended without a result"),
        ("sys.exit(75)", "stopped before it was done"),
        ("complete(); sys.exit(3)", "ended with 3"),
        ("say('completed', files=[])", "named no files"),
        ("say('completed', files='all')", "named no files"),
        ("say('completed', files=[{'name': 'a.safetensors', 'path': '/etc/passwd'}])", "not there"),
        ("say('completed', files=[{'name': '../a', 'path': keep('a')}])", "no name for a file"),
        ("say('completed', files=[{'name': 'a', 'path': keep('a', b'')}])", "not there"),
        ("say('completed', files=[{'name': 'a', 'path': job['output_dir']}])", "not there"),
        ("say('completed', files=[7])", "no name for a file"),
    ],
)
def test_a_result_that_cannot_be_used_is_a_failure(stoker, start, code, why):
    error = failed(stoker, start(code))
    assert error["code"] == "trainer.crashed"
    assert why in error["message"]


def test_a_link_out_of_the_trainers_folders_is_not_uploaded(stoker, start):
    code = """
    os.symlink("/etc/passwd", os.path.join(job["output_dir"], "lora.safetensors"))
    say("completed", files=[{"name": "lora.safetensors",
                             "path": os.path.join(job["output_dir"], "lora.safetensors")}])
    """
    failed(stoker, start(code))
    assert "lora.safetensors" not in stoker.uploads


def test_garbage_on_stdout_goes_to_the_log_and_does_no_harm(stoker, start):
    code = """
    for line in ("hello", "{", "[1]", "null", '{"event": 7}', '{"event": "dance"}', "NaN",
                 '{"event": "checkpoint", "path": "/etc", "step": 1}',
                 '{"event": "sample", "path": "/etc/passwd"}', '{"event": "sample"}',
                 '{"event": "sample", "path": "a\\\\u0000b"}', "x" * 3_000_000, "[" * 100_000):
        print(line)
    sys.stdout.buffer.write(b"\\xff\\xfe\\x00\\n")
    for step in range(3):
        say("progress", step=step, total=3, loss=float("nan"))
    complete()
    """
    assert start(code).join() == 0
    assert stoker.report("training.progress").data["loss"] is None
    assert b'"event": "dance"' in stoker.uploads["training.log"]
    assert not stoker.has("training.sample")
    assert not stoker.has("training.checkpoint")


def test_a_trainer_that_babbles_is_held_up_and_not_lost(stoker, start):
    code = """
    for step in range(3_000):
        print(json.dumps({"event": "nothing", "step": step}), file=sys.stderr)
    for step in range(500):
        say("progress", step=step, total=500, points=[[step, 0.5]])
    complete()
    """
    assert start(code).join() == 0
    points = [point[0] for item in stoker.reports for point in item.data.get("points", [])]
    assert points == list(range(500))


def test_the_log_is_told_while_training(stoker, start, until):
    code = """
    sys.stderr.write("loading the base model\\r 10%\\r 20%\\n")
    sys.stderr.flush()
    time.sleep(60)
    """
    agent = start(code)
    until(
        lambda: (
            {"loading the base model", " 10%", " 20%"}
            <= {line for item in stoker.reports for line in item.data.get("lines", [])}
        )
    )
    agent.halt.call("enough")


def test_checkpoints_and_samples_are_uploaded_while_training(stoker, start, until):
    code = """
    os.makedirs(os.path.join(job["work_dir"], "step-2", "deep"))
    for name in ("lora.safetensors", "deep/state.bin"):
        open(os.path.join(job["work_dir"], "step-2", name), "w").write(name)
    say("checkpoint", step=2, path=os.path.join(job["work_dir"], "step-2"), best=True)
    say("sample", step=2, path=keep("sample-2.png", b"pixels"), prompt="a dog")
    say("validation", step=2, loss=0.5, stderr=0.1, levels=[[0.125, 0.75, 0.2]])
    sys.stdin.readline()
    complete()
    """
    agent = start(code)
    until(lambda: stoker.has("training.checkpoint") and stoker.has("training.sample"))
    checkpoint = stoker.report("training.checkpoint").data
    assert (checkpoint["step"], checkpoint["best"]) == (2, True)
    names = [item["name"] for item in checkpoint["files"]]
    assert [name.split("/", 2)[2] for name in names] == [
        "deep/state.bin",
        "lora.safetensors",
        "manifest.json",
    ]
    assert all(stoker.uploads[name] for name in names)
    sample = stoker.report("training.sample").data
    assert (sample["prompt"], sample["name"]) == ("a dog", "samples/sample-2.png")
    assert stoker.uploads["samples/sample-2.png"] == b"pixels"
    validation = {
        "validation_loss": 0.5,
        "validation_stderr": 0.1,
        "validation_levels": [[0.125, 0.75, 0.2]],
    }
    said = stoker.report("training.progress").data
    assert {key: said[key] for key in validation} == validation
    assert said["points"] == [{"step": 2, **validation}]
    stoker.orders = ["checkpoint_now"]
    assert agent.join() == 0
    files = [item["name"] for item in stoker.report("weights.uploaded").data["files"]]
    assert sorted(files) == ["lora.safetensors", "samples/sample-2.png", "training.log"]


def test_a_sample_that_the_result_names_again_is_stored_once(stoker, start):
    code = """
    weights, sample = keep("lora.safetensors"), keep("samples/step-1.png", b"pixels")
    say("sample", step=1, path=sample, prompt="a dog")
    say("completed", files=[{"name": "lora.safetensors", "path": weights},
                            {"name": "samples/step-1.png", "path": sample}])
    """
    assert start(code).join() == 0
    files = [item["name"] for item in stoker.report("weights.uploaded").data["files"]]
    assert sorted(files) == ["lora.safetensors", "samples/step-1.png", "training.log"]
    puts = [item for item in stoker.requests if item.path.startswith("/s3/put/samples")]
    assert len(puts) == 1


def test_orders_for_the_trainer_reach_it(stoker, start, until):
    code = """
    say("started", total=2)
    for line in sys.stdin:
        say("sample", step=1, path=keep(json.loads(line)["order"] + ".png", b"p"), prompt="")
        if "checkpoint" in line:
            break
    complete()
    """
    agent = start(code)
    until(lambda: stoker.has("training.started"))
    stoker.orders = ["sample_now", "checkpoint_now"]
    assert agent.join() == 0
    assert {"samples/sample_now.png", "samples/checkpoint_now.png"} < set(stoker.uploads)


def test_a_trainer_that_lingers_after_its_result_is_waited_for(stoker, start):
    assert start("complete(); time.sleep(0.5)").join() == 0


def test_no_process_of_a_trainer_that_will_not_stop_is_left(stoker, start, until):
    code = """
    import subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    say("started", total=1, pids=[os.getpid(), child.pid])
    time.sleep(600)
    """
    agent = start(code)
    until(lambda: stoker.has("training.started"))
    pids = stoker.report("training.started").data["pids"]
    assert all(alive(pid) for pid in pids)
    stoker.orders = ["cancel"]
    assert agent.join() == 1
    until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize(("gpus", "more"), [(1, []), (2, ["--processes", "2"])])
def test_each_gpu_of_the_machine_gets_a_process(stoker, start, tmp_path, monkeypatch, gpus, more):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    row = "NVIDIA GeForce RTX 4090, 24564, 550.54"
    smi.write_text(f"#!/bin/sh\nfor gpu in $(seq {gpus}); do echo '{row}'; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    assert start(f"assert sys.argv[3:] == {more!r}, sys.argv; complete()").join() == 0


def test_a_trainer_sees_no_secret(stoker, start, monkeypatch):
    monkeypatch.setenv("HARMLESS", "yes")
    code = """
    assert os.environ["HARMLESS"] == "yes"
    text = json.dumps(dict(os.environ)) + json.dumps(job) + " ".join(sys.argv)
    for secret in ("canary", "whsec_"):
        assert secret not in text, secret
    complete()
    """
    assert start(code).join() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_the_trainer_starts_in_a_group_of_its_own(stoker, start):
    code = """
    assert os.getpgid(0) == os.getpid() and os.getppid() == int(PARENT)
    complete()
    """.replace("PARENT", repr(os.getpid()))
    assert start(code).join() == 0
