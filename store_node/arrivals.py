"""Arrivals: what a node's store is told of each request, before the engine hears of it.

Linear in the prompt: its blocks are hashed, reported, and looked for. Of a long prompt that happens in a thread, so that no other
request's tokens wait for it. It lives as long as its store.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock, chain, tenant_of
from protocol.requests import DecodeRequest, PrefillRequest

MAX_TOKENS_ON_LOOP = 2048
"""Of a prompt that is dealt with between two other things, in half a millisecond."""


class Reported(Protocol):
    """A KVStore, as far as it is told of requests."""

    def requested(self, blocks: Sequence[CachedBlock]) -> None: ...


class Arrivals:
    """`num_held(block_hashes)`: how many leading blocks of a chain this process holds. Both that and `store` are asked from any
    thread."""

    def __init__(
        self,
        store: Reported,
        layout_identity: str,
        block_size: int,
        num_held: Callable[[Sequence[BlockHash]], int],
    ) -> None:
        self._store = store
        self._layout_identity = layout_identity
        self._block_size = block_size
        self._num_held = num_held

    async def note(self, request: PrefillRequest | DecodeRequest) -> tuple[list[BlockHash], int]:
        """The blocks that can be brought for it, and how many leading ones of them are in this process. If it is cancelled, a
        thread may go on to its end: that the request has come stays true."""
        if len(request.prompt_token_ids) + len(request.emitted_token_ids) <= MAX_TOKENS_ON_LOOP:
            return self._note(request)
        return await asyncio.to_thread(self._note, request)

    def _note(self, request: PrefillRequest | DecodeRequest) -> tuple[list[BlockHash], int]:
        token_ids = request.prompt_token_ids + request.emitted_token_ids
        root = root_hash(self._layout_identity, request.cache_salt)
        hashes = hash_blocks(token_ids, self._block_size, root)
        self._store.requested(chain(root, hashes, tenant_of(request.cache_salt)))
        brought = hashes[: (len(token_ids) - 1) // self._block_size]  # the last token is computed in any case
        return brought, self._num_held(brought)
