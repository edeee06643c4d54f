"""Gathering: one context from several places. Its first blocks from this node's own tiers and from other holders, the rest
from the node that computes it.

Near tiers and the other holders are asked first, while the prompt is still being computed; what they do not bring, the prefill node
provides like everything else. They save it the bytes, not the announcement of what it alone has.
"""

import asyncio
from collections.abc import Sequence

from kv_transfer.handoff.fetch import FetchResult
from kv_transfer.handoff.imports import FetchFailed, OnArrived
from kv_transfer.lending.borrowing import BorrowContext, Borrowing, Prefix
from kv_transfer.lending.holders import Holders
from protocol.errors import TransferTimeout
from protocol.ids import BlockHash, RequestId
from protocol.transfer import TransferTicket
from runtime.clock import Deadline


async def gather(
    context: BorrowContext,
    ticket: TransferTicket,
    holders: Holders,
    local_block_ids: Sequence[int],
    num_cached_blocks: int,
    deadline_s: float,
    on_arrived: OnArrived,
    block_hashes: Sequence[BlockHash] = (),
) -> FetchResult:
    """As Importer.fetch, which has the last word. `block_hashes`: addresses of the context's full blocks, where they are
    known; what is near is looked for by them. Raises FetchFailed. A cancel while borrowed blocks may still be written
    is a FetchFailed too, because whoever cancels must hear which blocks have not settled."""
    deadline = Deadline(deadline_s)
    num_valid_blocks = num_cached_blocks
    hashes = tuple(block_hashes) or holders.block_hashes
    num_held = len(holders.block_hashes)
    near = context.near.plan(hashes[num_cached_blocks:])
    num_held = max(num_held, num_cached_blocks + near.num_computed + near.num_loaded)
    if num_held > num_cached_blocks:
        request_id = RequestId(ticket.request_id)
        prefix = Prefix(request_id, hashes[:num_held], tuple(local_block_ids[:num_held]), num_cached_blocks)
        borrowing = Borrowing(context, prefix)
        patience_s = context.patience_s((num_held - num_cached_blocks) * context.layout.block_size)
        context.importer.keep(ticket)
        try:
            await borrowing.run(holders.sources, min(deadline_s, patience_s))
        except asyncio.CancelledError:
            if borrowing.settled.is_set():
                context.importer.give_up(ticket)
                raise
        finally:
            context.importer.drop(ticket)
        if not borrowing.settled.is_set():
            context.importer.give_up(ticket)
            error = TransferTimeout("borrowed blocks are still being written by a node that stands still")
            raise FetchFailed(error, borrowing.num_valid_blocks, borrowing.settled)
        num_valid_blocks = borrowing.num_valid_blocks
    remaining_s = max(0.001, deadline.remaining_s)
    return await context.importer.fetch(ticket, local_block_ids, num_valid_blocks, remaining_s, on_arrived)
