"""Requests to addresses that strangers gave us: customers' webhooks, base models by URL.

A stranger's URL must not become our hand inside our own network. The host's name is resolved
once, every address it has must be public, and the connection goes to exactly such an address
(the name stays in TLS and in the Host header), so a second answer of the DNS changes nothing.
No redirect is followed, no proxy of the environment is used, the port is the usual one, and the
whole request ends within its timeout however slowly the other side drips.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import certifi
from requests.structures import CaseInsensitiveDict

from state.errors import StokerError

#: bytes of an answer's body that are kept; the rest is not read
LARGEST_ANSWER = 64 * 1024

#: Host and port to addresses. Raises `OSError` when there is none.
Resolver = Callable[[str, int], list[str]]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: IPv6 that carries an IPv4 address inside, or is nobody's: Python calls some of them global.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fec0::/10",
    )
)


class GuardError(StokerError):
    """There was no usable answer; another time there may be one."""


class GuardRefused(GuardError):
    """The URL must not be called: it is malformed, or leads into a private network."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer; `body` is cut off at the limit asked for. Header names ignore their case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


def resolve(host: str, port: int) -> list[str]:
    """The system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


def guarded_request(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    timeout: float = 15.0,
    allow_private: bool = False,
    allow_http: bool = False,
    limit: int = LARGEST_ANSWER,
    resolver: Resolver = resolve,
    tls: ssl.SSLContext | None = None,
) -> Response:
    """Make one request; whatever the status of the answer is, it is returned.

    Args:
        timeout: seconds for everything together.
        allow_private: for demos, tests and addresses that an operator chose: any address but
            link-local ones (cloud metadata), any port, and plain http.
        allow_http: plain http on port 80 too.
        limit: bytes of the answer's body to keep.

    Raises:
        GuardRefused: the URL must not be called. Nothing was sent.
        GuardError: no answer in time, or none that is HTTP.
    """
    deadline = time.monotonic() + timeout
    parts, port = _parse(url, allow_private=allow_private, allow_http=allow_http)
    host = parts.hostname or ""
    addresses = _public_addresses(host, port, resolver, deadline, allow_private=allow_private)
    try:
        line = _connect(addresses, port, deadline)
    except OSError as exc:
        raise GuardError(f"{host} cannot be reached: {_words(exc)}") from None
    try:
        if parts.scheme == "https":
            line.secure(tls or _tls(), host)
        return _exchange(line, method, parts, headers or {}, body, limit)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        # ValueError: http.client reads a chunk of -2 bytes
        raise GuardError(f"{host} gave no usable answer: {_words(exc)}") from None
    finally:
        line.end()


def _parse(url: str, *, allow_private: bool, allow_http: bool) -> tuple[SplitResult, int]:
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > 8192:
        raise GuardRefused("the address is not a URL")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise GuardRefused("the address is not a URL") from None
    default = {"https": 443, "http": 80}.get(parts.scheme)
    if default is None or (parts.scheme == "http" and not (allow_http or allow_private)):
        raise GuardRefused("the address must begin with https://")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise GuardRefused("the address must have a host, and no user name or password")
    if port not in (None, default) and not allow_private:
        raise GuardRefused(f"the port must be {default}")
    return parts, default if port is None else port


def _public_addresses(
    host: str, port: int, resolver: Resolver, deadline: float, *, allow_private: bool
) -> list[_Address]:
    answer: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(resolver(host, port))
        except (OSError, ValueError) as exc:  # UnicodeError, for a label that is too long
            answer.put(exc)

    # the system's resolver knows no timeout
    threading.Thread(target=ask, daemon=True, name="resolve").start()
    try:
        found = answer.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise GuardError(f"the address of {host} was not found in time") from None
    if isinstance(found, Exception) or not found:
        raise GuardError(f"the host {host} is not known")
    try:
        addresses = [ipaddress.ip_address(text) for text in found]
    except ValueError:
        raise GuardRefused(f"{host} has an address that is none") from None
    allowed = _not_local_link if allow_private else is_public
    # all of them: which one a later connection takes is chance
    if not all(allowed(address) for address in addresses):
        raise GuardRefused(f"{host} leads to an address that is not public")
    return addresses


def is_public(address: _Address) -> bool:
    """Whether `address` is one of the open internet's, not of a network of somebody's own."""
    if any(address.version == net.version and address in net for net in _NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _not_local_link(address: _Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not (mapped.is_link_local or mapped.is_multicast or mapped.is_unspecified)


class _Line:
    """A socket of which every operation ends by `deadline`; http.client reads and writes it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def _within_time(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._sock

    def secure(self, context: ssl.SSLContext, host: str) -> None:
        self._sock = context.wrap_socket(self._within_time(), server_hostname=host)

    def sendall(self, data: bytes) -> None:
        self._within_time().sendall(data)

    def recv_into(self, buffer: Any) -> int:
        return self._within_time().recv_into(buffer)

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """http.client's, which lets go of the socket before it has read the body."""

    def end(self) -> None:
        self._sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, line: _Line) -> None:
        self._line = line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._line.recv_into(buffer)


def _connect(addresses: list[_Address], port: int, deadline: float) -> _Line:
    failure: OSError = TimeoutError("timed out")
    for index, address in enumerate(addresses):
        # an address that swallows packets leaves time for the others
        left = (deadline - time.monotonic()) / (len(addresses) - index)
        if left <= 0:
            break
        try:
            return _Line(socket.create_connection((str(address), port), timeout=left), deadline)
        except OSError as exc:
            failure = exc
    raise failure


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    # an interpreter from a download may not find the system's certificates
    context.load_verify_locations(certifi.where())
    return context


def _exchange(
    line: _Line,
    method: str,
    parts: SplitResult,
    headers: Mapping[str, str],
    body: bytes,
    limit: int,
) -> Response:
    connection = http.client.HTTPConnection(parts.hostname or "", 0)
    connection.sock = line
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", parts.netloc)
        connection.putheader("Connection", "close")
        if body or method in ("POST", "PUT", "PATCH"):
            connection.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name, value)
    except ValueError as exc:
        raise GuardRefused(f"the request cannot be written: {exc}") from None
    connection.endheaders(body or None)
    with connection.getresponse() as answer:
        kept = answer.read(limit)
        if answer.length and len(kept) < limit:
            raise http.client.IncompleteRead(kept, answer.length)
        return Response(
            status=answer.status, headers=CaseInsensitiveDict(answer.getheaders()), body=kept
        )


def _words(exc: Exception) -> str:
    """What went wrong, for the one who gave the address: no addresses of ours in it."""
    match exc:
        case TimeoutError():
            return "it took too long"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not good ({exc.verify_message})"
        case ssl.SSLError():
            return "it speaks no TLS that we do"
        case ConnectionRefusedError():
            return "the connection was refused"
        case OSError():
            return exc.strerror or type(exc).__name__
        case _:
            return f"not HTTP ({type(exc).__name__})"
