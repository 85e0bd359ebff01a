"""Downloads over a bad line."""

from __future__ import annotations

import errno
import hashlib
import random

import pytest

from gpu_agent.halt import Fault, Halt, Halted
from gpu_agent.pull import check_space, disk_faults, pull
from gpu_agent.wire import Download

BODY = random.Random(7).randbytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
SIZE = len(BODY)


@pytest.fixture
def fetch(stoker, tmp_path):
    """Pulls BODY as the agent would; `fetch.told` has the progress."""
    stoker.offer(thing=BODY)
    told: list[tuple[int, int]] = []
    halt = Halt()

    def run(size=SIZE, sha256=SHA256):
        download = Download(url=stoker.address_of("thing"), name="thing", bytes=size, sha256=sha256)

        def fresh():
            stoker.generation += 1
            stoker.expired = False
            return Download(url=stoker.address_of("thing"), name="thing", bytes=size, sha256=sha256)

        return pull(
            download,
            tmp_path / "thing",
            fresh=fresh,
            halt=halt,
            progress=lambda done, total: told.append((done, total)),
            mismatch="model.checksum",
            delays=(0.01,) * 4,
        )

    run.told, run.halt, run.folder = told, halt, tmp_path
    return run


def ranges(stoker):
    return [item.headers.get("range") for item in stoker.requests if item.method == "GET"]


def test_a_file_arrives_whole_and_progress_is_told_in_bytes(fetch):
    assert fetch().read_bytes() == BODY
    assert fetch.told[-1] == (len(BODY), len(BODY))
    assert [item.name for item in fetch.folder.iterdir()] == ["thing"]


def test_a_cut_download_goes_on_where_it_stopped(stoker, fetch, faults):
    stoker.faults["get"] += [faults.cut_after(1_500_000), faults.cut_after(1_000_000)]
    assert fetch().read_bytes() == BODY
    first, *rest = ranges(stoker)
    assert first is None
    assert len(rest) == 2
    starts = [int(item.removeprefix("bytes=").rstrip("-")) for item in rest]
    assert 0 < starts[0] < starts[1]


def test_a_server_that_ignores_ranges_still_delivers(stoker, fetch, faults):
    stoker.faults["get"] += [faults.cut_after(1_500_000), faults.send(BODY)]
    assert fetch().read_bytes() == BODY


def test_a_range_that_begins_elsewhere_is_not_appended(stoker, fetch, faults):
    shifted = faults.send(BODY[5:], 206, content_range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}")
    stoker.faults["get"] += [faults.cut_after(1_500_000), shifted]
    assert fetch().read_bytes() == BODY


def test_an_expired_address_is_replaced_and_the_rest_fetched(stoker, fetch, faults):
    def cut_and_expire(handler):
        stoker.expired = True
        return faults.cut_after(2_000_000)(handler)

    stoker.faults["get"] += [cut_and_expire]
    assert fetch().read_bytes() == BODY
    assert stoker.generation == 1
    assert ranges(stoker)[-1] is not None


def test_a_server_in_trouble_is_asked_again(stoker, fetch):
    stoker.faults["get"] += [503, "cut", 500, 429]
    assert fetch().read_bytes() == BODY


def test_a_server_that_never_answers_is_a_fault_of_the_line(stoker, fetch):
    stoker.always["get"] = "cut"
    with pytest.raises(Fault) as caught:
        fetch()
    assert (caught.value.code, caught.value.retryable) == ("download.failed", True)
    assert "canary" not in str(caught.value)


def test_a_file_garbled_on_the_way_is_fetched_anew(stoker, fetch, faults):
    stoker.faults["get"] += [faults.send(BODY[:-1] + b"?")]
    assert fetch().read_bytes() == BODY


def test_a_wrong_checksum_is_told_and_nothing_is_kept(fetch):
    with pytest.raises(Fault) as caught:
        fetch(sha256="0" * 64)
    assert (caught.value.code, caught.value.retryable) == ("model.checksum", False)
    assert list(fetch.folder.iterdir()) == []


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, 10])
def test_a_file_of_another_length_than_promised_is_refused(fetch, size):
    with pytest.raises(Fault, match="promised") as caught:
        fetch(size=size, sha256="")
    assert caught.value.code == "model.checksum"


def test_a_body_that_stops_early_each_time_is_no_endless_loop(stoker, fetch, faults):
    stoker.always["get"] = faults.cut_after(1_000)
    with pytest.raises(Fault) as caught:
        fetch(size=0)
    assert caught.value.code == "download.failed"


def test_a_file_of_unknown_length_and_checksum_is_taken_as_it_comes(fetch):
    assert fetch(size=0, sha256="").read_bytes() == BODY


def test_an_empty_answer_where_bytes_were_promised_is_refused(stoker, fetch):
    stoker.offer(thing=b"")
    with pytest.raises(Fault):
        fetch()


def test_what_an_earlier_run_left_is_taken_up(stoker, fetch):
    (fetch.folder / "thing.part").write_bytes(BODY[:1_234_567])
    assert fetch().read_bytes() == BODY
    assert ranges(stoker) == ["bytes=1234567-"]


def test_a_whole_file_is_not_fetched_twice(stoker, fetch):
    fetch()
    assert fetch().read_bytes() == BODY
    assert len(ranges(stoker)) == 1


def test_garbage_left_by_an_earlier_run_does_not_spoil_the_file(fetch):
    (fetch.folder / "thing.part").write_bytes(b"x" * 2_000_000)
    assert fetch().read_bytes() == BODY


def test_a_download_ends_when_the_work_does(fetch):
    fetch.halt.call("cancel")
    with pytest.raises(Halted):
        fetch()


def test_a_disk_too_small_is_told_before_anything_is_fetched(tmp_path):
    with pytest.raises(Fault) as caught:
        check_space(tmp_path, 10**18)
    assert (caught.value.code, caught.value.retryable) == ("host.disk_full", True)


def test_a_disk_that_fills_up_is_a_fault_of_the_host():
    with pytest.raises(Fault) as caught, disk_faults():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.code, caught.value.retryable) == ("host.disk_full", True)
