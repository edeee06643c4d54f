"""A process that has KV blocks and moves them, for tests of one transport without hand-offs above it: an arena, a
transport, and links to whoever introduces itself. Here in the test's event loop (`running_peer`), or in a child process
that is driven over a pipe and can be stopped and killed (`PeerProcess`).
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from kv_transfer.memory.arena import HostArena
from kv_transfer.transport import Link, Transport, find_endpoint, introduce
from kv_transfer.transports.factory import make_transport
from protocol.ids import Incarnation, TicketId, WorkerId, new_incarnation
from protocol.transfer import Introduction, TransportKind
from tests.support.kv_owner import LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS, _processes, fill
from tests.support.signals import send_signal

TICKET = TicketId("any-ticket")


@dataclass
class Peer:
    name: WorkerId
    incarnation: Incarnation
    arena: HostArena
    transport: Transport
    links: dict[str, Link] = field(default_factory=dict)

    def introduction(self) -> Introduction:
        return introduce(self.name, self.incarnation, LAYOUT, self.arena, [self.transport])

    async def meet(self, other: Introduction) -> Link:
        link = await self.transport.connect(other, find_endpoint(other, self.transport.kind))
        self.links[other.worker] = link
        return link

    def contents(self, block_ids: Sequence[int]) -> list[bytes]:
        return [bytes(self.arena.block(block_id)) for block_id in block_ids]


@contextlib.asynccontextmanager
async def running_peer(
    kind: TransportKind, name: str = "here", seed: int = 1, num_blocks: int = NUM_BLOCKS
) -> AsyncIterator[Peer]:
    arena = HostArena(num_blocks, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
    fill(arena, seed)
    incarnation = new_incarnation()
    transport = make_transport(kind, arena, incarnation=incarnation, host="127.0.0.1", may_read=lambda *_: True)
    peer = Peer(WorkerId(name), incarnation, arena, transport)
    try:
        yield peer
        for link in peer.links.values():
            await link.close()
    finally:
        await transport.close()
        arena.close()


class PeerProcess:
    """A child process with a running_peer of the name "there"."""

    def __init__(self, kind: TransportKind, seed: int = 2, num_blocks: int = NUM_BLOCKS, name: str = "there") -> None:
        self._pipe, theirs = _processes.Pipe()
        ucx = {key: value for key, value in os.environ.items() if key.startswith("UCX_")}
        self.process = _processes.Process(target=_main, args=(theirs, kind, name, seed, num_blocks, ucx), daemon=True)
        self.process.start()
        theirs.close()
        self.pid = self.process.pid or 0
        self.introduction: Introduction = self._reply()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The outcome of _act in the child; raises what was raised there."""
        self._pipe.send((method, arguments))
        return self._reply()

    async def asking(self, method: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(self.ask, method, *arguments)

    def signal(self, number: int) -> None:
        send_signal(self.pid, number)

    def _reply(self) -> Any:
        if not self._pipe.poll(30):
            raise TimeoutError("the peer process does not answer")
        reply = self._pipe.recv()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def leave(self) -> int:
        """Let it end in order; its exit code."""
        self._pipe.close()
        self.process.join(30)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._pipe.close()
        self.process.close()


@contextlib.contextmanager
def peer_process(
    kind: TransportKind, seed: int = 2, num_blocks: int = NUM_BLOCKS, name: str = "there"
) -> Iterator[PeerProcess]:
    peer = PeerProcess(kind, seed, num_blocks, name)
    try:
        yield peer
    finally:
        peer.stop()


def _main(
    pipe: Connection, kind: TransportKind, name: str, seed: int, num_blocks: int, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    asyncio.run(_serve(pipe, kind, name, seed, num_blocks))


async def _serve(pipe: Connection, kind: TransportKind, name: str, seed: int, num_blocks: int) -> None:
    async with running_peer(kind, name, seed, num_blocks) as peer:
        pipe.send(peer.introduction())
        while True:
            try:
                method, arguments = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            try:
                pipe.send(await _act(peer, method, arguments))
            except Exception as error:  # noqa: BLE001  # goes to the test, whatever it is
                pipe.send(error)


async def _act(peer: Peer, method: str, arguments: tuple[Any, ...]) -> Any:
    match method:
        case "meet":
            await peer.meet(*arguments)
            return None
        case "contents":
            return peer.contents(*arguments)
        case "read":
            name, remote, local, timeout_s, repeats = arguments
            for _ in range(repeats):
                await peer.links[name].read(TICKET, remote, local, timeout_s)
            return None
        case "write":
            name, local, remote, timeout_s, repeats = arguments
            for _ in range(repeats):
                await peer.links[name].write(local, remote, timeout_s)
            return None
        case _:
            raise ValueError(method)
