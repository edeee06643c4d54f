"""A reader of KV blocks for tests: arena, transport and importer in the test's own event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from kv_transfer.handoff.imports import FetchFailed, Importer
from kv_transfer.meeting.link_report import LinkReporter
from kv_transfer.meeting.peers import Reader
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import HostStaging, Staging
from kv_transfer.transport import Link, Transport, find_endpoint
from kv_transfer.transports.factory import start_transports
from kv_transfer.transports.transport_set import TransportSet
from protocol.errors import TransferError
from protocol.ids import WorkerId, new_incarnation
from protocol.kv_layout import KVLayout
from protocol.transfer import Direction, Introduction, TransferTicket, TransportKind
from runtime.clock import Clock, MonotonicClock
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient
from tests.support.kv_owner import CLUSTER_KEY, LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS

READER = WorkerId("decode-0")


@dataclass
class ReaderNode:
    staging: Staging
    transports: TransportSet
    importer: Importer
    client: RpcClient
    reporter: LinkReporter

    @property
    def transport(self) -> Transport:
        """The first, which is the only one where a test names a kind."""
        return next(iter(self.transports))

    @property
    def arena(self) -> HostArena:
        assert isinstance(self.staging.arena, HostArena)
        return self.staging.arena

    async def connect(self, peer: Introduction) -> Link:
        return await self.transport.connect(peer, find_endpoint(peer, self.transport.kind))


@contextlib.asynccontextmanager
async def running_reader(
    kind: TransportKind,
    *,
    direction: Direction = "pull",
    stall_timeout_s: float = 2.0,
    layout: KVLayout = LAYOUT,
    host: str = "127.0.0.1",
    worker: WorkerId = READER,
    options: TransferOptions | None = None,
    staging: Staging | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[ReaderNode]:
    """`staging`: where the blocks go, if not into an arena of zeros. Closed in the end with its arena."""
    incarnation = new_incarnation()
    options = options or TransferOptions(transport=kind, direction=direction, stall_timeout_s=stall_timeout_s)
    staging = staging or HostStaging(HostArena(NUM_BLOCKS, layout.block_bytes, NUM_SCRATCH_BLOCKS))
    arena = staging.arena
    transports = start_transports(options, arena, incarnation=incarnation, host=host)
    try:
        async with RpcClient(CLUSTER_KEY) as client:
            importer = Importer(
                client=client,
                transports=transports,
                staging=staging,
                reader=Reader(worker, incarnation, layout),
                options=options,
                clock=clock or MonotonicClock(),
            )
            async with importer:
                reporter = LinkReporter(worker, transports, MonotonicClock(), peers=importer.peers)
                yield ReaderNode(staging, transports, importer, client, reporter)
    finally:
        await staging.close()
        await transports.close()
        if isinstance(arena, HostArena):
            arena.close()


async def refusal(reader: ReaderNode, ticket: TransferTicket, deadline_s: float = 5.0) -> TransferError:
    """Why a fetch into blocks 0 and 1 failed. Says as well that the blocks are safe afterwards."""
    with pytest.raises(FetchFailed) as failed:
        await reader.importer.fetch(ticket, [0, 1], 0, deadline_s)
    async with asyncio.timeout(5):
        await failed.value.settled.wait()
    return failed.value.reason
