"""TCP ports in front of others, whose connections can be cut, held or slowed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

PIECE = 1 << 16


class Link:
    """A port of this machine that leads to `target`, another one. Made by `Links`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        self.target = target
        self.port = 0
        self._loop = loop
        self._open: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._delay_s = 0.0
        self._refuses = False

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with `refuse` new ones too, until `mend`."""
        self._loop.call_soon_threadsafe(self._cut, refuse)

    def hold(self) -> None:
        """Half-open: connections are taken, and not a byte passes, until `mend`."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def slow(self, delay_s: float) -> None:
        """Each piece comes so many seconds late, until `mend`."""
        self._loop.call_soon_threadsafe(setattr, self, "_delay_s", delay_s)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._mend)

    def _cut(self, refuse: bool) -> None:
        self._refuses = refuse
        for writer in list(self._open):
            _reset(writer)

    def _mend(self) -> None:
        self._refuses, self._delay_s = False, 0.0
        self._flows.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        onward = None
        try:
            if self._refuses:
                return
            back, onward = await asyncio.open_connection("127.0.0.1", self.target)
            self._open.add(onward)
            await asyncio.gather(self._pass(reader, onward), self._pass(back, writer))
        except OSError:
            pass
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._open.discard(end)
                    _reset(end)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(PIECE):
            await self._flows.wait()
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with a RST where anything is under way: the other side must notice."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Links:
    """Runs links on a thread of its own until closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._servers: list[asyncio.Server] = []

    def to(self, target: int) -> Link:
        """A new link to a port of this machine."""
        link = Link(self._loop, target)

        async def listen() -> None:
            server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
            link.port = server.sockets[0].getsockname()[1]
            self._servers.append(server)

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)
        return link

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
