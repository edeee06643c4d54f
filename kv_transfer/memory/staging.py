"""Staging: between a node's KV blocks and the wire blocks that transports move.

    owner     KV blocks --stage--> wire blocks, announced with their checksums     until unstage
    reader    reserve --> wire blocks, into which bytes land --land--> KV blocks   or discard, if none came

Where KV blocks lie in an arena that transports reach they are their own wire blocks, nothing is copied, and there is
always room (InPlaceStaging; HostStaging is the one of host memory). Elsewhere wire blocks are scarce copies, and who
wants some waits for them.

Two rules keep those who wait from waiting for one another for ever. An owner stages for a reader that is there to read,
not before (`eager` says where that does not matter). A reader reserves what it is about to read and gives it back when it
has landed, so that it never waits for anything else while it holds some.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from kv_transfer.memory.device_arena import Arena
from protocol.checksum import num_right

VERIFIER_THREADS = 2

STAGED_AT_ONCE_BYTES = 8 << 20
"""So much an owner checks where it stands: a millisecond of reading costs less than the way to another thread and back when
every core computes."""

LANDED_AT_ONCE_BYTES = 2 << 20
"""So much a reader checks on the event loop, where nothing else happens meanwhile: a quarter of a millisecond from memory.
It covers the last chunk of a prompt, which a request waits for, and for which the way to another thread and back costs as
much again as the reading."""

SumBlocks = Callable[[Sequence[int]], tuple[int, ...]]
"""Checksums of blocks, in order; blocking, from any thread."""


@dataclass(frozen=True, slots=True)
class StagedBlocks:
    """What is announced of blocks: under which ids peers find them, and what they hold. One entry a block, in order."""

    wire_ids: tuple[int, ...]
    checksums: tuple[int, ...]


class Staging(Protocol):
    """One per process, for its life; event loop only. Closed before the arena and after who uses it.

    `arena` is what transports serve and read into. A call takes at most `max_blocks` blocks; who has more calls again.
    `eager`: blocks may be staged as soon as they are final, because that takes nothing from anybody. All coroutines may
    be cancelled: they raise only when nothing is copied any more on behalf of the call, and hold nothing then.
    """

    @property
    def arena(self) -> Arena: ...

    @property
    def max_blocks(self) -> int: ...

    @property
    def eager(self) -> bool: ...

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:
        """Owner: stage blocks here and now, on any thread, if that takes about a millisecond and no room that would have to
        be given back. None otherwise."""
        ...

    async def stage(self, block_ids: Sequence[int]) -> StagedBlocks:
        """Owner: bring final KV blocks to wire blocks. Waits for room; calls end in the order they were made in.

        The KV blocks must not be written before this has returned, the wire blocks are the caller's until `unstage`.
        """
        ...

    def unstage(self, wire_ids: Sequence[int]) -> None:
        """Owner: nobody reads these wire blocks any more."""
        ...

    async def reserve(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Reader: wire blocks for what is to come into these KV blocks. Waits for room; ends in `land` or `discard`."""
        ...

    async def land(self, wire_ids: Sequence[int], block_ids: Sequence[int], checksums: Sequence[int]) -> int:
        """Reader: prove what has landed in the wire blocks and bring it to the KV blocks.

        Returns how many of the leading blocks hold what `checksums` say: all, or the index of the first that does not.
        What the KV blocks from there on hold is undefined. The wire blocks are given back, whatever happens.
        """
        ...

    def discard(self, wire_ids: Sequence[int]) -> None:
        """Reader: give wire blocks back that were not landed. Only when no more bytes can land in them."""
        ...

    async def close(self) -> None: ...


class InPlaceStaging:
    """KV blocks that are wire blocks: the arena's own. Staging is their checksum, landing its comparison."""

    def __init__(self, arena: Arena, sums: SumBlocks) -> None:
        self._arena = arena
        self._sums = sums
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="kv-checksum")  # one: it keeps the order of calls
        self._verifier = ThreadPoolExecutor(VERIFIER_THREADS, thread_name_prefix="kv-verify")

    @property
    def arena(self) -> Arena:
        return self._arena

    @property
    def max_blocks(self) -> int:
        return self._arena.num_blocks

    @property
    def eager(self) -> bool:
        return True

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:  # noqa: ARG002  # waiting for a device
        return None

    async def stage(self, block_ids: Sequence[int]) -> StagedBlocks:
        ids = tuple(block_ids)
        found = await asyncio.get_running_loop().run_in_executor(self._stager, self._sums, ids)
        return StagedBlocks(ids, found)

    def unstage(self, wire_ids: Sequence[int]) -> None:
        """They are the KV blocks, whose life is not ours."""

    async def reserve(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(block_ids)

    async def land(self, wire_ids: Sequence[int], block_ids: Sequence[int], checksums: Sequence[int]) -> int:
        assert tuple(wire_ids) == tuple(block_ids)
        found = await asyncio.get_running_loop().run_in_executor(self._verifier, self._sums, tuple(wire_ids))
        return num_right(checksums, found)

    def discard(self, wire_ids: Sequence[int]) -> None:
        """They are the KV blocks, whose life is not ours."""

    async def close(self) -> None:
        for executor in (self._stager, self._verifier):
            await asyncio.to_thread(executor.shutdown)


class HostStaging(InPlaceStaging):
    """KV blocks in a host arena."""

    def __init__(self, arena: HostArena) -> None:
        super().__init__(arena, partial(checksums, arena))
        self._max_staged_at_once = STAGED_AT_ONCE_BYTES // arena.block_bytes
        self._max_landed_at_once = LANDED_AT_ONCE_BYTES // arena.block_bytes

    def stage_at_once(self, block_ids: Sequence[int]) -> StagedBlocks | None:
        if len(block_ids) > self._max_staged_at_once:
            return None
        return StagedBlocks(tuple(block_ids), self._sums(block_ids))

    async def land(self, wire_ids: Sequence[int], block_ids: Sequence[int], checksums: Sequence[int]) -> int:
        if len(wire_ids) > self._max_landed_at_once:
            return await super().land(wire_ids, block_ids, checksums)
        return num_right(checksums, self._sums(wire_ids))
