"""Holders: who is said to hold the beginning of a context, and the addresses of the blocks in question."""

from dataclasses import dataclass

from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash
from protocol.kv_layout import KVLayout
from protocol.requests import DecodeRequest, PrefillRequest
from protocol.transfer import KVSource

UNTOLD_TOKENS = 256
"""A source may hold so much more than it is said to: an index tells of whole chunks of that size only."""


@dataclass(frozen=True, slots=True)
class Holders:
    """`sources`, the best first; `block_hashes` up to the last block that any of them may have."""

    sources: tuple[KVSource, ...]
    block_hashes: tuple[BlockHash, ...]


def holders_of(request: PrefillRequest | DecodeRequest, layout: KVLayout, max_tokens: int) -> Holders:
    """As a router has it. Only whole blocks within the first `max_tokens` tokens are of interest."""
    num_blocks = max((source.num_blocks for source in request.sources), default=0)
    if not min(num_blocks, max_tokens // layout.block_size):
        return Holders((), ())
    num_blocks = min(num_blocks + untold_blocks(layout), max_tokens // layout.block_size)
    token_ids = (request.prompt_token_ids + request.emitted_token_ids)[: num_blocks * layout.block_size]
    root = root_hash(layout.identity, request.cache_salt)
    return Holders(request.sources, tuple(hash_blocks(token_ids, layout.block_size, root)))


def untold_blocks(layout: KVLayout) -> int:
    """How many blocks to ask a source for beyond those that it is said to hold. It lends what it has."""
    return UNTOLD_TOKENS // layout.block_size
