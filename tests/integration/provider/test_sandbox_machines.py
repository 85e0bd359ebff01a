"""The sandbox's machines: what they are given, and that nothing of them outlives them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.provider import LaunchSpec
from infra.sandbox.faults import HostFault
from infra.sandbox.hosts import seeded
from infra.sandbox.machines import LocalMachines
from infra.vast import VastProvider
from state.job import GpuNeeds

#: Children that try to get away: another session, the background, and deaf to SIGTERM.
ESCAPES = """
trap '' TERM
python3 -c 'import os, time
os.fork() and os._exit(0)
os.setsid()
os.fork() and os._exit(0)
open("escaped.pid", "w").write(str(os.getpid()))
time.sleep(600)'
setsid sleep 600 &
sleep 600 &
while [ ! -s escaped.pid ]; do sleep 0.02; done
echo ready in $PWD
sleep 600
"""


def eventually(look: Any) -> Any:
    for _ in range(500):
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def inhabitants(directory: Path) -> list[int]:
    """Processes whose working directory is `directory`, or was until it was removed."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                place = os.readlink(f"/proc/{name}/cwd")
            except OSError:
                continue
            if place.removesuffix(" (deleted)").startswith(str(directory)):
                found.append(int(name))
    return found


def rent(vast: VastProvider, onstart: str, **env: str) -> str:
    offer = min(vast.offers(GpuNeeds()), key=lambda offer: offer.price)
    spec = LaunchSpec(label="t/j/1", image="x/y:1", disk_gb=40, onstart=onstart, env=env)
    return vast.create(offer, spec)


def printed(sandbox: Any, number: str, words: str) -> str:
    machines = sandbox.market.machines
    return eventually(lambda: words in machines.log(number) and machines.log(number))


