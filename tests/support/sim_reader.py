"""SimReader: a node that fetches: real importer and hand-offs; it stands for the engine behind them, and judges."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from decode_node.handoff import Handoffs
from engine.events import Reserved
from kv_transfer.handoff.fetch import FetchResult
from kv_transfer.handoff.imports import Importer, OnArrived
from kv_transfer.lending.borrowing import BorrowContext
from kv_transfer.lending.holders import Holders
from kv_transfer.meeting.peers import Reader
from kv_transfer.memory.arena import HostArena
from kv_transfer.transports.factory import lend_nothing
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.transport_set import TransportSet
from protocol.errors import Cancelled, HeadraceError, TransferError
from protocol.ids import RequestId, WorkerId, new_incarnation
from protocol.phases import HandoffPhases
from protocol.tokens import SampledToken
from protocol.transfer import KVSource, TransferTicket
from tests.support.memory_network import MemoryRpcClient
from tests.support.sim_blocks import LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS, BlockStore, Prompt
from tests.support.sim_scene import CLUSTER_KEY, Scene


class _TimedImporter(Importer):
    """Notes when a fetch takes longer than it may."""

    world: Scene

    async def fetch(
        self,
        ticket: TransferTicket,
        local_block_ids: Sequence[int],
        num_cached_blocks: int,
        deadline_s: float,
        on_arrived: OnArrived | None = None,
    ) -> FetchResult:
        started = self.world.loop.time()
        try:
            return await super().fetch(ticket, local_block_ids, num_cached_blocks, deadline_s, on_arrived)
        finally:
            took_s = self.world.loop.time() - started
            self.world.expect(took_s <= deadline_s + 1e-3, f"a fetch of {deadline_s} s took {took_s} s")


@dataclass
class _Import:
    prompt: Prompt
    incarnation: str
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    holds: bool = False


NOBODY_ELSE = Holders((), ())


async def _nobody_knows(_source: KVSource, _num_bytes: int) -> float | None:
    return None


class SimReader:
    """Also the engine of its Handoffs: `activate` and `abandon_import` are where the outcome of a hand-off is judged."""

    def __init__(self, world: Scene, worker_id: str) -> None:
        self._world = world
        self.arena = HostArena(NUM_BLOCKS, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
        self.store = BlockStore(self.arena)
        self.transport = InprocTransport(self.arena, lend_nothing)
        self._transports = TransportSet(self.arena, [self.transport])
        self._staging = world.make_staging(self.arena)
        self.imports: dict[RequestId, _Import] = {}
        self._client = MemoryRpcClient(world.network, CLUSTER_KEY)
        self.importer = _TimedImporter(
            client=self._client,
            transports=self._transports,
            staging=self._staging,
            reader=Reader(WorkerId(worker_id), new_incarnation(), LAYOUT),
            options=world.options,
            clock=world.clock,
        )
        self.importer.world = world
        borrows_nothing = BorrowContext(
            importer=self.importer,
            reader=WorkerId(worker_id),
            layout=LAYOUT,
            stall_timeout_s=world.options.stall_timeout_s,
            policy="never",
            estimate_seconds=_nobody_knows,
            compute_tokens_per_s=lambda: None,
        )
        self._handoffs = Handoffs(self, borrows_nothing)  # type: ignore[arg-type]  # see above
        self._stopping = asyncio.Event()

    async def live(self) -> None:
        async with self._client, self.importer, self._handoffs:
            await self._stopping.wait()
        await self._staging.close()
        await self._transports.close()

    def stop(self) -> None:
        self._stopping.set()

    def fetch(self, ticket: TransferTicket, prompt: Prompt, num_cached_blocks: int, deadline_s: float) -> bool:
        """False if there is no room, or the request is here already."""
        block_ids = None if prompt.request_id in self.imports else self.store.take(prompt.num_blocks)
        if block_ids is None:
            return False
        cached = min(num_cached_blocks, prompt.num_blocks)
        self.store.fill(block_ids[:cached], prompt)
        self.imports[prompt.request_id] = _Import(prompt, ticket.incarnation, block_ids, cached)
        self._handoffs.start(Reserved(prompt.request_id, block_ids, cached), ticket, NOBODY_ELSE, deadline_s)
        return True

    def cancel(self, request_id: RequestId) -> None:
        self._handoffs.cancel([request_id])

    def activate(
        self, request_id: RequestId, first_token: SampledToken, computed_at: float, _landing: HandoffPhases
    ) -> None:
        arrived = self.imports[request_id]
        expect = self._world.expect
        expect(not arrived.holds, f"{request_id} is activated twice")
        expect(first_token == arrived.prompt.first_token, f"{request_id} got the first token of something else")
        expect(computed_at <= self._world.loop.time(), f"{request_id} was computed in the future")
        differing = self.store.differing(arrived.block_ids, arrived.prompt)
        expect(not differing, f"blocks {differing} of {request_id} are not what was computed")
        arrived.holds = True
        self._world.outcomes["activated"] += 1

    def fail_import(self, request_id: RequestId, _error: HeadraceError) -> None:
        """Its blocks stay with the transfer until `abandon_import`."""
        self._world.expect(not self.imports[request_id].holds, f"{request_id} fails after it was activated")

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        failed = self.imports.pop(request_id)
        expect = self._world.expect
        num_valid = num_valid_tokens // LAYOUT.block_size
        expect(not failed.holds, f"{request_id} is abandoned after it was activated")
        expect(isinstance(error, TransferError | Cancelled), f"{request_id} failed with {error!r}")
        expect(failed.num_cached_blocks <= num_valid <= len(failed.block_ids), f"{num_valid} blocks are valid?")
        differing = self.store.differing(failed.block_ids[:num_valid], failed.prompt)
        expect(not differing, f"blocks {differing} of {request_id} are called valid and are not")
        self.store.give_back(failed.block_ids)
        self._world.outcomes[getattr(error, "reason", error).code] += 1

    def finish(self, request_id: RequestId) -> None:
        """Its last token is sampled: the blocks go to somebody else, if they are still what they were."""
        done = self.imports[request_id]
        if done.holds:
            differing = self.store.differing(done.block_ids, done.prompt)
            self._world.expect(not differing, f"blocks {differing} of {request_id} changed while in use")
            del self.imports[request_id]
            self.store.give_back(done.block_ids)
