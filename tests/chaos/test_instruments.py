"""The storm's instruments see what they are there for: each is shown something that went wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gpu_agent.wire import Fact, Report
from stand import audit
from stand.front import Front
from stand.links import Link, Links
from state.events import Event, Outgoing
from state.job import Job, JobRequest, Status
from state.lease import Lease, LeaseStatus

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
REPORT = Report(job="job_1", attempt=1, seq=1, type=Fact.GPU_READY, at=0.0, data={"vram_gb": 24})


def step(seq: int, source: str, target: str, cause: str) -> Event:
    data = {"from": source, "to": target, "cause": cause}
    return Event(job="job_1", seq=seq, attempt=1, type="transition", at=NOON, data=data)


def told(report: Report) -> Event:
    return Event(
        job=report.job,
        seq=2,
        attempt=report.attempt,
        type=str(report.type),
        at=NOON,
        data=report.data,
        agent_seq=report.seq,
        webhook_id=report.webhook_id,
    )


HISTORY = [
    step(1, "pending", "pendingGpu", "dataset.ready"),
    told(REPORT),
    step(3, "pendingGpu", "pendingImages", "gpu.ready"),
    step(4, "pendingImages", "cancelled", "cancel"),
]
JOB = Job(
    id="job_1",
    owner="o",
    request=JobRequest(dataset_id="d", base="civitai:1"),
    created_at=NOON,
    entered_at=NOON,
    status=Status.CANCELLED,
    seq=4,
    owed=2,
    finished_at=NOON,
)


def test_a_report_that_is_missing_doubled_or_changed_is_lost() -> None:
    kept = told(REPORT)
    assert audit.lost_reports([REPORT], HISTORY) == []
    assert audit.lost_reports([REPORT], HISTORY[2:])
    assert audit.lost_reports([REPORT], [kept, kept])
    assert audit.lost_reports([REPORT], [dataclasses.replace(kept, data={"vram_gb": 12})])


@pytest.mark.parametrize(
    "broken",
    [
        HISTORY[:1] + HISTORY[2:],
        [*HISTORY[:2], step(3, "pendingGpu", "training", "gpu.ready"), HISTORY[3]],
        [*HISTORY[:2], step(3, "pendingImages", "pendingModel", "images.ready"), HISTORY[3]],
        [*HISTORY[:3], step(4, "pendingImages", "cancelled", "stall")],
        [*HISTORY[:3], step(4, "pendingImages", "pendingModel", "images.ready")],
    ],
    ids=["a gap", "no such row", "from elsewhere", "another cause", "the job is elsewhere"],
)
def test_a_history_that_the_table_does_not_allow_is_seen(broken: list[Event]) -> None:
    assert audit.illegal_steps(JOB, HISTORY) == []
    assert audit.illegal_steps(JOB, broken)


def test_a_webhook_that_was_not_heard_is_missed() -> None:
    payloads = [{"type": "job.x", "data": {"job": "job_1", "seq": seq}} for seq in (1, 2)]
    owed = [
        Outgoing(id=f"job_1.{n}", job="job_1", seq=n, type="job.x", created_at=NOON, payload=item)
        for n, item in enumerate(payloads, 1)
    ]
    assert audit.unheard_webhooks(JOB, owed, payloads) == []
    assert audit.unheard_webhooks(JOB, owed, payloads[:1])
    assert audit.unheard_webhooks(JOB, owed, [payloads[0], payloads[0], payloads[1]])
    assert audit.unheard_webhooks(JOB, owed[:1], payloads[:1])


def test_an_instance_without_a_lease_or_beyond_its_job_is_seen() -> None:
    label = "storm/job_1/1-abcd"
    rental = audit.Rental(id="7", label=label, began=NOON, ended=NOON + timedelta(seconds=90))
    lease = Lease(
        id="job_1.001",
        job="job_1",
        attempt=1,
        label=label,
        created_at=NOON,
        expires_at=NOON,
        status=LeaseStatus.RELEASED,
    )
    late = dataclasses.replace(lease, created_at=NOON + timedelta(seconds=1))

    assert audit.unowned_instances([rental], [lease]) == []
    assert audit.unowned_instances([rental], [])
    assert audit.unowned_instances([rental], [late])
    assert audit.unowned_instances([rental], [lease.evolve(status=LeaseStatus.RELEASING)])
    assert audit.outlived([rental], {"job_1": JOB}) == {"7": 90.0}
    assert audit.outlived([rental], {}) == {"7": 90.0}, "of no job at all"


# --- lines


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that says what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(line,), daemon=True).start()

        def answer(line: socket.socket) -> None:
            with line:
                try:
                    while data := line.recv(1024):
                        line.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def link(echo: int) -> Iterator[Link]:
    with Links() as links:
        yield links.to(echo)


def call(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), 10)


def say(line: socket.socket, text: bytes) -> bytes:
    line.sendall(text)
    return line.recv(1024)


def is_refused(link: Link) -> bool:
    """Whether a new connection ends before anything is said."""
    try:
        with call(link) as line:
            return not line.recv(1)
    except ConnectionError:
        return True


def test_a_line_that_is_cut_is_reset_and_a_new_one_works(link: Link) -> None:
    with call(link) as line:
        assert say(line, b"one") == b"one"
        link.cut()
        with pytest.raises(ConnectionResetError):
            line.recv(1)
    with call(link) as line:
        assert say(line, b"two") == b"two"


def test_a_line_that_is_refused_works_when_it_is_mended(link: Link) -> None:
    link.cut(refuse=True)
    assert is_refused(link)
    link.mend()
    with call(link) as line:
        assert say(line, b"two") == b"two"


def test_a_line_that_is_held_lets_nothing_pass_until_it_is_mended(link: Link) -> None:
    with call(link) as line:
        assert say(line, b"one") == b"one"
        link.hold()
        line.sendall(b"two")
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(10)
        link.mend()
        assert line.recv(1024) == b"two"


def test_the_witness_remembers_what_was_answered_also_when_nobody_heard_it() -> None:
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    def post(front: Front, report: Report) -> int:
        line = http.client.HTTPConnection("127.0.0.1", front.port, timeout=10)
        with contextlib.closing(line):
            line.request("POST", "/agent/v1/jobs/job_1/attempts/1/reports", report.to_bytes())
            return line.getresponse().status

    second = dataclasses.replace(REPORT, seq=2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        with Front(web.server_port) as front:
            status[0] = 503
            assert post(front, REPORT) == 503
            assert front.acknowledged == {}
            status[0] = 200
            assert post(front, REPORT) == 200
            front.lose()
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                post(front, second)
            front.mend()
            assert post(front, second) == 200
            seen = front.acknowledged
            assert [seen[item.webhook_id].times for item in (REPORT, second)] == [1, 2]
            assert front.quarrels == []
            post(front, dataclasses.replace(second, data={}))
            assert front.quarrels == [second.webhook_id]
        web.shutdown()
