"""InprocTransport: owner and reader in one process. For tests of everything above the seam, with faults to inject.

Faults are set on the owner's transport and act on every read from it.
"""

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kv_transfer.arena import HostArena
from kv_transfer.memory_copy import copy_runs
from kv_transfer.plan import CopyRun, coalesce
from kv_transfer.read_log import LinkUse, ReadLog, bounded
from kv_transfer.transport import Capabilities, MayRead, TransportStats, check_block_ids
from protocol.errors import LeaseExpired, PeerLost, TransferError
from protocol.ids import TicketId
from protocol.transfer import TransportKind, TransportMetadata

_open_transports: dict[bytes, "InprocTransport"] = {}
"""The wire of this transport: payload -> the owner's end."""


@dataclass
class Faults:
    """delay_s: before each copy. fail: raised instead of copying. corrupt: flip a bit of the first block copied.
    stall: nothing is copied before this event is set."""

    delay_s: float = 0.0
    fail: TransferError | None = None
    corrupt: bool = False
    stall: threading.Event | None = None


class InprocTransport:
    kind: TransportKind = "inproc"
    capabilities = Capabilities(
        direction="pull",
        one_sided=True,
        needs_peer_progress=False,
        crosses_hosts=False,
        owner_checks_lease=True,
        may_abandon=True,
    )

    def __init__(self, arena: HostArena, may_read: MayRead) -> None:
        self.arena = arena
        self.may_read = may_read
        self.faults = Faults()
        self.log = ReadLog()
        self.executor = ThreadPoolExecutor(4, thread_name_prefix="kv-inproc")
        self._name = secrets.token_bytes(16)
        _open_transports[self._name] = self

    def local_payload(self) -> bytes:
        return self._name

    async def connect(self, metadata: TransportMetadata) -> "InprocLink":
        return InprocLink(self, metadata.payload, metadata.owner)

    def stats(self) -> TransportStats:
        return self.log.stats()

    async def close(self) -> None:
        _open_transports.pop(self._name, None)
        self.executor.shutdown(wait=False)


class InprocLink:
    def __init__(self, reader: InprocTransport, owner_name: bytes, peer: str) -> None:
        self._reader = reader
        self._owner_name = owner_name
        self._peer = peer
        self._use = LinkUse(reader.log, peer)
        self._owner()

    async def read(
        self, ticket_id: TicketId, remote_block_ids: Sequence[int], local_block_ids: Sequence[int], timeout_s: float
    ) -> None:
        arena = self._reader.arena
        check_block_ids(local_block_ids, arena.num_blocks, "our")
        runs = coalesce(remote_block_ids, local_block_ids)
        with self._use.read(len(local_block_ids) * arena.block_bytes, len(runs)):
            owner = self._owner()
            check_block_ids(remote_block_ids, owner.arena.num_blocks, f"{self._peer}'s")
            if not owner.may_read(ticket_id, remote_block_ids):
                raise LeaseExpired(f"{self._peer} does not lend these blocks to this ticket")
            copy = functools.partial(_copy, owner, arena, runs)
            copied = asyncio.get_running_loop().run_in_executor(self._reader.executor, copy)
            await bounded(copied, timeout_s, self._peer)

    async def close(self) -> None:
        await self._use.close()

    def _owner(self) -> InprocTransport:
        owner = _open_transports.get(self._owner_name)
        if owner is None:
            raise PeerLost(f"{self._peer} is gone")
        return owner


def _copy(owner: InprocTransport, arena: HostArena, runs: list[CopyRun]) -> None:
    faults = owner.faults
    if faults.stall is not None:
        faults.stall.wait()
    if faults.delay_s:
        time.sleep(faults.delay_s)
    if faults.fail is not None:
        raise faults.fail
    copy_runs(owner.arena.address, arena, runs)
    if faults.corrupt and runs:
        arena.block(runs[0].local)[0] ^= 1
