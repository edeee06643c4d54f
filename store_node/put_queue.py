"""PutQueue: the blocks of a node's host tier on their way to store nodes, so that they outlive this one.

                               ╭──▶ lane of store a ──put──▶ kept there (or refused, or dropped, and counted)
    stored here ──▶ waiting ───┼──▶ lane of store b
                               ╰──▶ ...

A copy leaves as soon as the blocks are in the host tier, not when that gives them up: a node that dies gives nothing up in
time. With write-back those are the blocks that the device forgot; with write-through, all. A chain goes to one store. Bounded:
what does not fit, or whose store does not answer, is dropped, because a put is only ever a second copy. A store that fails is
left alone for a while, and what waited for it goes to the others. What a store keeps is not offered again until
it may have lost it (store_node.kept_blocks).

`stored` is called from any thread; the rest lives on the event loop. `run` is a duty of the node.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kv_store.tiers import StoredBlock
from protocol.errors import HeadraceError
from protocol.ids import Incarnation, new_request_id
from protocol.kv_blocks import CachedBlock
from protocol.store import MAX_PUT_BLOCKS, StorePut, StorePutDone
from protocol.transfer import KVSource
from runtime.clock import Clock
from runtime.rpc_client import RpcClient
from store_node.kept_blocks import KeptBlocks
from store_node.placement import store_for
from store_node.put_lane import PutLane
from store_node.put_receiver import PUT_PATH
from store_node.waiting_blocks import WaitingBlocks

MAX_WAITING_BLOCKS = 1 << 14
"""For a store to be chosen, and then in each lane."""

MAX_PLACED = 1 << 16
"""Blocks of which it is remembered by what their chain is placed."""

GATHER_S = 0.02
"""How long blocks wait for those that follow them: a batch costs little more than a block."""

ANSWER_S = 1.0
"""How much longer than a put may take its answer is waited for."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PutStats:
    """`num_put` blocks were taken over by stores; `num_refused` they do not keep: for want of room, or because
    they did not come in time."""

    num_put: int
    num_refused: int
    num_dropped: int
    num_waiting: int


class PutQueue:
    """`myself(num_blocks)`: this node's host tier as a source of so many blocks, of `block_bytes` each. `stores()`: control
    URLs, and the lives that they are known to be in; asked for each batch, since stores come and go."""

    def __init__(
        self,
        client: RpcClient,
        myself: Callable[[int], KVSource],
        stores: Callable[[], Mapping[str, Incarnation | None]],
        clock: Clock,
        block_bytes: int,
    ) -> None:
        self._client = client
        self._myself = myself
        self._stores = stores
        self._clock = clock
        self._block_bytes = block_bytes
        self._loop = asyncio.get_running_loop()
        self._waiting = WaitingBlocks()
        self._lanes: dict[str, PutLane] = {}
        self._under_way: set[bytes] = set()
        self._chain_of: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept = KeptBlocks(clock)
        self._filled = asyncio.Event()
        self._num_put = self._num_refused = self._num_dropped = 0

    def stats(self) -> PutStats:
        return PutStats(self._num_put, self._num_refused, self._num_dropped, len(self._under_way))

    # As a TierListener.

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        chosen = [each.block for each in blocks if each.tier == "host"]
        if chosen and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._add, chosen)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        """What has gone meanwhile the store is not lent any more, and takes no harm."""

    async def run(self) -> None:
        """Put what there is, until cancelled."""
        async with asyncio.TaskGroup() as lanes:
            while True:
                await self._filled.wait()
                self._filled.clear()
                await asyncio.sleep(GATHER_S)
                while self._waiting:
                    lane = self._place(self._waiting.take_chain(MAX_PUT_BLOCKS))
                    if lane is not None and not lane.running:
                        lane.running = True
                        lanes.create_task(self._empty(lane), name=f"kv-put:{lane.url}")
                    await asyncio.sleep(0)

    def _add(self, blocks: Sequence[CachedBlock]) -> None:
        stores = self._stores()
        for block in blocks:
            if block.block_hash in self._under_way or self._kept.has(block.block_hash, stores):
                continue
            if len(self._waiting) >= MAX_WAITING_BLOCKS:
                self._num_dropped += 1
                continue
            self._waiting.add([block])
            self._under_way.add(block.block_hash)
        self._filled.set()

    def _place(self, batch: Sequence[CachedBlock]) -> PutLane | None:
        """Into the lane of its chain's store; None where it is dropped instead."""
        stores, now = self._stores(), self._clock.now()
        self._lanes = {url: lane for url, lane in self._lanes.items() if lane.running or url in stores}
        url = store_for(
            self._name_chain(batch), [url for url in stores if url not in self._lanes or self._lanes[url].is_open(now)]
        )
        if url is None:
            self._drop(batch)
            return None
        lane = self._lanes.setdefault(url, PutLane(url, self._block_bytes))
        if len(lane.waiting) + len(batch) > MAX_WAITING_BLOCKS:
            self._drop(batch)
            return None
        lane.waiting.add(batch)
        return lane

    async def _empty(self, lane: PutLane) -> None:
        """Until nothing waits there any more; what waits for a store that fails is placed again."""
        try:
            while lane.waiting and await self._put(lane, lane.waiting.take_chain(MAX_PUT_BLOCKS)):
                pass
            if lane.waiting:
                self._waiting.add(lane.waiting.take_all())
                self._filled.set()
        finally:
            lane.running = False

    async def _put(self, lane: PutLane, batch: Sequence[CachedBlock]) -> bool:
        """Whether the store has answered."""
        begin, deadline_s = self._clock.now(), lane.patience_s(len(batch))
        message = StorePut(
            request_id=new_request_id(), source=self._myself(len(batch)), blocks=tuple(batch), deadline_s=deadline_s
        )
        try:
            done = await self._client.call(lane.url + PUT_PATH, message, StorePutDone, deadline_s + ANSWER_S)
        except HeadraceError as error:
            self._drop(batch)
            now = self._clock.now()
            pause_s = lane.failed(now, now - begin)
            if pause_s is not None:
                log.warning("store %s takes no blocks, leaving it alone for %g s: %s", lane.url, pause_s, error.message)
            return False
        lane.answered(done.num_stored, self._clock.now() - begin)
        kept = [block for block, is_kept in zip(batch, done.kept, strict=False) if is_kept]
        self._kept.note(kept, lane.url, done.incarnation)
        self._under_way.difference_update(block.block_hash for block in batch)
        self._num_put += done.num_stored
        self._num_refused += len(batch) - len(kept)
        return True

    def _drop(self, batch: Sequence[CachedBlock]) -> None:
        self._num_dropped += len(batch)
        self._under_way.difference_update(block.block_hash for block in batch)

    def _name_chain(self, batch: Sequence[CachedBlock]) -> bytes:
        """What the batch's chain is placed by: the first address of it that this node has placed, in either direction."""
        first, last = batch[0], batch[-1]
        known = self._chain_of.get(last.block_hash) or self._chain_of.get(first.parent)
        chain = known or (first.parent if first.position else first.block_hash)
        for block in batch:
            self._chain_of[block.block_hash] = chain
        if first.position:
            self._chain_of.setdefault(first.parent, chain)
        while len(self._chain_of) > MAX_PLACED:
            self._chain_of.popitem(last=False)
        return chain
