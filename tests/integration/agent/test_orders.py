"""Whatever the agent is doing, it stops when it is told to, and gives the machine back."""

from __future__ import annotations

import pytest

from gpu_agent.wire import Order

#: The promise to whoever cancels (seconds).
PROMISED = 5.0


def ends_soon(stoker, agent):
    """Wait for the end; fails when the machine is billed for longer than was promised."""
    assert agent.join(PROMISED) == 1
    assert stoker.destroyed.is_set()
    assert not stoker.has("weights.uploaded")


@pytest.fixture(params=[Order.CANCEL, Order.STOP, "gone"])
def tell(request, stoker):
    """Tells the agent to end, in each way in which the server can."""

    def do():
        if request.param == "gone":
            stoker.over = True
        else:
            stoker.orders = [request.param]

    return do


def test_while_files_are_pulled(stoker, start, until, faults, tell):
    stoker.always["get"] = faults.hang
    agent = start()
    until(lambda: stoker.has("heartbeat"))
    tell()
    ends_soon(stoker, agent)


def test_while_requirements_are_installed(stoker, start, until, faults, monkeypatch, tell):
    monkeypatch.setenv("PIP_INDEX_URL", f"{stoker.url}/s3/index")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def hang_for_pip(handler):
        return faults.hang(handler) if "/index/" in handler.path else "ok"

    stoker.always["get"] = hang_for_pip
    agent = start(requirements=("stoker-no-such-package>=1",))
    until(lambda: any("/index/" in item.path for item in stoker.requests))
    tell()
    ends_soon(stoker, agent)


def test_while_a_trainer_trains_that_ignores_signals(stoker, start, until, tell):
    agent = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('started'); time.sleep(600)")
    until(lambda: stoker.has("training.started"))
    tell()
    ends_soon(stoker, agent)


def test_while_results_are_uploaded(stoker, start, until, faults, tell):
    stoker.always["put"] = faults.hang
    agent = start()
    until(lambda: stoker.has("training.completed"))
    until(lambda: any("/s3/put/" in item.path for item in stoker.requests))
    tell()
    ends_soon(stoker, agent)


def test_while_nobody_gives_addresses_for_the_upload(stoker, start, until, tell):
    stoker.always["files"] = 503
    agent = start()
    until(lambda: stoker.has("training.completed"))
    tell()
    ends_soon(stoker, agent)


def test_while_the_last_report_waits(stoker, start, until):
    agent = start("raise SystemExit(1)")
    until(lambda: stoker.has("files.positioned"))
    stoker.always["report"] = 503
    agent.halt.call("lease")
    agent.join(PROMISED)
    assert stoker.destroyed.is_set()


def test_an_unknown_token_gives_the_machine_back(stoker, start):
    stoker.faults["hello"] += [401]
    assert start().join() == 1
    assert stoker.destroyed.is_set()
    assert stoker.reports == []


def test_an_attempt_that_is_over_gives_the_machine_back(stoker, start):
    stoker.faults["hello"] += [410]
    assert start().join() == 1
    assert stoker.destroyed.is_set()


def test_a_lost_answer_to_hello_is_asked_for_again_with_the_same_nonce(stoker, start):
    stoker.faults["hello"] += [503, "lost", "cut"]
    assert start().join() == 0
    said = [item.body for item in stoker.requests if item.path.endswith("/hello")]
    assert len(said) == 4
    assert len(set(said)) == 1


def test_a_server_that_gives_no_job_gives_the_machine_back(stoker, start, faults):
    stoker.always["hello"] = faults.send(b'{"job": 7}')
    assert start().join() == 1
    assert stoker.destroyed.is_set()


def test_an_unknown_method_is_told(stoker, start):
    stoker.spec["method"] = "alchemy"
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("job.invalid", False)


@pytest.mark.parametrize(
    ("what", "content", "code", "retryable"),
    [
        ("dataset", b"PK\x05\x06 no zip", "dataset.corrupt", False),
        ("base", b"\x80\x04\x95 a pickle of some length", "model.unsafe", False),
    ],
)
def test_bad_files_end_the_attempt_with_their_reason(stoker, start, what, content, code, retryable):
    stoker.offer(**{what: content})
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == (code, retryable)
    assert stoker.destroyed.is_set()


def test_requirements_that_cannot_be_had_end_the_attempt(stoker, start, monkeypatch, faults):
    monkeypatch.setenv("PIP_INDEX_URL", f"{stoker.url}/s3/index")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    not_there = faults.send(b"no such package", 404)
    stoker.always["get"] = lambda handler: not_there(handler) if "/index/" in handler.path else "ok"
    assert start(requirements=("stoker-no-such-package>=1",)).join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("install.failed", True)
    assert any("stoker-no-such-package" in line for line in error["log_tail"])


def test_storage_that_refuses_the_result_ends_the_attempt(stoker, start):
    stoker.always["put"] = 403
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("upload.failed", True)


@pytest.mark.parametrize("fault", ["cut", "lost", 403, 500, 503])
def test_an_upload_that_goes_wrong_is_tried_again(stoker, start, fault):
    stoker.faults["put"] += [fault, fault]
    assert start().join() == 0
    assert stoker.uploads["lora.safetensors"] == b"result"


def test_a_market_that_stutters_gets_its_machine_back_all_the_same(stoker, start):
    stoker.faults["destroy"] += [503, "cut"]
    # the switch waits whole seconds between tries
    assert start("raise SystemExit(1)").join() == 1
    assert stoker.destroyed.is_set()
