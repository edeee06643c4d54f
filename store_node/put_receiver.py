"""PutReceiver: a store's side of a put. It borrows, from the node that invites it to, the blocks that it lacks.

A put is taken only from who shows the cluster's key (protocol.store says why), and only for a chain that holds together. A
put waits for room behind those that came before it; too many at once are refused, and their senders drop them. What is put
has been admitted by its sender, which hears of the requests for it: it is asked for here whatever admission would say.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
from starlette.routing import Route

from kv_store.receiving import FetchUnsettled
from kv_store.store import KVStore
from kv_transfer.exchange import KVExchange
from kv_transfer.lending.borrowing import Borrowing, Prefix
from protocol.errors import InvalidParameter, Overloaded
from protocol.ids import BlockHash, Incarnation, RequestId, WorkerId
from protocol.kv_blocks import CachedBlock, check_distinct
from protocol.store import StorePut, StorePutDone
from runtime.clock import Deadline
from runtime.rpc_server import message_route

PUT_PATH = "/store/put"
MAX_PUTS = 16
"""Under way at once. Each holds slots for its blocks until they have come."""

RETRY_AFTER_S = 1.0


class PutReceiver:
    """`check_admitting` raises once the store drains. Whether the store borrows for itself has no bearing on puts: a put
    is taken by borrowing."""

    def __init__(
        self,
        store: KVStore,
        exchange: KVExchange,
        myself: WorkerId,
        incarnation: Incarnation,
        check_admitting: Callable[[], None],
    ) -> None:
        self._store = store
        self._context = dataclasses.replace(exchange.borrowing, policy="always")
        self._myself = myself
        self._incarnation = incarnation
        self._check_admitting = check_admitting
        self._num_puts = 0

    @property
    def idle(self) -> bool:
        return not self._num_puts

    def route(self, cluster_key: str | None) -> Route:
        return message_route(PUT_PATH, StorePut, self.put, cluster_key)

    async def put(self, message: StorePut) -> StorePutDone:
        """Raises InvalidParameter for what is no chain, Overloaded while there is enough to do, Draining at the end."""
        self._check_admitting()
        check_chain(message.blocks)
        if message.source.worker == self._myself:
            raise InvalidParameter("a store does not put to itself", param="source")
        if self._num_puts >= MAX_PUTS:
            raise Overloaded(f"{self._num_puts} puts are under way", retry_after_s=RETRY_AFTER_S)
        self._num_puts += 1
        try:
            deadline = Deadline(message.deadline_s)
            num_stored = 0
            for run in missing_runs(message.blocks, [not held for held in self._are_kept(message.blocks)]):
                if deadline.passed:
                    break
                num_stored += await self._take(message, run, deadline)
            return StorePutDone(num_stored, self._are_kept(message.blocks), self._incarnation)
        finally:
            self._num_puts -= 1

    def _are_kept(self, blocks: Sequence[CachedBlock]) -> tuple[bool, ...]:
        places = self._store.locate([BlockHash(block.block_hash) for block in blocks])
        return tuple(place.host or place.disk for place in places)

    async def _take(self, message: StorePut, run: Sequence[CachedBlock], deadline: Deadline) -> int:
        async def fetch(blocks: Sequence[CachedBlock], slots: Sequence[int]) -> int:
            hashes = tuple(BlockHash(block.block_hash) for block in blocks)
            borrowing = Borrowing(self._context, Prefix(RequestId(message.request_id), hashes, tuple(slots), 0))
            source = msgspec.structs.replace(message.source, num_blocks=len(hashes))
            try:
                await borrowing.run((source,), max(0.001, deadline.remaining_s))
            finally:
                if not borrowing.settled.is_set():
                    raise FetchUnsettled(borrowing.settled, borrowing.num_valid_blocks)
            return borrowing.num_valid_blocks

        return await self._store.receive(run, fetch)


def refuse_puts(cluster_key: str | None) -> Route:
    """Of a node that is no store."""

    async def refuse(_: StorePut) -> StorePutDone:
        raise InvalidParameter("this node takes no puts: it is no store", param="store.stores")

    return message_route(PUT_PATH, StorePut, refuse, cluster_key)


def check_chain(blocks: Sequence[CachedBlock]) -> None:
    """Raise InvalidParameter unless each block continues the one before it, for the same tenant, and none comes twice."""
    check_distinct([blocks[0].parent, *(block.block_hash for block in blocks)], "blocks")
    for before, block in pairwise(blocks):
        if block.parent != before.block_hash or block.position != before.position + 1:
            raise InvalidParameter(f"block {block.position} does not continue the one before it", param="blocks")
        if block.tenant != before.tenant:
            raise InvalidParameter("the blocks of one chain are of two tenants", param="blocks")


def missing_runs(blocks: Sequence[CachedBlock], wanted: Sequence[bool]) -> list[list[CachedBlock]]:
    """The wanted blocks, in pieces that follow each other without gaps: each can be borrowed in one."""
    runs: list[list[CachedBlock]] = []
    follows = False
    for block, is_wanted in zip(blocks, wanted, strict=True):
        if is_wanted and follows:
            runs[-1].append(block)
        elif is_wanted:
            runs.append([block])
        follows = is_wanted
    return runs
