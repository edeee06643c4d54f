"""Measuring a link, in a few milliseconds: what a transfer costs for itself, and what its bytes cost.

Scratch blocks move, first one and then many, and of several repeats the fastest counts: whatever else the two machines do
can only make one slower. On a slow link fewer blocks move. The reader measures pulls, the owner pushes, and the reader
looks whether what it was promised is there.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from kv_transfer.meeting.scratch import Scratch, sample_ids
from kv_transfer.transport import Link, TransferAbandoned
from kv_transfer.transports.read_log import uncounted
from protocol.errors import NodeLost, TransferError
from protocol.ids import TicketId
from protocol.transfer import Introduction, ProbeResult

PROBE_TICKET = TicketId("probe")
"""Scratch blocks are lent to everybody: any ticket does."""

BUDGET_S = 0.03
"""After which no further transfer is begun. One that is under way is waited for."""

MAX_REPEATS = 4
UNANSWERED_S = 60.0
"""How long landing blocks are kept back when an owner did not say that its push has ended."""

AskForPush = Callable[[tuple[int, ...]], Awaitable[ProbeResult]]


class NothingArrived(TransferError):
    """The transport reported success, and the bytes are not there."""


class NoScratchBlocks(TransferError):
    """There is nothing to measure with, here or there."""


async def probe_pull(link: Link, owner: Introduction, scratch: Scratch, timeout_s: float) -> ProbeResult:
    """Read the owner's samples. Each transfer has `timeout_s` seconds. Raises TransferError."""
    samples = sample_ids(owner.num_blocks, owner.num_scratch_blocks)
    async with scratch.landing(len(samples)) as landing:
        if not landing:
            raise NoScratchBlocks("no scratch blocks to measure with")

        async def move(num_blocks: int) -> None:
            with uncounted():
                await link.read(PROBE_TICKET, samples[:num_blocks], landing[:num_blocks], timeout_s)

        result, num_moved = await _measure(move, len(landing), scratch.block_bytes)
        if not await scratch.holds(landing[:num_moved], owner.scratch_seed):
            raise NothingArrived("reported success, but the bytes did not arrive")
    return result


async def probe_push(ask: AskForPush, owner: Introduction, scratch: Scratch) -> ProbeResult:
    """Have the owner write its samples here. Raises TransferError.

    An answer of whatever kind says that its writes have ended. Without one nobody knows: TransferAbandoned.
    """
    samples = sample_ids(owner.num_blocks, owner.num_scratch_blocks)
    async with scratch.landing(len(samples)) as landing:
        if not landing:
            raise NoScratchBlocks("no scratch blocks to measure with")
        try:
            result = await ask(landing)
        except NodeLost as error:
            settled = asyncio.Event()
            asyncio.get_running_loop().call_later(UNANSWERED_S, settled.set)
            raise TransferAbandoned(f"no answer to a probe: {error.message}", settled) from error
        if not await scratch.holds(landing[:1], owner.scratch_seed):
            raise NothingArrived("reported success, but the bytes did not arrive")
    return result


async def push_samples(link: Link, scratch: Scratch, block_ids: tuple[int, ...], timeout_s: float) -> ProbeResult:
    """The owner's side of probe_push: write samples into these blocks of the reader. Raises TransferError, and then as
    well only when the writes have ended, however long after `timeout_s` that is."""

    async def move(num_blocks: int) -> None:
        with uncounted():
            await link.write(scratch.samples[:num_blocks], block_ids[:num_blocks], timeout_s)

    try:
        result, _ = await _measure(move, min(len(block_ids), len(scratch.samples)), scratch.block_bytes)
    except TransferAbandoned as error:
        await error.settled.wait()
        raise
    return result


async def _measure(
    move: Callable[[int], Awaitable[None]], max_blocks: int, block_bytes: int
) -> tuple[ProbeResult, int]:
    """The result, and how many blocks moved at least once.

    With t(n) the best time of n blocks, bandwidth is n * block_bytes / t(n) for the largest n, and latency what t(1) is
    above its share of that.
    """
    started = time.perf_counter()
    await move(1)  # opens connections and touches pages: not a measurement
    one = await _best_of(move, 1, started + BUDGET_S / 2)
    left = max(0.0, started + BUDGET_S - time.perf_counter())
    num_blocks = max(1, min(max_blocks, int(left / one)))
    many = one
    if num_blocks > 1:
        many = await _best_of(move, num_blocks, started + BUDGET_S)
    bytes_per_s = num_blocks * block_bytes / many
    return ProbeResult(max(0.0, one - block_bytes / bytes_per_s), bytes_per_s), num_blocks


async def _best_of(move: Callable[[int], Awaitable[None]], num_blocks: int, until: float) -> float:
    """Seconds of the fastest of some transfers. The first one is made in any case."""
    best = float("inf")
    for _ in range(MAX_REPEATS):
        started = time.perf_counter()
        await move(num_blocks)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended >= until:
            break
    return max(best, 1e-9)
