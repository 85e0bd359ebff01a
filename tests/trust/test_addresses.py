"""No address from a stranger, and no name server of theirs, has us call into a private network.

Looked at where it counts: at the resolver's answers and at every `connect` that follows.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import guard
from infra.models import BaseError, BaseResolver

#: Written down anew from IANA's registries of special addresses, not taken from the code.
SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23",
        "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10",
        "fec0::/10", "ff00::/8",
    )
]  # fmt: skip


def is_special(address: str) -> bool:
    read = ipaddress.ip_address(address.partition("%")[0])
    return any(read.version == network.version and read in network for network in SPECIAL)


@dataclass
class Network:
    """A name server that answers as told, and a wire on which every call is refused, and noted."""

    #: What each lookup of any name brings; the last one is repeated.
    answers: list[list[str]] = field(default_factory=lambda: [["93.184.215.14"]])
    asked: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)

    def getaddrinfo(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        with contextlib.suppress(ValueError, OSError):
            # as the C library does: 2130706433, 0x7f.1 and 127.1 are all addresses to it
            literal = socket.inet_ntoa(socket.inet_aton(host)) if ":" not in host else host
            return [self._row(str(ipaddress.ip_address(literal.partition("%")[0])), port)]
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [self._row(address, port) for address in found]

    def _row(self, address: str, port: int) -> Any:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return (family, socket.SOCK_STREAM, 6, "", (address, port))

    def connect(self, _: socket.socket, address: Any) -> None:
        self.called.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")


@contextlib.contextmanager
def network_of(*answers: list[str]) -> Iterator[Network]:
    network = Network(list(answers) or [["93.184.215.14"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", network.getaddrinfo)
        patch.setattr(socket.socket, "connect", lambda *args: network.connect(*args))
        yield network


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of() as network:
        yield network


def call(url: str = "https://customer.example/hook") -> None:
    with contextlib.suppress(guard.GuardError):
        guard.guarded_request("POST", url, body=b"{}", timeout=5)


def test_the_net_that_is_watched_is_the_one_that_is_used(network: Network) -> None:
    call()
    assert (network.asked[:1], network.called) == (["customer.example"], ["93.184.215.14"])


@pytest.mark.parametrize("private", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1"])
def test_a_name_that_turns_private_at_the_second_look_is_looked_at_once(private: str) -> None:
    """DNS rebinding: harmless for the check, ours for the connection."""
    with network_of(["93.184.215.14"], [private]) as network:
        call()
        assert network.called == ["93.184.215.14"]
        call()
        assert network.called == ["93.184.215.14"], "the next call looks anew, and is refused"


@pytest.mark.parametrize(
    "found",
    [
        ["93.184.215.14", "127.0.0.1"],
        ["10.0.0.1", "93.184.215.14"],
        ["93.184.215.14", "::ffff:127.0.0.1"],
        ["2606:4700::1", "64:ff9b::a00:1"],
        ["93.184.215.14", "fe80::1%eth0"],
        ["93.184.215.14", "not an address"],
        [],
    ],
)
def test_one_bad_address_of_several_spoils_them_all(found: list[str]) -> None:
    with network_of(found) as network:
        call()
        assert network.called == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001",
        "0", "0.0.0.0", "10.1",  # noqa: S104 -- called, not listened on
        "[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1%25eth0]", "[fec0::1]",
        "169.254.169.254", "[fd00:ec2::254]", "100.100.100.200", "192.168.0.1", "172.31.255.255",
        "user@127.0.0.1", "customer.example@127.0.0.1", "127.0.0.1#@customer.example",
        "127.0.0.1\\@customer.example", "customer.example\\@127.0.0.1", "127.0.0.1?@a.example",
        "customer.example:80", "127.0.0.1:443", "customer.example:443@127.0.0.1", "[::1]:443",
        "127.0.0.1.", "127。0。0。1", "①②⑦.0.0.1", "localhost%00.customer.example", " 127.0.0.1",
        "127.0.0.1%20.customer.example", "customer.example\t@127.0.0.1", "[127.0.0.1]", "[v1.a]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["https", "http", "HTTPS", "//", "gopher"])
def test_no_way_to_write_a_host_leads_into_a_private_network(
    network: Network, scheme: str, host: str
) -> None:
    call(f"{scheme}://{host}/" if scheme != "//" else f"//{host}/")
    assert [address for address in network.called if is_special(address)] == []


addresses = (
    st.ip_addresses(v=4)
    | st.ip_addresses(v=6)
    | st.sampled_from(SPECIAL).flatmap(lambda network: st.ip_addresses(network=network))
    | st.ip_addresses(v=4).map(lambda address: ipaddress.ip_address(f"::ffff:{address}"))
    | st.ip_addresses(v=4).map(lambda address: ipaddress.ip_address(f"64:ff9b::{address}"))
).map(str)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(addresses, max_size=3), min_size=1, max_size=3))
def test_whatever_name_servers_say_only_the_open_internet_is_called(
    answers: list[list[str]],
) -> None:
    with network_of(*answers) as network:
        for _ in answers:
            call()
        assert [address for address in network.called if is_special(address)] == []


@settings(max_examples=120, deadline=None)
@given(
    st.text(alphabet="htps:/@[]#?%\\.0127xfe ", max_size=40).map("https://".__add__)
    | st.text(max_size=40)
    | st.text(max_size=20).map(lambda text: f"https://127.0.0.1{text}")
    | st.text(max_size=20).map(lambda text: f"https://{text}@127.0.0.1/")
)
def test_whatever_text_is_an_address_only_the_open_internet_is_called(url: str) -> None:
    with network_of(["93.184.215.14"]) as network:
        call(url)
        assert [address for address in network.called if is_special(address)] == []


# --- redirects: the customer's endpoint, and the place of a base model --------------------------


class Site:
    """In place of the wire: answers each URL as told, and has every other one really asked for."""

    def __init__(self, **pages: guard.Response) -> None:
        self.pages = {f"https://{name}.example/model": page for name, page in pages.items()}
        self.asked: list[str] = []

    def __call__(self, method: str, url: str, **how: Any) -> guard.Response:
        self.asked.append(url)
        assert how.get("allow_private") is False, "a customer's address is no operator's choice"
        if url in self.pages:
            return self.pages[url]
        return guard.guarded_request(method, url, **how)


def sends_to(place: str) -> guard.Response:
    return guard.Response(status=302, headers={"Location": place}, body=b"")


@pytest.mark.parametrize(
    "place",
    [
        "https://127.0.0.1/model", "https://169.254.169.254/latest/meta-data", "https://[::1]/",
        "https://user@10.0.0.1/", "//127.0.0.1/model", "http://127.0.0.1/model", "https://[::1",
        "https://internal.example/model", "gopher://127.0.0.1/", "", "https://\u2460.0.0.1/",
        "https://a.example/model", "file:///etc/passwd", "https://127.0.0.1:6379/",
    ],
)  # fmt: skip
def test_a_base_models_place_may_not_send_us_inside(place: str) -> None:
    site = Site(a=sends_to("https://b.example/model"), b=sends_to(place))
    resolver = BaseResolver(None, civitai_url="", huggingface_url="", private=False, http=site)
    with network_of(["10.0.0.5"]) as network:
        with pytest.raises(BaseError):
            resolver.resolve("https://a.example/model", "sd1")
        assert network.called == []
    assert len(site.asked) <= 5
