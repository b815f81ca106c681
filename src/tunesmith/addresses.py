"""Which addresses a caller may have this house connect to, judged after the name is resolved.

Public addresses are open to all. The operator's own networks (loopback, private ranges) are open
only where he lists them: whoever holds a key could otherwise knock on every door behind the
firewall. Addresses that are never anyone's to ask (metadata services, link-local, multicast) are
closed in every spelling.
"""

import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_NEVER = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",
            "169.254.0.0/16",  # link-local, and most clouds' metadata
            "192.0.0.0/24",  # Oracle's metadata
            "100.100.100.200/32",  # Alibaba's
            "168.63.129.16/32",  # Azure's
            "224.0.0.0/4",
            "240.0.0.0/4",
            "::/128",
            "fe80::/10",
            "fec0::/10",
            "ff00::/8",
            "fd00:ec2::/32",  # Amazon's metadata
            "fd20:ce::/32",  # Google's
            "2001::/32",  # Teredo
            "64:ff9b:1::/48",  # NAT64 whose inner address can't be told
        ),
    )
)
_NAT64 = ip_network("64:ff9b::/96")
_COMPATIBLE = ip_network("::/96")


class Refused(Exception):
    """The host can't be reached from here, or must not be: a sentence."""

    def __init__(self, message: str, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final
        """Whether it must not be; else the name is only unknown now."""


def refusal(address: Address, listed: Sequence[Network]) -> str | None:
    """Why an address is closed; None where it is open."""
    inner = _unwrapped(address)
    if any(inner in network for network in _NEVER if network.version == inner.version):
        return f"{address} is never open (link-local, metadata, multicast or reserved)"
    if inner.is_global or any(inner in one for one in listed if one.version == inner.version):
        return None
    return (
        f"{address} is not on the public Internet, and the operator has not opened it "
        "(TUNESMITH_WEBHOOK_NETWORKS)"
    )


def _unwrapped(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one: mapped, compatible, 6to4, NAT64."""
    if isinstance(address, IPv4Address):
        return address
    found = address.ipv4_mapped or address.sixtofour
    if found is not None:
        return found
    is_inner = address in _NAT64 or (address in _COMPATIBLE and int(address) > 1)
    return IPv4Address(int(address) & 0xFFFFFFFF) if is_inner else IPv6Address(int(address))


Resolve = Callable[[str, int], Iterable[str]]


def resolve(host: str, port: int) -> list[str]:
    """Addresses in the order in which they should be tried. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def open_addresses(
    host: str, port: int, listed: Sequence[Network], look_up: Resolve = resolve
) -> list[str]:
    """The addresses of a host that are open. Blocks. Raises Refused where there is none."""
    try:
        texts = list(look_up(host, port))
    except (OSError, UnicodeError):
        raise Refused(f"the name {host!r} can't be resolved", False) from None
    found, reasons = [], []
    for text in texts:
        reason = refusal(ip_address(text), listed)
        if reason is None:
            found.append(text)
        else:
            reasons.append(reason)
    if not found:
        raise Refused(reasons[0] if reasons else f"{host!r} has no address", bool(reasons))
    return found
