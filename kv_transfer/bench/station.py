"""Station: one process of the benchmark. It holds an arena and one end of every contestant, and does as it is told.

`python -m kv_transfer.bench.station FD`, where FD is its end of a local socket. It ends when the other end is closed.
"""

import asyncio
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kv_transfer.bench.baselines import Memcpy, RawSocket
from kv_transfer.bench.contestant import Contestant, TransportContestant
from kv_transfer.bench.cpu_time import cpu_seconds
from kv_transfer.bench.messages import (
    MAX_MESSAGE_BYTES,
    Command,
    Done,
    Failed,
    Idle,
    Idled,
    Meet,
    Move,
    Moved,
    Open,
    Opened,
    Reply,
    Sum,
    Sums,
    Wipe,
)
from kv_transfer.bench.raw_nixl import RawNixl
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from protocol.errors import ConfigError, HeadraceError, InternalError
from protocol.wire import decode, encode

BASELINES: dict[str, Callable[[HostArena], Contestant]] = {
    "memcpy": Memcpy,
    "raw socket": RawSocket,
    "raw nixl": RawNixl,
}

_IDLE_BLOCK_BYTES = 4096


class Station:
    def __init__(self) -> None:
        self._arena: HostArena | None = None
        self._contestants: dict[str, Contestant] = {}
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="bench-verify")

    async def obey(self, command: Command) -> Reply:
        match command:
            case Open():
                return self._open(command)
            case Meet(offers):
                for name, offer in offers.items():
                    await self._contestants[name].meet(offer)
                return Done()
            case Move():
                return await self._move(command)
            case Wipe(block_ids):
                for block_id in block_ids:
                    self._the_arena.block(block_id)[:] = bytes(self._the_arena.block_bytes)
                return Done()
            case Sum(block_ids):
                return Sums(checksums(self._the_arena, block_ids))
            case Idle():
                return await self._idle(command)

    async def close(self) -> None:
        for contestant in self._contestants.values():
            await contestant.close()
        self._verifier.shutdown()
        if self._arena is not None:
            self._arena.close()

    @property
    def _the_arena(self) -> HostArena:
        assert self._arena is not None, "opened first"
        return self._arena

    def _open(self, command: Open) -> Opened:
        arena = self._arena = HostArena(command.num_blocks, command.block_bytes)
        generator = np.random.default_rng(command.seed)
        arena.memory[:] = generator.integers(0, 1 << 63, -(-arena.size_bytes // 8), np.int64).tobytes()[
            : arena.size_bytes
        ]
        missing: dict[str, str] = {}
        for kind in command.transports:
            self._add(kind, functools.partial(TransportContestant, kind), missing)
        baselines = BASELINES if command.baselines else {"raw nixl": RawNixl} if "nixl" in command.transports else {}
        for name, make in baselines.items():
            self._add(name, make, missing)
        return Opened(
            offers={name: contestant.offer() for name, contestant in self._contestants.items()},
            directions={name: contestant.directions for name, contestant in self._contestants.items()},
            missing=missing,
            pids=tuple(pid for contestant in self._contestants.values() for pid in contestant.pids),
        )

    def _add(self, name: str, make: Callable[[HostArena], Contestant], missing: dict[str, str]) -> None:
        try:
            self._contestants[name] = make(self._the_arena)
        except ConfigError as error:
            missing[name] = error.message

    async def _move(self, command: Move) -> Moved:
        contestant, arena = self._contestants[command.contestant], self._the_arena
        loop = asyncio.get_running_loop()
        seconds: list[float] = []
        end = time.perf_counter() + command.seconds
        while len(seconds) < command.at_least or time.perf_counter() < end:
            started = time.perf_counter()
            await contestant.move(command.direction, command.source, command.destination)
            if command.checksums:
                await loop.run_in_executor(self._verifier, checksums, arena, command.destination)
            seconds.append(time.perf_counter() - started)
        return Moved(tuple(seconds))

    async def _idle(self, command: Idle) -> Idled:
        with HostArena(1, _IDLE_BLOCK_BYTES) as arena:
            try:
                contestant = TransportContestant(command.transport, arena)
            except ConfigError:
                return Idled(None)
            try:
                await asyncio.sleep(command.seconds / 4)  # until it has come to rest
                pids = (os.getpid(), *contestant.pids)
                before, started = sum(map(cpu_seconds, pids)), time.perf_counter()
                await asyncio.sleep(command.seconds)
                return Idled((sum(map(cpu_seconds, pids)) - before) / (time.perf_counter() - started))
            finally:
                await contestant.close()


async def serve(control: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    control.setblocking(False)
    station = Station()
    try:
        while message := await loop.sock_recv(control, MAX_MESSAGE_BYTES):
            reply: Reply
            try:
                reply = await station.obey(decode(message, Command))
            except HeadraceError as error:
                reply = Failed(error.to_info())
            except Exception as error:  # noqa: BLE001  # the benchmark says what went wrong, and goes on with the others
                reply = Failed(InternalError(f"{type(error).__name__}: {error}").to_info())
            await loop.sock_sendall(control, encode(reply))
    except ConnectionError:
        return  # whoever drives us was interrupted in the middle
    finally:
        await station.close()


def main(arguments: Sequence[str]) -> None:
    with socket.socket(fileno=int(arguments[0])) as control:
        threading.Thread(target=_end_with_benchmark, name="bench-lifeline", daemon=True).start()
        asyncio.run(serve(control))


def _end_with_benchmark() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # whatever the other threads are in the middle of


if __name__ == "__main__":
    main(sys.argv[1:])
