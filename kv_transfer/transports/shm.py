"""ShmTransport: peers on one host. The reader maps the owner's arena and copies out of it: one memcpy per run.

The owner says where its arena is (process id and file descriptor), on which host and in which pid namespace, and which
token its header holds. The reader opens /proc/<pid>/fd/<fd> read-only and believes none of it: the file must be a sealed
memfd of the announced size with the token in its header. So a restarted process with the same pid, or a descriptor that
now means something else, is refused, and a mapping can never fault.

The owner's death does not hurt a reader: the mapping keeps the memory until it is closed, and says nothing about it.
"""

import asyncio
import contextlib
import fcntl
import functools
import mmap
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from kv_transfer.memory.arena import HEADER_BYTES, MAGIC, TOKEN_BYTES, HostArena
from kv_transfer.transport import (
    Capabilities,
    OutOfReach,
    TransportStats,
    check_block_ids,
    does_not_push,
    make_endpoint,
    open_payload,
)
from kv_transfer.transports.memory_copy import copy_runs
from kv_transfer.transports.plan import coalesce
from kv_transfer.transports.read_log import LinkUse, ReadLog, bounded
from protocol.errors import LayoutMismatch, PeerLost
from protocol.ids import TicketId
from protocol.transfer import Endpoint, Introduction, TransportKind
from protocol.wire import encode

NUM_THREADS = 2
INLINE_BYTES = 1 << 20
"""Up to this much is copied where it is asked for, on the event loop: that takes 100 us, and a thread to do it as long to
answer."""

_MADV_POPULATE_READ = 22
"""Of Linux 5.14; the standard library does not name it."""

_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class ShmPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an arena is. Private to this transport: to the protocol it is opaque bytes."""

    host: str
    pid: int
    fd: int
    file_bytes: int
    token: bytes


class ShmTransport:
    kind: TransportKind = "shm"
    capabilities = Capabilities(
        directions=("pull",),
        one_sided=True,
        needs_peer_progress=False,
        crosses_hosts=False,
        device_memory=False,
        owner_checks_lease=False,
        may_abandon=True,
        notices_death=False,
        best_piece_bytes=64 << 10,
    )

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.log = ReadLog()
        self.executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="kv-shm")

    def endpoint(self) -> Endpoint:
        arena = self.arena
        payload = ShmPayload(_this_host(), os.getpid(), arena.fd, arena.file_bytes, arena.token)
        return make_endpoint(self.kind, encode(payload))

    async def connect(self, peer: Introduction, endpoint: Endpoint) -> "ShmLink":
        payload = _payload(peer, endpoint)
        mapping = _map_arena(payload, peer.worker)
        await asyncio.get_running_loop().run_in_executor(self.executor, _populate, mapping)
        return ShmLink(self, peer.worker, peer.num_wire_blocks, mapping)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        self.executor.shutdown(wait=False)


class ShmLink:
    """Owns the mapping of one peer's arena."""

    def __init__(self, transport: ShmTransport, peer: str, num_blocks: int, mapping: mmap.mmap) -> None:
        self._transport = transport
        self._peer = peer
        self._num_blocks = num_blocks
        self._mapping = mapping
        self._address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data) + HEADER_BYTES
        self._use = LinkUse(transport.log, peer)

    async def read(
        self,
        ticket_id: TicketId,  # noqa: ARG002  # there is nobody to show it to: the owner takes no part
        remote_block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        arena = self._transport.arena
        check_block_ids(remote_block_ids, self._num_blocks, f"{self._peer}'s")
        check_block_ids(local_block_ids, arena.num_wire_blocks, "our")
        runs = coalesce(remote_block_ids, local_block_ids)
        num_bytes = len(local_block_ids) * arena.block_bytes
        with self._use.transfer(num_bytes, len(runs)):
            if num_bytes <= INLINE_BYTES:
                copy_runs(self._address, arena, runs)
                return
            copy = functools.partial(copy_runs, self._address, arena, runs)
            copied = asyncio.get_running_loop().run_in_executor(self._transport.executor, copy)
            await bounded(copied, timeout_s, self._peer)

    async def write(
        self,
        local_block_ids: Sequence[int],  # noqa: ARG002
        remote_block_ids: Sequence[int],  # noqa: ARG002
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        raise does_not_push("shm")

    async def close(self) -> None:
        await self._use.close()
        self._mapping.close()


def _payload(peer: Introduction, endpoint: Endpoint) -> ShmPayload:
    payload = open_payload(peer, endpoint, ShmPayload)
    expected = HEADER_BYTES + peer.num_wire_blocks * peer.layout.block_bytes
    if payload.file_bytes != expected or len(payload.token) != TOKEN_BYTES or payload.pid < 1 or payload.fd < 0:
        raise LayoutMismatch(
            f"{peer.worker} announced an arena of {payload.file_bytes} bytes; {peer.num_wire_blocks} blocks of this "
            f"layout take {expected}"
        )
    if payload.host != _this_host():
        if payload.host.split(" ")[0] != _this_host().split(" ")[0]:
            raise OutOfReach(
                f"{peer.worker} is on another host; the shm transport works only within one: set transfer.transport to"
                ' "auto", "nixl" or "tcp" on both'
            )
        raise PeerLost(
            f"{peer.worker} is in another pid namespace; the shm transport works only within one: run both containers with"
            ' hostPID or shareProcessNamespace, or set transfer.transport to "auto", "nixl" or "tcp" on both'
        )
    return payload


def _map_arena(payload: ShmPayload, peer: str) -> mmap.mmap:
    path = f"/proc/{payload.pid}/fd/{payload.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise PeerLost(
            f"this process may not map the KV arena of {peer} ({error}): run both as the same user, or set "
            'transfer.transport to "nixl" or "tcp" on both'
        ) from error
    except OSError as error:
        raise PeerLost(f"the process of {peer} is gone ({error})") from error
    try:
        _check_file(fd, payload, peer)
        mapping = mmap.mmap(fd, payload.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise PeerLost(f"the KV arena of {peer} cannot be mapped: {error}") from error
    finally:
        os.close(fd)
    if mapping[: len(MAGIC) + TOKEN_BYTES] != MAGIC + payload.token:
        mapping.close()
        raise PeerLost(f"what {peer} announced as its KV arena belongs to another process by now")
    return mapping


def _populate(mapping: mmap.mmap) -> None:
    """Map all pages now, so that no transfer pays for first touches. The owner has them all in memory."""
    with contextlib.suppress(OSError):  # only an optimisation, and not every kernel has it
        mapping.madvise(_MADV_POPULATE_READ)


def _check_file(fd: int, payload: ShmPayload, peer: str) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != payload.file_bytes:
        raise PeerLost(f"what {peer} announced as its KV arena is another file by now")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _NEEDED_SEALS != _NEEDED_SEALS:
        raise PeerLost(f"the KV arena of {peer} is not sealed, so it could shrink under the reader")


@functools.cache
def _this_host() -> str:
    """The running kernel and the pid namespace: equal for two processes that can name each other by pid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
