"""Content addresses of full KV blocks: a hash chain over (parent, token ids).

    root  = BLAKE3-128("headrace-root" | layout identity | salt)
    h[i]  = BLAKE3-128(h[i-1] | token ids of block i as little-endian uint32)

    context = BLAKE3-128("headrace-context" | root | all token ids as little-endian uint32)

Equal addresses mean equal layout, equal tenant salt and equal tokens from the start of the prompt up to the end of the
block, hence equal KV. Cryptographic, so that nobody can construct a prompt that collides with another tenant's.
Partial blocks have no address. The context hash covers them too: it names exactly what an exported KV is of, so that a
ticket can be refused by whoever wants the KV of anything else.
"""

import sys
from array import array
from collections.abc import Sequence

from blake3 import blake3

from protocol.ids import BlockHash, ContextHash

HASH_BYTES = 16
TOKEN_BYTES = 4


def root_hash(layout_identity: str, cache_salt: str | None = None) -> BlockHash:
    """The parent of every first block. A tenant's salt makes its whole tree of addresses its own."""
    hasher = blake3(b"headrace-root\x00")
    hasher.update(layout_identity.encode())
    hasher.update(b"\x00" if cache_salt is None else b"\x01" + cache_salt.encode())
    return BlockHash(hasher.digest(length=HASH_BYTES))


def hash_blocks(token_ids: Sequence[int], block_size: int, parent: BlockHash) -> list[BlockHash]:
    """Addresses of the full blocks of `token_ids`, which continue whatever `parent` addresses.

    Linear in the number of tokens. Token ids must fit in 32 bits.
    """
    packed = _pack(token_ids)
    step = block_size * TOKEN_BYTES
    hashes: list[BlockHash] = []
    for start in range(0, len(packed) - step + 1, step):
        parent = BlockHash(blake3(parent).update(packed[start : start + step]).digest(length=HASH_BYTES))
        hashes.append(parent)
    return hashes


def context_hash(layout_identity: str, cache_salt: str | None, token_ids: Sequence[int]) -> ContextHash:
    """16 bytes that only the same tokens, all of them, under the same layout and salt share.

    Linear in the number of tokens. Token ids must fit in 32 bits.
    """
    hasher = blake3(b"headrace-context\x00")
    hasher.update(root_hash(layout_identity, cache_salt))
    hasher.update(_pack(token_ids))
    return ContextHash(hasher.digest(length=HASH_BYTES))


def _pack(token_ids: Sequence[int]) -> memoryview:
    """Little-endian uint32: [num_tokens * TOKEN_BYTES]"""
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return memoryview(words).cast("B")
