"""NIXL called directly, with the descriptors that the nixl transport would use: what our layer is measured against.

A program that does nothing else: prepared descriptor lists, one call to post, a poll every 50 us until it is done, on the
thread that wants the bytes. No event loop, no deadline, no accounting.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kv_transfer.memory.arena import HostArena
from kv_transfer.transports.nixl.library import load_nixl, make_agent
from kv_transfer.transports.nixl.passive import PROGRESS_DELAY_US
from kv_transfer.transports.plan import coalesce
from protocol.errors import TransferTimeout
from protocol.transfer import Direction
from protocol.wire import decode, encode

POLL_S = 50e-6
TIMEOUT_S = 30.0


class _Offer(msgspec.Struct, frozen=True):
    metadata: bytes
    address: int
    num_blocks: int


class RawNixl:
    """One agent that is known to the other station, and one that knows the other's: never both in one."""

    directions: tuple[Direction, ...] = ("pull", "push")
    pids: tuple[int, ...] = ()

    def __init__(self, arena: HostArena) -> None:
        self._arena = arena
        api = load_nixl("127.0.0.1")
        name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
        self._passive = make_agent(api, f"{name}-passive", progress_delay_us=PROGRESS_DELAY_US)
        self._active = make_agent(api, f"{name}-active", progress_delay_us=None)
        for agent in (self._passive, self._active):
            agent.register_memory([(arena.address, arena.size_bytes, 0, "")], "DRAM")
        self._ours = self._descriptors("NIXL_INIT_AGENT", arena.address, arena.num_wire_blocks)
        self._theirs: Any = None
        self._peer = ""

    def offer(self) -> bytes:
        return encode(_Offer(self._passive.get_agent_metadata(), self._arena.address, self._arena.num_wire_blocks))

    async def meet(self, offer: bytes) -> None:
        offered = decode(offer, _Offer)
        self._peer = self._active.add_remote_agent(offered.metadata).decode()
        self._theirs = self._descriptors(self._peer, offered.address, offered.num_blocks)

    async def move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:
        await asyncio.to_thread(self._move, direction, source, destination)

    async def close(self) -> None:
        for descriptors in (self._theirs, self._ours):
            if descriptors is not None:
                descriptors.release()
        if self._peer:
            self._active.remove_remote_agent(self._peer)
        self._ours = self._theirs = self._active = self._passive = None

    def _move(self, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:
        runs = coalesce(source, destination)
        sources = _indices([(run.source, run.num_blocks) for run in runs])
        destinations = _indices([(run.destination, run.num_blocks) for run in runs])
        ours, theirs = (destinations, sources) if direction == "pull" else (sources, destinations)
        operation = "READ" if direction == "pull" else "WRITE"
        handle = self._active.make_prepped_xfer(operation, self._ours, ours, self._theirs, theirs)
        started = time.monotonic()
        state = self._active.transfer(handle)
        while state == "PROC":
            if time.monotonic() - started > TIMEOUT_S:
                raise TransferTimeout("raw NIXL does not end a transfer")
            time.sleep(POLL_S)
            state = self._active.check_xfer_state(handle)
        handle.release()

    def _descriptors(self, agent_name: str, address: int, num_blocks: int) -> Any:
        rows = np.zeros((num_blocks, 3), np.uint64)
        rows[:, 0] = np.uint64(address) + np.arange(num_blocks, dtype=np.uint64) * np.uint64(self._arena.block_bytes)
        rows[:, 1] = self._arena.block_bytes
        return self._active.prep_xfer_dlist(agent_name, rows, "DRAM")


def _indices(runs: list[tuple[int, int]]) -> NDArray[np.int32]:
    return np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in runs])
