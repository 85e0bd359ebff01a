"""The lists of the API that grow, as live streams: `Accept: text/event-stream`.

Each item is a message: `id:` is its seq, `event:` its type, `data:` the item's JSON as in the list.
`Last-Event-ID`, or `?after=`, resumes without a gap or a repeat. When the job is over and all was
sent, `event: end` says so and the stream ends; whoever then comes back with the last id gets 204,
by which a browser's EventSource knows to stop.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flask import Response, request

from orchestrator import streams
from orchestrator.api import auth
from orchestrator.api.keys import hash_of
from orchestrator.api.problems import Refusal
from orchestrator.streams import Entry, News
from state.job import Job
from state.store import Transaction

MIMETYPE = "text/event-stream"
#: The operations that answer with a stream where they are asked for one.
FOLLOWED = frozenset({"list_events", "list_logs"})
#: Items read at once for somebody who is behind.
AT_ONCE = 200
#: Of several items with one seq, all but the last have their number behind it.
_ID = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?")


class Item(Protocol):
    @property
    def seq(self) -> int: ...
    def model_dump_json(self) -> str: ...


class Page(Protocol):
    @property
    def data(self) -> Sequence[Item]: ...
    @property
    def has_more(self) -> bool: ...
    @property
    def next_after(self) -> int: ...


class Reading(Protocol):
    """Reads a page of what a job has more and more of, by seq."""

    def __call__(self, tx: Transaction, job: Job, *, after: int, limit: int) -> Page: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a reader stands: it has all up to `seq`, and `some` items of the next one."""

    seq: int = 0
    some: int = 0

    @classmethod
    def of(cls, id: str) -> Place:
        """The place that an id of ours names. Raises: Refusal 422 for any other text."""
        found = _ID.fullmatch(id)
        if found is None:
            fault = ("Last-Event-ID", "is not an id of this stream")
            raise Refusal(422, "invalid", "the stream cannot be resumed there", errors=[fault])
        seq, some = int(found[1]), int(found[2] or 0)
        return cls(seq=max(0, seq - 1), some=some) if found[2] else cls(seq=seq)


@dataclass(frozen=True)
class JobList:
    """A list of one job's, followed until the job is over."""

    job: str
    read: Reading = field(repr=False)
    #: What a message is called whose item has no type.
    event: str = "item"

    @property
    def jobs(self) -> Collection[str]:
        return (self.job,)

    def head(self, tx: Transaction, jobs: Mapping[str, Job]) -> Job:
        return jobs[self.job]

    def news(self, tx: Transaction, since: Place, head: Job) -> News:
        if since.seq >= head.seq:  # also for somebody who claims to know what is to come
            return self._last(b"", head)
        page = self.read(tx, head, after=since.seq, limit=AT_ONCE)
        # what was committed since `head` was read comes with the next look
        items = [item for item in page.data if item.seq <= head.seq]
        data = b"".join(self._messages(items, since))
        if page.has_more and page.next_after < head.seq:
            return News(data=data, at=Place(seq=page.next_after), more=True)
        return self._last(data, head)

    def _last(self, data: bytes, head: Job) -> News:
        if head.terminal:
            data += streams.message(f'{{"status": "{head.status}"}}', event="end")
        return News(data=data, at=Place(seq=head.seq), over=head.terminal)

    def _messages(self, items: Sequence[Item], since: Place) -> list[bytes]:
        made: list[bytes] = []
        count = 0
        for at, item in enumerate(items):
            first = at == 0 or items[at - 1].seq != item.seq
            last = at + 1 == len(items) or items[at + 1].seq != item.seq
            count = 1 if first else count + 1
            if item.seq == since.seq + 1 and count <= since.some:
                continue
            made.append(
                streams.message(
                    item.model_dump_json(),
                    event=getattr(item, "type", self.event),
                    id=str(item.seq) if last else f"{item.seq}.{count}",
                )
            )
        return made


def wanted() -> bool:
    """Whether the caller asks for a stream rather than a page."""
    best = request.accept_mimetypes.best_match(["application/json", MIMETYPE])
    return best == MIMETYPE


def follow(job: Job, read: Reading, after: int, event: str = "item") -> Response:
    """The stream of a job that the caller may see. Raises: Refusal 422, 429 or 503."""
    named = request.headers.get("Last-Event-ID", "").strip()
    since = Place.of(named) if named else Place(seq=after)
    if named and job.terminal and since.seq >= job.seq:
        return Response(status=204)
    key = request.headers["Authorization"].split()[-1]
    return (
        streams.hub()
        .open(
            JobList(job.id, read, event),
            since=since,
            entry=Entry(hash_of(key)),
            owner=auth.caller().owner,
        )
        .response()
    )


def describe(spec: dict[str, Any]) -> None:
    """Say in the API's description which lists are streams, too."""
    for path in spec["paths"].values():
        for operation in path.values():
            if operation.get("operationId") in FOLLOWED:
                content = operation["responses"]["200"]["content"]
                content[MIMETYPE] = {"schema": {"type": "string"}}
