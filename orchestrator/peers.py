"""What the kernel knows of those we talk to: how much of what they were sent they have not taken.

granian's RSGI takes whatever it is given and keeps it until the reader reads, without a limit and
without a word; so whoever sends without end asks here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import IPv6Address, ip_address
from pathlib import Path

#: One line per connection of this network namespace; Linux alone has them.
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def queued_bytes(peers: Collection[str], tables: Sequence[Path] = TABLES) -> dict[str, int]:
    """By peer (`address:port`, as granian spells it): bytes that it has not acknowledged.

    A peer that no table lists is missing: it may be gone, or behind a Unix socket, or this is not
    Linux.
    """
    wanted = {key: peer for peer in peers if (key := _key(peer)) is not None}
    found: dict[str, int] = {}
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, _, remote, _, queues, *_ = line.split()
            peer = wanted.get(_key_of_table(remote))
            if peer is not None:
                found[peer] = found.get(peer, 0) + int(queues.partition(":")[0], 16)
    return found


def _key(peer: str) -> tuple[bytes, int] | None:
    address, _, port = peer.rpartition(":")
    try:
        return _packed(ip_address(address.strip("[]")).packed), int(port)
    except ValueError:
        return None


def _key_of_table(remote: str) -> tuple[bytes, int]:
    """`0100007F:1F90`: words of the machine's byte order, which Linux has little on all of ours."""
    address, _, port = remote.partition(":")
    words = bytes.fromhex(address)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return _packed(packed), int(port, 16)


def _packed(address: bytes) -> bytes:
    """An IPv4 address is the same one when it is mapped into IPv6."""
    if len(address) == 16 and (mapped := IPv6Address(address).ipv4_mapped) is not None:
        return mapped.packed
    return address
