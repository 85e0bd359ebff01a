import io
import json
import os

import pytest

from gpu_agent.lora.talk import JsonLines, Orders


def heard(*lines):
    orders = Orders()
    orders.listen(lines).join(timeout=10)
    return orders


def test_orders_are_heard_once():
    orders = heard(b'{"order": "checkpoint_now"}\n', b'{"order": "sample_now"}\n')
    assert orders.take_checkpoint()
    assert not orders.take_checkpoint()
    assert orders.take_sample()
    assert not orders.stop


@pytest.mark.parametrize(
    "noise",
    [b"\n", b"{", b"\xff\xfe\n", b"[]", b"null", b'"stop"', b'{"order": ["stop"]}', b"[" * 100_000],
)
def test_noise_between_orders_changes_nothing(noise):
    orders = heard(noise, b'{"order": "dance"}', b'{"order": "stop"}')
    assert orders.stop
    assert not orders.take_checkpoint()


def test_an_event_is_one_line_of_json():
    stream = io.StringIO()
    JsonLines(stream).emit("error", code="x", message="two\nlines, ébène")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line) == {"event": "error", "code": "x", "message": "two\nlines, ébène"}


def test_a_number_that_json_does_not_know_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        JsonLines(io.StringIO()).emit("progress", loss=float("nan"))


def test_a_trainer_whose_agent_is_gone_is_told_to_stop():
    theirs, ours = os.pipe()
    orders = Orders()
    stream = os.fdopen(ours, "w")
    events = JsonLines(stream, gone=lambda: orders.note("stop"))
    events.emit("progress", step=1)
    assert not orders.stop
    os.close(theirs)
    events.emit("progress", step=2)
    assert orders.stop
    with pytest.raises(BrokenPipeError):
        stream.close()
