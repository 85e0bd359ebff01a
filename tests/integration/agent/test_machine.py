"""The real program, as a machine runs it: the bundle, started by the start script."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from infra.agent_bundle import BUNDLE_PATH, build_bundle, onstart_script

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def machine(stoker, tmp_path, trainer_head):
    """Boots a machine whose bundle has the given code in the place of the LoRA trainer."""
    stoker.spec["method"] = "lora"
    home = tmp_path / "machine"
    home.mkdir()
    running: list[subprocess.Popen[bytes]] = []

    def bundle(code):
        package = tmp_path / "package" / "gpu_agent"
        shutil.copytree(
            REPOSITORY / "gpu_agent",
            package,
            ignore=shutil.ignore_patterns("lora", "__pycache__"),
            dirs_exist_ok=True,
        )
        shutil.copy(REPOSITORY / "gpu_agent" / "methods" / "lora.py", package / "methods")
        (package / "lora").mkdir(exist_ok=True)
        (package / "lora" / "__init__.py").touch()
        (package / "lora" / "__main__.py").write_text(trainer_head + textwrap.dedent(code))
        made = build_bundle(package)
        stoker.documents[BUNDLE_PATH] = made.bytes
        return made

    def boot(code, *, sha256="", **env):
        script = onstart_script(stoker.url, sha256 or bundle(code).sha256)
        with (tmp_path / "console").open("ab") as console:
            process = subprocess.Popen(
                ["sh", "-c", script],
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "HOME": str(home),
                    "STOKER_URL": stoker.url,
                    "VAST_URL": stoker.url,
                    **stoker.container,
                    **env,
                },
            )
        running.append(process)
        return process

    boot.home, boot.console = home, tmp_path / "console"
    boot.bundle = bundle
    yield boot
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def agent_of(shell):
    """The pid of the agent that the start script runs."""
    children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    for pid in children:
        # not the script's own subshell, of which it is a part of the text
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [b"gpu_agent.pyz"]:
            return int(pid)
    return None


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024
        for name in ("VmRSS", "VmHWM")
    }


WAIT = """
say("started", total=1, pid=os.getpid())
sys.stdin.readline()
complete()
"""


def test_a_machine_boots_trains_and_is_gone(stoker, machine, until, record_property):
    process = machine(WAIT)
    until(lambda: stoker.has("training.started"))
    memory = resident_mib(until(lambda: agent_of(process)))
    record_property("agent_mib", memory)
    assert memory["VmHWM"] < 60
    stoker.orders = ["sample_now"]
    assert process.wait(30) == 0
    assert stoker.destroyed.is_set()
    assert stoker.uploads["lora.safetensors"] == b"result"


def test_no_secret_is_left_on_the_machine_or_told(stoker, machine):
    process = machine(
        "print(sorted(os.environ.items()), sys.argv)\n" + WAIT.replace("sys.stdin", "#")
    )
    process.wait(30)
    told = machine.console.read_bytes() + stoker.uploads["training.log"]
    told += b"".join(stoker.bodies.values())
    assert b"canary" not in told
    assert stoker.secret.encode() not in told
    state = machine.home.rglob("spec.json")
    assert [oct(path.stat().st_mode & 0o777) for path in state] == ["0o600"]


def test_an_agent_that_was_killed_goes_on_where_it_was(stoker, machine, until):
    code = """
    state = os.path.join(job["work_dir"], "step-1")
    if job["resume_dir"] is None:
        os.makedirs(state)
        open(os.path.join(state, "state"), "w").write("1")
        say("checkpoint", step=1, path=state, best=True)
        say("started", total=2, pid=os.getpid())
        time.sleep(600)
    assert job["resume_dir"] == os.path.dirname(state)
    complete()
    """
    process = machine(code)
    until(lambda: stoker.has("training.started") and stoker.has("training.checkpoint"))
    trainer = stoker.report("training.started").data["pid"]
    stoker.faults["report"] += ["lost", "cut"]
    os.kill(agent_of(process), signal.SIGKILL)
    assert process.wait(30) == 0
    assert not Path(f"/proc/{trainer}").exists(), "the trainer outlived its agent"
    assert len(stoker.hellos) == 1
    seqs = [report.seq for report in stoker.reports]
    assert seqs == list(range(1, len(seqs) + 1))
    assert stoker.report("weights.uploaded")
    assert len([item for item in stoker.requests if "/s3/dataset" in item.path]) == 1
    assert stoker.destroyed.is_set()


def test_a_machine_that_is_shut_down_says_so(stoker, machine, until):
    code = "sys.stderr.write('step 7\\n'); sys.stderr.flush()\n" + WAIT
    process = machine(code.replace("complete()", "sys.exit(75)"))
    until(lambda: stoker.has("training.started"))
    trainer = stoker.report("training.started").data["pid"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("agent.terminated", True)
    assert "step 7" in error["log_tail"]
    assert stoker.destroyed.is_set()
    assert not Path(f"/proc/{trainer}").exists()


def test_another_bundle_than_the_promised_one_is_never_run(stoker, machine):
    machine.bundle(WAIT)
    fast = {"PATH": fast_path(machine.home)}
    process = machine(WAIT, sha256="0" * 64, **fast)
    assert process.wait(30) == 1
    assert stoker.destroyed.is_set()
    assert stoker.hellos == []
    assert "not the one that was promised" in machine.console.read_text()


def test_a_server_that_has_no_bundle_gives_the_machine_back(stoker, machine):
    made = machine.bundle(WAIT)
    stoker.documents.clear()
    process = machine(WAIT, sha256=made.sha256, PATH=fast_path(machine.home))
    assert process.wait(30) == 1
    assert stoker.destroyed.is_set()


def test_a_bundle_that_was_cut_on_the_way_is_fetched_again(stoker, machine):
    made = machine.bundle(WAIT.replace("sys.stdin.readline()", ""))
    stoker.faults["document"] += [("part", 5_000), 503]
    process = machine(WAIT, sha256=made.sha256, PATH=fast_path(machine.home))
    assert process.wait(30) == 0


def test_an_image_without_a_fitting_python_gives_the_machine_back(stoker, machine, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "python3").write_text("#!/bin/sh\nexit 1\n")
    (folder / "python3").chmod(0o755)
    process = machine(WAIT, PATH=f"{folder}:{os.environ['PATH']}")
    assert process.wait(30) == 1
    assert stoker.destroyed.is_set()


def test_a_key_that_may_not_destroy_stops_the_machine(stoker, machine):
    stoker.always["destroy"] = 403
    process = machine(WAIT, sha256="0" * 64, PATH=fast_path(machine.home))
    assert process.wait(30) == 1
    assert stoker.stopped.is_set()


def fast_path(home):
    """A PATH on which `sleep` does not, but for the watch, which must not end before the rest."""
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "sleep").write_text('#!/bin/sh\n[ "$1" != 15 ] || exec /bin/sleep 1\n')
    (folder / "sleep").chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_an_agent_that_is_started_without_its_address_says_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gpu_agent"],
        cwd=REPOSITORY,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "STOKER_URL" in done.stderr


def test_the_same_files_are_the_same_bundle(tmp_path):
    copy = tmp_path / "gpu_agent"
    shutil.copytree(REPOSITORY / "gpu_agent", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*"):
        os.utime(path, (0, 1_000_000_000))
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "wire.cpython-311.pyc").write_bytes(b"x")
    assert build_bundle(copy).sha256 == build_bundle().sha256


def test_the_start_script_fits_and_parses():
    script = onstart_script("https://stoker.example.com:8443/behind/a/prefix", "a" * 64)
    assert len(script) <= 4048
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    "url", ["https://x/'; rm -rf /; '", "https://x/\n", "https://x/" + "y" * 4000]
)
def test_an_address_that_does_not_fit_into_a_script_is_refused(url):
    with pytest.raises(ValueError, match="script"):
        onstart_script(url, "a" * 64)
