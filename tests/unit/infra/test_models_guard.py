"""The guard between strangers' addresses and our own network."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from infra.guard import GuardError, GuardRefused, guarded_request, is_public


class Speaker:
    """A TCP server that answers each connection with fixed bytes, and keeps what it was sent."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        self.drip_s = 0.0
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/path?q=1"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                self.heard.append(connection.recv(65536))
                self._speak(connection)

    def _speak(self, connection: socket.socket) -> None:
        try:
            if not self.drip_s:
                connection.sendall(self.answer)
                return
            for byte in self.answer:
                connection.sendall(bytes([byte]))
                if self._stop.wait(self.drip_s):
                    return
        except OSError:
            return

    def close(self) -> None:
        self._stop.set()
        # wakes the accepting thread
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(5)


@pytest.fixture
def speaker() -> Iterator[Speaker]:
    made = Speaker()
    yield made
    made.close()


def knows(*addresses: str) -> Callable[[str, int], list[str]]:
    return lambda host, port: list(addresses)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.1.2.3", "192.0.0.8", "192.0.2.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::",
        "2001::1", "2001:db8::1", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
        "100::1",
    ],
)  # fmt: skip
def test_addresses_of_private_networks_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/",
        "https://127.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/", "https://localhost/", "https://0/", "https://[fe80::1%25lo]/",
    ],
)  # fmt: skip
def test_ways_to_write_our_own_machine_are_refused(url: str) -> None:
    with pytest.raises(GuardError) as caught:
        guarded_request("GET", url, timeout=5)
    assert isinstance(caught.value, GuardRefused) or "not known" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "ftp://example.org/", "file:///etc/passwd", "gopher://example.org",
        "https://example.org:22/", "https://example.org:443443/", "https://user@example.org/",
        "https://user:word@example.org/", "https:///path", "https://", "", "example.org",
        "https://exa mple.org/", "https://example.org/\r\nX: y", "https://example.org\\@127.0.0.1/",
        "https://exämple.org/", "https://[::1/", "https://example.org/" + "x" * 9000,
    ],
)  # fmt: skip
def test_addresses_that_are_no_plain_https_url_are_refused(url: str) -> None:
    def never(host: str, port: int) -> list[str]:
        raise AssertionError("nothing may be asked")

    with pytest.raises(GuardRefused):
        guarded_request("GET", url, resolver=never)


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(GuardRefused, match="not public"):
        guarded_request("GET", "https://example.org/", resolver=knows("8.8.8.8", "10.0.0.1"))


def test_name_that_changes_its_address_after_the_check_gains_nothing(speaker: Speaker) -> None:
    answers = [["127.0.0.1"], ["10.9.9.9"]]
    answer = guarded_request(
        "GET",
        f"http://rebind.example:{speaker.port}/",
        allow_private=True,
        resolver=lambda host, port: answers.pop(0),
    )
    assert answer.status == 200
    assert answers == [["10.9.9.9"]]  # asked once; the connection took the address of that answer
    assert f"Host: rebind.example:{speaker.port}\r\n".encode() in speaker.heard[0]


def test_cloud_metadata_is_refused_even_where_private_addresses_may_be_called() -> None:
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "::"):
        with pytest.raises(GuardRefused):
            guarded_request("GET", "http://x.test/", allow_private=True, resolver=knows(address))


def test_request_arrives_as_it_was_asked_for(speaker: Speaker) -> None:
    speaker.answer = b"HTTP/1.1 202 Accepted\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nok"
    answer = guarded_request(
        "POST", speaker.url, headers={"webhook-id": "1"}, body=b"{}", allow_private=True
    )
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (202, b"ok", "7")
    head, _, body = speaker.heard[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /path?q=1 HTTP/1.1\r\n")
    assert b"webhook-id: 1" in head
    assert b"Content-Length: 2" in head
    assert body in (b"{}", b"")  # the body may come in a packet of its own


def test_redirect_is_an_answer_and_not_followed(speaker: Speaker) -> None:
    speaker.answer = b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n"
    assert guarded_request("GET", speaker.url, allow_private=True).status == 302
    assert len(speaker.heard) == 1


def test_proxy_of_the_environment_is_not_used(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert guarded_request("GET", speaker.url, allow_private=True).status == 200


def test_long_answer_is_cut_off(speaker: Speaker) -> None:
    speaker.answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000
    assert len(guarded_request("GET", speaker.url, allow_private=True).body) == 65536


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"\x00\xff" * 40_000,
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_answer_that_is_not_whole_http_is_an_error(speaker: Speaker, answer: bytes) -> None:
    speaker.answer = answer
    with pytest.raises(GuardError, match="no usable answer"):
        guarded_request("GET", speaker.url, allow_private=True)


def test_answer_that_drips_ends_within_the_timeout(speaker: Speaker) -> None:
    speaker.answer, speaker.drip_s = b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000, 0.02
    began = time.monotonic()
    with pytest.raises(GuardError, match="too long"):
        guarded_request("GET", speaker.url, allow_private=True, timeout=0.3)
    assert time.monotonic() - began < 10  # it would drip for two minutes


def test_resolver_that_hangs_ends_within_the_timeout() -> None:
    gate = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        gate.wait(30)
        return []

    with pytest.raises(GuardError, match="not found in time"):
        guarded_request("GET", "https://slow.example/", resolver=hang, timeout=0.1)
    gate.set()


def test_nobody_listening_and_nobody_known_are_errors_without_addresses() -> None:
    with pytest.raises(GuardError, match="refused") as caught:
        guarded_request("GET", "http://x.test:9/", allow_private=True, resolver=knows("127.0.0.1"))
    assert "127.0.0.1" not in str(caught.value)

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(GuardError, match="not known"):
        guarded_request("GET", "https://nowhere.example/", resolver=unknown)


def test_https_without_tls_on_the_other_side_is_an_error(speaker: Speaker) -> None:
    url = speaker.url.replace("http:", "https:")
    with pytest.raises(GuardError, match="TLS"):
        guarded_request("GET", url, allow_private=True)


def test_header_that_would_begin_another_is_refused(speaker: Speaker) -> None:
    with pytest.raises(GuardRefused):
        guarded_request("GET", speaker.url, headers={"a": "b\r\nc: d"}, allow_private=True)
    assert speaker.heard in ([], [b""])
