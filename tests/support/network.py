"""PrivateNetwork: two network namespaces and the one cable between them, which a test can pull out.

    | namespace 0 | device ---- veth pair ---- device | namespace 1 |

Needs root and iproute2; `why_no_private_network` says what is missing. Nothing of the host's own network is touched.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC, MS_SLAVE, MNT_DETACH = 0x4000, 0x80000, 2

UP_TIMEOUT_S = 10.0

IP = shutil.which("ip") or "ip"


@dataclass(frozen=True)
class End:
    namespace: str
    device: str
    address: str


@dataclass(frozen=True)
class PrivateNetwork:
    ends: tuple[End, End]

    def cut(self) -> None:
        """Packets vanish both ways; neither side is told."""
        _ip("-n", self.ends[0].namespace, "link", "set", self.ends[0].device, "down")

    def mend(self) -> None:
        _ip("-n", self.ends[0].namespace, "link", "set", self.ends[0].device, "up")
        self.wait_until_up()

    def wait_until_up(self) -> None:
        """Both ends take a moment to notice; until then there is no such device to whoever starts."""
        deadline = time.monotonic() + UP_TIMEOUT_S
        while not all("state UP" in _ip("-n", end.namespace, "link", "show", end.device) for end in self.ends):
            assert time.monotonic() < deadline, "the private network does not come up"
            time.sleep(0.01)


@contextlib.contextmanager
def private_network() -> Iterator[PrivateNetwork]:
    name = f"headrace-{os.getpid()}"
    ends = (End(f"{name}-0", "hr0", "198.18.0.1"), End(f"{name}-1", "hr1", "198.18.0.2"))
    try:
        for end in ends:
            _ip("netns", "add", end.namespace)
            _ip("-n", end.namespace, "link", "set", "lo", "up")
        _ip("-n", ends[0].namespace, "link", "add", "hr0", "type", "veth", "peer", "name", "hr1", "netns", f"{name}-1")
        for end in ends:
            _ip("-n", end.namespace, "address", "add", f"{end.address}/30", "dev", end.device)
            _ip("-n", end.namespace, "link", "set", end.device, "up")
        network = PrivateNetwork(ends)
        network.wait_until_up()
        yield network
    finally:
        for end in ends:
            subprocess.run([IP, "netns", "delete", end.namespace], capture_output=True, check=False)


def enter_namespace(namespace: str) -> None:
    """Move this process into one end's network, for good; before it starts threads or opens sockets.

    Libraries look for network devices in /sys, which shows those of the namespace that it was mounted in: so it is
    mounted anew, for this process alone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as handle:
        _check(libc.setns(handle.fileno(), CLONE_NEWNET))
    _check(libc.unshare(CLONE_NEWNS))
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
    _check(libc.umount2(b"/sys", MNT_DETACH))
    _check(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))


@functools.cache
def why_no_private_network() -> str | None:
    """None where one can be made."""
    if os.geteuid() != 0:
        return "making a network namespace takes root"
    if shutil.which("ip") is None:
        return "making a network namespace takes iproute2"
    try:
        with private_network():
            return None
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespace: {error.stderr.strip()}"


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def _ip(*arguments: str) -> str:
    return subprocess.run([IP, *arguments], capture_output=True, check=True, text=True).stdout
