"""Node -> store: KV blocks that are to outlive the node that computed them.

    node                                     store
      | POST /store/put  (StorePut) ---------> |   "I hold these blocks; borrow what you lack"
      | <-------- POST kv/borrow (BorrowPrefix) |   only of those, under a lease, like any reader
      | <------------------------ StorePutDone |   which of them it keeps now; the others it could not get, or had no room for

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

MAX_PUT_S = 20.0


class StorePut(msgspec.Struct, frozen=True, kw_only=True):
    """`blocks` follow each other in one chain. `source`: the node that holds all of them now, and its control URL. In
    `deadline_s` seconds the store answers with what has come by then."""

    request_id: IdText
    source: KVSource
    blocks: Annotated[tuple[CachedBlock, ...], msgspec.Meta(min_length=1, max_length=MAX_PUT_BLOCKS)]
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_PUT_S)]


class StorePutDone(msgspec.Struct, frozen=True):
    """`num_stored` of the blocks the store took over now. `kept[i]`: whether it has block i now, in whatever tier, from before or
    by this put. That holds for this life of the store, and until it needs the room."""

    num_stored: Annotated[int, msgspec.Meta(ge=0, le=MAX_PUT_BLOCKS)]
    kept: Annotated[tuple[bool, ...], msgspec.Meta(max_length=MAX_PUT_BLOCKS)]
    incarnation: IdText
