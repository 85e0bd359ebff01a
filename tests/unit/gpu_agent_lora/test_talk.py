import io
import json
import os
import threading

import pytest

from gpu_agent.lora.talk import JsonLines, Orders, Pulse, Stopped


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


class Listener:
    """Collects events; `heard` is set by each."""

    def __init__(self):
        self.events, self.heard = [], threading.Event()

    def emit(self, event, **fields):
        self.events.append((event, fields))
        self.heard.set()


def test_each_phase_is_told_and_its_steps_are_not_all():
    listener = Listener()
    pulse = Pulse(listener, Orders())
    for phase in ("caching", "validating"):
        for done in range(1000):
            pulse.beat(phase, done, 1000)
    first = [fields for _, fields in listener.events if fields["done"] == 0]
    assert [fields["phase"] for fields in first] == ["caching", "validating"]
    assert len(listener.events) < 100


def test_a_phase_that_may_be_left_is_left_when_a_stop_is_ordered():
    orders = Orders()
    orders.note("stop")
    with pytest.raises(Stopped):
        Pulse(Listener(), orders).beat("caching", 0, 1)


def test_loading_is_told_as_long_as_something_moves():
    """A process that is stuck in a read says nothing, and so can be told from a slow one."""
    listener = Listener()
    looks = iter(range(10))
    last = threading.Event()

    def measure():
        look = next(looks, 9)
        if look == 9:
            last.set()
        return min(look, 3)

    with Pulse(listener, Orders()).watched("loading", measure, every=0.001):
        assert last.wait(10)
    told = [fields["done"] for _, fields in listener.events]
    assert told == [1, 2, 3]
