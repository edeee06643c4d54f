"""PutQueue: the blocks of a node's host tier on their way to a store node, so that they outlive this one.

    stored here ──▶ waiting, with the rest of its chain ──▶ put ──▶ kept there (or dropped, and counted)

A copy leaves as soon as the blocks are in the host tier, not when that gives them up: a node that dies gives nothing up in
time. With write-back those are the blocks that the device forgot; with write-through, all. Bounded: what does not fit the
queue, or whose store does not answer, is dropped, because a put is only ever a second copy. A store that fails is left
alone for a while.

`stored` is called from any thread; the rest lives on the event loop. `run` is a duty of the node.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kv_store.tiers import StoredBlock
from protocol.errors import HeadraceError
from protocol.ids import new_request_id
from protocol.kv_blocks import CachedBlock
from protocol.store import MAX_PUT_BLOCKS, StorePut, StorePutDone
from protocol.transfer import KVSource
from runtime.clock import Clock
from runtime.rpc_client import RpcClient
from store_node.placement import store_for
from store_node.put_receiver import PUT_PATH, PUT_TIMEOUT_S

MAX_WAITING_BLOCKS = 1 << 14
MAX_REMEMBERED = 1 << 16
"""Blocks that have been put: they are not offered again when they come back from a store."""

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
GATHER_S = 0.02
"""How long blocks wait for those that follow them: a batch costs little more than a block."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PutStats:
    num_put: int
    num_refused: int
    num_dropped: int
    num_waiting: int


@dataclass(slots=True)
class _Pause:
    """Of a store that has failed."""

    until: float
    seconds: float


class PutQueue:
    """`myself(num_blocks)`: this node's host tier as a source of so many blocks. `stores()`: control URLs, asked for each
    batch, since stores come and go."""

    def __init__(
        self,
        client: RpcClient,
        myself: Callable[[int], KVSource],
        stores: Callable[[], Collection[str]],
        clock: Clock,
    ) -> None:
        self._client = client
        self._myself = myself
        self._stores = stores
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: OrderedDict[bytes, CachedBlock] = OrderedDict()
        self._chain_of: OrderedDict[bytes, bytes] = OrderedDict()
        self._put: OrderedDict[bytes, None] = OrderedDict()
        self._pauses: dict[str, _Pause] = {}
        self._filled = asyncio.Event()
        self._num_put = self._num_refused = self._num_dropped = 0

    def stats(self) -> PutStats:
        return PutStats(self._num_put, self._num_refused, self._num_dropped, len(self._waiting))

    # As a TierListener.

    def stored(self, blocks: Sequence[StoredBlock]) -> None:
        chosen = [each.block for each in blocks if each.tier == "host"]
        if chosen and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._add, chosen)

    def removed(self, blocks: Sequence[StoredBlock]) -> None:
        """What has gone meanwhile the store is not lent any more, and takes no harm. When it is here again it is offered
        again: the store may have restarted since, and one that has it says so at no cost."""
        gone = [each.block.block_hash for each in blocks if each.tier == "host"]
        if gone and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._forget, gone)

    async def run(self) -> None:
        """Put what there is, until cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            await asyncio.sleep(GATHER_S)
            while self._waiting:
                await self._put_next()

    def _add(self, blocks: Sequence[CachedBlock]) -> None:
        for block in blocks:
            if block.block_hash in self._put or block.block_hash in self._waiting:
                continue
            if len(self._waiting) >= MAX_WAITING_BLOCKS:
                self._num_dropped += 1
                continue
            self._waiting[block.block_hash] = block
        self._filled.set()

    def _forget(self, block_hashes: Sequence[bytes]) -> None:
        for block_hash in block_hashes:
            self._put.pop(block_hash, None)

    async def _put_next(self) -> None:
        batch = self._take_chain()
        chain = self._name_chain(batch)
        url = store_for(chain, self._open_stores())
        if url is None:
            self._num_dropped += len(batch)
            return
        message = StorePut(request_id=new_request_id(), source=self._myself(len(batch)), blocks=tuple(batch))
        try:
            done = await self._client.call(url + PUT_PATH, message, StorePutDone, PUT_TIMEOUT_S + 1.0)
        except HeadraceError as error:
            self._num_dropped += len(batch)
            self._note_failure(url, error)
            return
        self._pauses.pop(url, None)
        self._num_put += done.num_stored
        self._num_refused += len(batch) - done.num_stored
        self._remember(batch, chain, all_put=done.num_stored == len(batch))

    def _take_chain(self) -> list[CachedBlock]:
        """The block that waits longest, and those around it that its chain connects."""
        _, first = self._waiting.popitem(last=False)
        before: list[CachedBlock] = []
        while len(before) < MAX_PUT_BLOCKS - 1 and (parent := self._waiting.pop((before or [first])[-1].parent, None)):
            before.append(parent)
        batch = [*reversed(before), first]
        for block in list(self._waiting.values()):
            if len(batch) >= MAX_PUT_BLOCKS:
                break
            if block.parent == batch[-1].block_hash:
                batch.append(self._waiting.pop(block.block_hash))
        return batch

    def _name_chain(self, batch: Sequence[CachedBlock]) -> bytes:
        """What the batch's chain is placed by: the first address of it that this node has put, in either direction."""
        first, last = batch[0], batch[-1]
        known = self._chain_of.get(last.block_hash) or self._chain_of.get(first.parent)
        return known or (first.parent if first.position else first.block_hash)

    def _remember(self, batch: Sequence[CachedBlock], chain: bytes, *, all_put: bool) -> None:
        """Of a batch that the store has not taken whole it may lack any, because they had gone before it came for them."""
        for block in batch:
            if all_put:
                self._put[block.block_hash] = None
            self._chain_of[block.block_hash] = chain
        if batch[0].position:
            self._chain_of.setdefault(batch[0].parent, chain)
        for remembered in (self._put, self._chain_of):
            while len(remembered) > MAX_REMEMBERED:
                remembered.popitem(last=False)

    def _open_stores(self) -> list[str]:
        now = self._clock.now()
        return [url for url in self._stores() if (pause := self._pauses.get(url)) is None or pause.until <= now]

    def _note_failure(self, url: str, error: HeadraceError) -> None:
        before = self._pauses.get(url)
        seconds = FIRST_PAUSE_S if before is None else min(2 * before.seconds, MAX_PAUSE_S)
        self._pauses[url] = _Pause(self._clock.now() + seconds, seconds)
        if before is None:
            log.warning("store %s takes no blocks, leaving it alone for %g s: %s", url, seconds, error.message)
