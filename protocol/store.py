"""Node -> store: KV blocks that are to outlive the node that computed them.

    node                                     store
      | POST /store/put  (StorePut) ---------> |   "I hold these blocks; borrow what you lack"
      | <-------- POST kv/borrow (BorrowPrefix) |   only of those, under a lease, like any reader
      | <------------------------ StorePutDone |   they are verified and found, or they were not wanted

A put is an invitation to borrow: the bytes take the same way as a loan, checked in the same way, and a sender that dies
meanwhile leaves behind what a lender leaves that dies.

What a block's address stands for a store cannot verify, because it computes nothing: whoever may put could put the KV of
other tokens under an address. So puts are for the cluster's own nodes, which show its key; a cluster without a key trusts
whoever reaches its ports, here as everywhere.
"""

from typing import Annotated

import msgspec

from protocol.ids import IdText
from protocol.kv_blocks import CachedBlock
from protocol.transfer import KVSource

MAX_PUT_BLOCKS = 256
"""In one put. A sender batches; a store reserves room for a put at once."""


class StorePut(msgspec.Struct, frozen=True, kw_only=True):
    """`blocks` follow each other in one chain. `source`: the node that holds all of them now, and its control URL."""

    request_id: IdText
    source: KVSource
    blocks: Annotated[tuple[CachedBlock, ...], msgspec.Meta(min_length=1, max_length=MAX_PUT_BLOCKS)]


class StorePutDone(msgspec.Struct, frozen=True):
    """How many of the blocks the store took over now. Those that it had before, or has no room for, do not count."""

    num_stored: Annotated[int, msgspec.Meta(ge=0, le=MAX_PUT_BLOCKS)]
