"""Network devices: which of them UCX may use, worked out once at start from the address that the node binds.

UCX, underneath NIXL and ucx, listens on every interface that it finds and knows no authentication. A node that binds one
address gets the interface of that address and the RDMA devices that belong to it, and nothing else. A list that the user
has set stays as it is.
"""

import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from runtime.auth import is_loopback

SETTING = "UCX_NET_DEVICES"
LOOPBACK_DEVICE = "lo"

_HEADER = struct.Struct("=IHHII")
"""nlmsghdr of rtnetlink(7): length, type, flags, sequence, port."""
_ADDRESS = struct.Struct("=BBBBI")
"""ifaddrmsg: family, prefix length, flags, scope, interface index."""
_ATTRIBUTE = struct.Struct("=HH")
"""rtattr: length, type."""
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_REPLY_BYTES = 1 << 16

log = logging.getLogger(__name__)


def confine_ucx(host: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep UCX, in the process of this environment, to the devices of `host`, which is what the node binds. Before UCX
    starts there.

    Where that names no single interface, all stay open, and a warning says which setting closes them.
    """
    if SETTING in environment:
        return
    if is_loopback(host):
        environment[SETTING] = LOOPBACK_DEVICE
        return
    interface = interface_of(host, interface_addresses())
    if interface is None:
        log.warning(
            "KV blocks are served on every network interface, because this node binds %s: set host to one address, or "
            "%s to the devices that peers are to use",
            host,
            SETTING,
        )
        return
    environment[SETTING] = ",".join([interface, *rdma_devices(interface)])
    log.info("KV blocks are served on %s, which has the address %s", environment[SETTING], host)


def interface_of(host: str, addresses: Mapping[str, str]) -> str | None:
    """The interface that has the address `host`, or an address of that name. None for "any" and for a stranger's.

    `addresses` gives the interface of every address of this machine.
    """
    try:
        candidates = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return None
    found = {addresses[text] for text in map(_canonical, candidates) if text in addresses}
    return found.pop() if len(found) == 1 else None


def rdma_devices(interface: str, sysfs: Path = Path("/sys")) -> list[str]:
    """RDMA ports that carry the interface's traffic, as UCX names them ("mlx5_0:1"), in order.

    The kernel tells it in two places: RoCE ports list the interfaces of their GIDs (bonds and VLANs too), and an
    interface of an RDMA card points to its device.
    """
    found = set()
    for port in sorted(sysfs.glob("class/infiniband/*/ports/*")):
        if any(_read(entry) == interface for entry in port.glob("gid_attrs/ndevs/*")):
            found.add(f"{port.parent.parent.name}:{port.name}")
    port_index = _read(sysfs / f"class/net/{interface}/dev_port")
    port_number = int(port_index) + 1 if port_index.isdigit() else 1
    for device in sysfs.glob(f"class/net/{interface}/device/infiniband/*"):
        found.add(f"{device.name}:{port_number}")
    return sorted(found)


def interface_addresses() -> dict[str, str]:
    """Every address of this machine, in its canonical text, with the interface that has it. Empty where the kernel does
    not tell."""
    found: dict[str, str] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(1.0)
            size = _HEADER.size + _ADDRESS.size
            kernel.send(
                _HEADER.pack(size, _RTM_GETADDR, _REQUEST_DUMP, 1, 0) + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            )
            while _read_reply(kernel.recv(_REPLY_BYTES), found):
                pass
    except OSError as error:
        log.warning("the kernel does not tell this machine's addresses: %s", error)
    return found


def _read_reply(reply: bytes, found: dict[str, str]) -> bool:
    """Adds a datagram's addresses to `found`. False after the last one."""
    start = 0
    while start + _HEADER.size <= len(reply):
        size, kind, *_ = _HEADER.unpack_from(reply, start)
        if kind != _RTM_NEWADDR or size < _HEADER.size:
            return False
        _read_address(reply[start + _HEADER.size : start + size], found)
        start += _aligned(size)
    return True


def _read_address(message: bytes, found: dict[str, str]) -> None:
    _, _, _, _, index = _ADDRESS.unpack_from(message)
    start = _ADDRESS.size
    attributes: dict[int, bytes] = {}
    while start + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, start)
        if size < _ATTRIBUTE.size:
            break
        attributes[kind] = message[start + _ATTRIBUTE.size : start + size]
        start += _aligned(size)
    packed = attributes.get(_IFA_LOCAL) or attributes.get(
        _IFA_ADDRESS
    )  # of a point-to-point link the second is the peer's
    if packed is not None:
        found[str(ipaddress.ip_address(packed))] = socket.if_indextoname(index)


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _canonical(address: str) -> str:
    return str(ipaddress.ip_address(address))


def _read(path: Path) -> str:
    """A kernel file's text; nothing where it has none (the kernel refuses to read an unused GID)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