def test_a_machine_knows_what_vast_tells_it_and_nothing_of_the_host(
    sandbox: Any, vast: VastProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-host's-own")
    number = rent(vast, "env; echo done", STOKER_TOKEN="one-use", CONTAINER_ID="forged")
    lines = printed(sandbox, number, "done").splitlines()
    env = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    home = str(sandbox.market.machines.directory(number))
    assert env["CONTAINER_ID"] == number
    assert env["VAST_CONTAINERLABEL"] == f"C.{number}"
    assert env["VAST_URL"] == sandbox.url
    assert env["GPU_COUNT"] == env["STOKER_SANDBOX"] == "1"
    assert env["STOKER_TOKEN"] == "one-use"
    assert env["HOME"] == env["PWD"] == home
    assert Path(env["TMPDIR"]).parent == Path(home)
    assert env["PATH"].split(":")[:2] == [f"{home}/.sandbox/bin", str(Path(sys.executable).parent)]
    assert set(env) <= {
        *("CONTAINER_ID", "CONTAINER_API_KEY", "VAST_CONTAINERLABEL", "VAST_URL", "GPU_COUNT"),
        *("STOKER_SANDBOX_DISK_GB", "STOKER_SANDBOX_DOWNLOAD_MBPS", "PUBLIC_IPADDR"),
        *("STOKER_SANDBOX", "OMP_NUM_THREADS", "STOKER_TOKEN", "HOME", "TMPDIR", "PATH"),
        *("PWD", "OLDPWD", "SHLVL", "LC_CTYPE", "_"),
    }


QUERY = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits"


def test_a_machine_sees_the_gpu_that_was_offered(sandbox: Any, vast: VastProvider) -> None:
    number = rent(vast, f"{QUERY}; nvidia-smi -L; echo done")
    host = sandbox.market.need(int(number)).host
    query, listing, _ = printed(sandbox, number, "done").splitlines()
    assert query == f"NVIDIA GeForce {host.gpu_name}, {host.gpu_ram}, {host.driver_version}"
    assert listing.startswith(f"GPU 0: NVIDIA GeForce {host.gpu_name} (UUID: GPU-")


def test_a_machine_sees_what_its_host_lied_about(sandbox: Any, vast: VastProvider) -> None:
    lie = {"gpu_name": "GTX 1060", "vram_mib": 6144, "driver": "470.1", "disk_gb": 3.5}
    sandbox.faults.add(HostFault(kind="lie", **lie))
    sandbox.faults.add(HostFault(kind="lie", download_mbps=8))
    words = "echo $STOKER_SANDBOX_DISK_GB $STOKER_SANDBOX_DOWNLOAD_MBPS done"
    number = rent(vast, f"{QUERY}; {QUERY.replace(',noheader,nounits', '')}; {words}")
    assert printed(sandbox, number, "done").splitlines() == [
        "NVIDIA GeForce GTX 1060, 6144, 470.1",
        "name, memory.total, driver_version",
        "NVIDIA GeForce GTX 1060, 6144 MiB, 470.1",
        "3.5 8 done",
    ]


def test_a_machines_disk_may_be_smaller_than_rented(sandbox: Any, vast: VastProvider) -> None:
    sandbox.faults.add(HostFault(kind="lie", disk_gb=0.001))
    look = "import shutil; d = shutil.disk_usage('.'); print(d.total, d.free, 'done')"
    number = rent(vast, f'python -c "{look}"')
    total, free, _ = printed(sandbox, number, "done").split()
    assert int(free) <= int(total) <= 1_000_000


def test_a_machines_clock_may_be_ahead(sandbox: Any, vast: VastProvider) -> None:
    sandbox.faults.add(HostFault(kind="clock_skew", seconds=86400))
    number = rent(vast, "python -c 'import time; print(time.time(), time.time_ns())'; echo done")
    seconds, nanoseconds = map(float, printed(sandbox, number, "done").split()[:2])
    for ahead in (seconds, nanoseconds / 1e9):
        assert ahead - time.time() == pytest.approx(86400, abs=60)


def test_a_machine_without_its_key_cannot_be_told_of_it(sandbox: Any, vast: VastProvider) -> None:
    sandbox.faults.add(HostFault(kind="no_key"))
    number = rent(vast, "env; echo done")
    assert "CONTAINER_API_KEY" not in printed(sandbox, number, "done")


def test_an_outbid_machine_hears_sigterm_and_runs_its_script_again_when_it_is_back(
    sandbox: Any, vast: VastProvider
) -> None:
    script = "trap 'echo saved; exit' TERM; echo start; while :; do sleep 0.05; done"
    number = rent(vast, script)
    printed(sandbox, number, "start")
    sandbox.market.outbid(int(number))
    assert vast.instance(number).phase == "ended"
    printed(sandbox, number, "saved")
    eventually(lambda: sandbox.market.need(int(number)).actual == "exited")
    assert sandbox.market.machines.directory(number).exists()
    sandbox.market.rival_leaves(sandbox.market.need(int(number)).host.machine_id)
    sandbox.market.start(int(number))  # the owner need not wait until the market resumes it
    eventually(lambda: sandbox.market.machines.log(number).count("start") == 2)


def test_a_container_that_crashes_leaves_its_files(sandbox: Any, vast: VastProvider) -> None:
    number = rent(vast, "trap 'echo deaf' TERM; touch kept; echo up; while :; do sleep 0.05; done")
    printed(sandbox, number, "up")
    sandbox.market.crash(int(number))
    eventually(lambda: vast.instance(number).phase == "ended")
    assert "deaf" not in sandbox.market.machines.log(number)
    assert (sandbox.market.machines.directory(number) / "kept").exists()


def test_a_destroyed_machine_leaves_no_process_and_no_file(
    sandbox: Any, vast: VastProvider
) -> None:
    number = rent(vast, ESCAPES)
    printed(sandbox, number, "ready")
    directory = sandbox.market.machines.directory(number)
    assert len(inhabitants(directory)) >= 5
    vast.destroy(number)
    sandbox.market.settle()
    assert inhabitants(directory) == []
    assert not directory.exists()


def test_a_stopped_machine_keeps_its_directory_and_starts_again(
    sandbox: Any, vast: VastProvider
) -> None:
    number = rent(vast, "date +%N >> starts; echo start $(wc -l < starts); sleep 600")
    printed(sandbox, number, "start 1")
    directory = sandbox.market.machines.directory(number)
    sandbox.market.stop(int(number))
    assert vast.instance(number).phase == "ended"
    eventually(lambda: not inhabitants(directory))
    assert (directory / "starts").exists()
    sandbox.market.start(int(number))
    printed(sandbox, number, "start 2")


def test_a_machine_can_destroy_itself_and_reads_the_answer(
    sandbox: Any, vast: VastProvider
) -> None:
    number = rent(
        vast,
        "python3 - <<'END'\n"
        "import os, urllib.request\n"
        'url = f\'{os.environ["VAST_URL"]}/api/v0/instances/{os.environ["CONTAINER_ID"]}/\'\n'
        "key = {'Authorization': 'Bearer ' + os.environ['CONTAINER_API_KEY']}\n"
        "request = urllib.request.Request(url, b'{}', key, method='DELETE')\n"
        "urllib.request.urlopen(request).read()\n"
        "END\nsleep 600",
    )
    directory = sandbox.market.machines.directory(number)
    eventually(lambda: vast.instance(number) is None)
    sandbox.market.settle()
    assert inhabitants(directory) == []


def test_an_ssh_container_outlives_its_script_as_vasts_do(sandbox: Any, vast: VastProvider) -> None:
    number = rent(vast, "echo over; exit 3")
    printed(sandbox, number, "over")
    sandbox.market.tick()
    assert vast.instance(number).phase == "running"


def test_a_container_with_its_own_command_ends_with_it(sandbox: Any, vast: VastProvider) -> None:
    (offer, *_) = vast.offers(GpuNeeds())
    body = {"image": "x", "disk": 16, "runtype": "args", "args": ["bash", "-c", "exit 3"]}
    number = str(sandbox.market.create(int(offer.id), body).id)
    eventually(lambda: vast.instance(number).phase == "ended")


def test_when_the_sandbox_is_killed_its_machines_die(tmp_path: Path) -> None:
    env = {**os.environ, "SANDBOX_ACCOUNT_KEY": "k", "PYTHONPATH": os.getcwd()}
    argv = [sys.executable, "-m", "infra.sandbox", "--data-dir", str(tmp_path), "--boot", "0.1"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        number = rent(VastProvider("k", url, spacing=0), ESCAPES)
        log = tmp_path / "logs" / f"{number}.log"
        eventually(lambda: log.exists() and "ready" in log.read_text())
        directory = tmp_path / "machines" / number
        assert inhabitants(directory)
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: not inhabitants(directory))
        eventually(lambda: not directory.exists())


def test_a_sandbox_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "SANDBOX_ACCOUNT_KEY": "k", "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-m", "infra.sandbox", "--boot", "0.1"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        rent(VastProvider("k", url, spacing=0), ESCAPES)
        eventually(lambda: inhabitants(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert inhabitants(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_sandbox_does_not_start_without_a_key() -> None:
    env = {key: value for key, value in os.environ.items() if key != "SANDBOX_ACCOUNT_KEY"}
    done = subprocess.run(
        [sys.executable, "-m", "infra.sandbox"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "SANDBOX_ACCOUNT_KEY" in done.stderr


def test_a_command_that_is_not_there_ends_its_container(tmp_path: Path) -> None:
    machines = LocalMachines(tmp_path)
    truth = seeded(0)[0].truth(20)
    machines.start("1", env={}, onstart="", args=["/no/such/program"], stays=False, truth=truth)
    assert eventually(lambda: machines.exit_code("1")) == 127
    assert "cannot start" in machines.log("1")
    machines.destroy("1")
    assert machines.log("1") == ""
