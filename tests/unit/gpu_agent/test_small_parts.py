"""Clock, halt, journal, probe and the environment."""

from __future__ import annotations

import logging

import pytest

from gpu_agent.__main__ import charge_from
from gpu_agent.clock import Clock
from gpu_agent.gpu import Gauge, machine, probe
from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.journal import LONGEST, TAIL, WAITING, Journal


@pytest.mark.parametrize("skew", [-86_400.0, 3_600.0])
def test_a_wrong_clock_follows_the_servers(skew):
    clock = Clock(wall=lambda: 1_700_000_000.0 + skew)
    clock.learn("Tue, 14 Nov 2023 22:13:20 GMT")
    assert clock.now() == 1_700_000_000.0


def test_a_clock_that_is_nearly_right_is_left_alone():
    clock = Clock(wall=lambda: 1_700_000_012.0)
    clock.learn("Tue, 14 Nov 2023 22:13:20 GMT")
    assert clock.now() == 1_700_000_012.0


@pytest.mark.parametrize(
    "date", [None, "", "yesterday", "Tue, 99 Nov 2023 22:13:20 GMT", "\xff" * 99]
)
def test_a_date_of_garbage_teaches_nothing(date):
    clock = Clock(wall=lambda: 5.0)
    clock.learn(date)
    assert clock.now() == 5.0


def test_the_first_reason_to_end_is_the_one_that_counts():
    halt = Halt()
    halt.check()
    assert halt.call("cancel")
    assert not halt.call("lease")
    assert halt.reason == "cancel"
    assert halt.wait(0)
    with pytest.raises(Halted, match="cancel"):
        halt.sleep(60)


def test_work_that_is_warned_goes_on_until_it_leaves_or_its_time_is_up():
    halt = Halt()
    halt.warn("terminated", 3600)
    halt.warn("another", 0)
    halt.check()
    assert halt.warned
    with pytest.raises(Halted):
        halt.leave()
    assert halt.reason == "terminated"
    late = Halt()
    late.warn("terminated", 0.01)
    assert late.wait(10)
    assert late.reason == "terminated"


def test_a_warning_after_the_end_is_none():
    halt = Halt()
    halt.call("cancel")
    halt.warn("terminated", 0)
    assert not halt.warned
    assert halt.reason == "cancel"


def test_the_journal_keeps_the_last_lines_and_hands_out_the_new_ones_once():
    journal = Journal()
    logger = logging.Logger("trial")
    logger.addHandler(journal)
    logger.info("%s", "x" * 10_000)
    for number in range(WAITING + 50):
        logger.info("line %d", number)
    assert len(journal.tail()) == TAIL
    assert journal.tail()[-1] == f"line {WAITING + 49}"
    taken = journal.take()
    assert len(taken) == WAITING
    assert taken[0] == "line 50"
    assert journal.take() == []
    assert len(journal.tail()[0]) <= LONGEST


def program(tmp_path, script):
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_machine_without_a_driver_is_a_cpu(tmp_path):
    about = probe(tmp_path, "no-such-nvidia-smi")
    assert (about["device"], about["gpus"]) == ("cpu", 0)


def test_a_gpu_is_named_with_its_memory_and_driver(tmp_path):
    rows = "NVIDIA GeForce RTX 4090, 24564, 550.54.15"
    about = probe(tmp_path, program(tmp_path, f"echo '{rows}'; echo '{rows}'"))
    assert about["device"] == "cuda"
    assert about["gpu"] == "NVIDIA GeForce RTX 4090"
    assert (about["gpus"], about["vram_mib"], about["driver"]) == (2, 24564, "550.54.15")


@pytest.mark.parametrize(
    "script",
    [
        "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9",
        "echo 'No devices were found'",
        "exit 0",
        "echo 'a, b, c'",
    ],
)
def test_a_driver_without_a_working_gpu_is_a_fault_of_the_host(tmp_path, script):
    with pytest.raises(Fault) as caught:
        probe(tmp_path, program(tmp_path, script))
    assert (caught.value.code, caught.value.retryable) == ("gpu.failed", True)


def test_the_first_look_never_fails_and_leaves_out_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTAINER_ID", "77")
    about = machine(tmp_path, "no-such-nvidia-smi")
    assert about == {"instance": "77", "gpus": 0, "disk_free_gb": about["disk_free_gb"]}
    assert machine(tmp_path, program(tmp_path, "exit 9"))["gpus"] == 0
    assert "gpus" not in machine(tmp_path, program(tmp_path, "exec sleep 60"), seconds=0.1)
    assert "disk_free_gb" not in machine(tmp_path / "gone", "no-such-nvidia-smi")


def test_the_first_look_names_the_gpu_its_memory_and_the_newest_cuda(tmp_path):
    smi = program(
        tmp_path,
        """[ $# = 0 ] && echo '| NVIDIA-SMI 570.86  Driver Version: 570.86  CUDA Version: 12.8 |'
        [ $# = 0 ] || echo 'NVIDIA GeForce RTX 4090, 24564, 570.86'""",
    )
    about = machine(tmp_path, smi)
    del about["disk_free_gb"]
    assert about == {
        "gpu_name": "NVIDIA GeForce RTX 4090",
        "gpus": 1,
        "vram_mb": 24564,
        "driver": "570.86",
        "cuda": "12.8",
    }


def test_a_gauge_shows_what_the_gpu_does_and_nothing_where_it_says_nothing(tmp_path, caplog):
    for said, shown in (
        ("97, 11000, 71", {"util": 97, "mem_mb": 11000, "temp": 71}),
        ("97, 11000, [N/A]", {"util": 97, "mem_mb": 11000, "temp": None}),
        ("Unable to determine the device handle: GPU is lost", None),
    ):
        halt = Halt()
        gauge = Gauge(halt, program(tmp_path, f"echo '{said}'"))
        gauge.start()
        while not (gauge.read or caplog.messages):
            halt.wait(0.01)
        halt.call("over")
        assert gauge.read == shown
    assert "the GPU does not answer" in caplog.messages[-1]


ENV = {
    "STOKER_URL": "https://stoker",
    "STOKER_TOKEN": "token-canary",
    "CONTAINER_ID": "77",
    "CONTAINER_API_KEY": "key-canary",
    "STOKER_HOME": "/data",
}


def test_the_environment_gives_its_secrets_away_once():
    env = dict(ENV)
    charge = charge_from(env)
    assert (charge.token, charge.instance.api_key) == ("token-canary", "key-canary")
    assert charge.instance.market_url == "https://console.vast.ai"
    assert "canary" not in str(env)
    assert "canary" not in repr(charge)
    assert str(charge.home).startswith("/data/")


def test_another_attempt_on_the_same_machine_has_another_folder():
    homes = {charge_from({**ENV, "STOKER_TOKEN": token}).home for token in ("one", "two", "one")}
    assert len(homes) == 2


@pytest.mark.parametrize("lacking", ["CONTAINER_ID", "CONTAINER_API_KEY"])
def test_without_a_market_the_agent_works_and_destroys_nothing(lacking):
    assert charge_from({key: ENV[key] for key in ENV if key != lacking}).instance is None


@pytest.mark.parametrize("lacking", ["STOKER_URL", "STOKER_TOKEN"])
def test_what_is_missing_is_named(lacking):
    with pytest.raises(KeyError, match=lacking):
        charge_from({key: ENV[key] for key in ENV if key != lacking})
