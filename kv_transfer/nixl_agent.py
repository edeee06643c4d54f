"""NixlAgent: the one thread that calls NIXL. Everything else asks it and waits.

The library is not promised to be thread-safe, some of its calls copy all bytes before they return, and a transfer makes
progress only while somebody polls it. So after the start one thread makes every call: it takes commands from a queue, posts transfers
without waiting for them, and polls those in flight. A peer that stands still delays nobody else.

NIXL cannot cancel a transfer, nor does it time one out: a transfer is over when the library says so, and until then its
bytes may land. The thread therefore polls every transfer until then, however long ago its reader gave up, and a peer's
connection is given up only when no transfer to it is left.
"""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kv_transfer.arena import HostArena
from kv_transfer.nixl_library import error_types, load_nixl, make_agent
from kv_transfer.plan import CopyRun
from protocol.errors import PeerLost, TransferError
from protocol.ids import Incarnation

POLL_FIRST_S = 50e-6
POLL_MAX_S = 1e-3
POLL_ABANDONED_S = 20e-3

T = TypeVar("T")

log = logging.getLogger(__name__)

_undying: list[Any] = []
"""Agents that were closed with a transfer unfinished, and the memory it may land in. Destroying such an agent would
abort the process at the other end; unmapping the memory, this one."""


class NixlPeer:
    """A remote agent known to ours. The agent thread alone changes it."""

    def __init__(self, name: str, metadata: bytes, address: int, num_blocks: int) -> None:
        self.name = name
        self.metadata = metadata
        self.address = address
        self.num_blocks = num_blocks
        self.blocks: Any = None
        self.num_links = 0
        self.num_in_flight = 0
        self.lost = False


class NixlTransfer:
    """One read. `ended` gets None, or an error, when no more bytes can land. `abandoned` only slows polling."""

    def __init__(self, peer: NixlPeer, runs: list[CopyRun], ended: asyncio.Future[None]) -> None:
        self.peer = peer
        self.runs = runs
        self.ended = ended
        self.loop = ended.get_loop()
        self.abandoned = False
        self.handle: Any = None


class NixlAgent:
    """Made at start; raises ConfigError without a working NIXL. The arena is registered once and stays so."""

    def __init__(self, arena: HostArena, incarnation: Incarnation, host: str, serial: int) -> None:
        self._arena = arena
        self.name = f"headrace-{incarnation}-{serial}"
        api = load_nixl(host)
        self._errors = error_types(api)
        self._lost_errors = (
            api.nixlBind.nixlRemoteDisconnectError,
            api.nixlBind.nixlNotFoundError,
            api.nixlBind.nixlBackendError,
        )
        self._agent = make_agent(api, self.name)
        self._agent.register_memory([(arena.address, arena.size_bytes, 0, "")], "DRAM")
        self._local_blocks = self._descriptors("NIXL_INIT_AGENT", arena.address, arena.num_wire_blocks)
        self.metadata: bytes = self._agent.get_agent_metadata()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: list[NixlTransfer] = []
        self._peers: dict[str, NixlPeer] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._thread.start()

    # Called on the event loop.

    async def add_peer(self, name: str, metadata: bytes, address: int, num_blocks: int) -> NixlPeer:
        """Know a remote agent, from metadata whose checksum holds. Raises TransferError."""
        return await self._call(lambda: self._add(NixlPeer(name, metadata, address, num_blocks)))

    async def drop_peer(self, peer: NixlPeer) -> None:
        """The counterpart of one add_peer."""
        await self._call(lambda: self._drop(peer))

    def read(self, peer: NixlPeer, runs: list[CopyRun]) -> NixlTransfer:
        """Start a read and return at once."""
        transfer = NixlTransfer(peer, runs, asyncio.get_running_loop().create_future())
        self._commands.put(lambda: self._post(transfer))
        return transfer

    async def close(self) -> None:
        """Stop the thread. Reads that have not ended never will: their blocks stay quarantined to the process's end."""
        if not self._stopping:
            self._stopping = True
            self._commands.put(lambda: None)
            await asyncio.to_thread(self._thread.join)

    async def _call(self, work: Callable[[], T]) -> T:
        if self._stopping:
            raise PeerLost("this node's NIXL agent has stopped")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def command() -> None:
            try:
                result = work()
            except TransferError as error:
                _tell(loop, answer, error=error)
            except self._errors as error:
                _tell(loop, answer, error=TransferError(f"NIXL: {error}"))
            else:
                _tell(loop, answer, result=result)

        self._commands.put(command)
        return await answer

    # Called on the agent thread.

    def _run(self) -> None:
        idle_polls = itertools.count()
        while not self._stopping:
            try:
                self._commands.get(timeout=self._pause(next(idle_polls)))()
                idle_polls = itertools.count()
            except queue.Empty:
                pass
            if self._poll():
                idle_polls = itertools.count()
        self._shut_down()

    def _pause(self, idle_polls: int) -> float | None:
        """How long to wait for a command before polling again: doubling, and longer when nobody waits for an answer."""
        if not self._in_flight:
            return None
        if all(transfer.abandoned for transfer in self._in_flight):
            return POLL_ABANDONED_S
        return min(POLL_MAX_S, POLL_FIRST_S * (1 << min(idle_polls, 10)))

    def _poll(self) -> bool:
        """Look at every transfer in flight; True if one ended."""
        ended = [transfer for transfer in self._in_flight if self._ended(transfer)]
        for transfer in ended:
            self._in_flight.remove(transfer)
            self._left(transfer.peer)
        return bool(ended)

    def _ended(self, transfer: NixlTransfer) -> bool:
        try:
            if self._agent.check_xfer_state(transfer.handle) == "PROC":
                return False
            self._succeed(transfer)
        except self._errors as error:
            self._fail(transfer, error)
        return True

    def _post(self, transfer: NixlTransfer) -> None:
        peer = transfer.peer
        if transfer.abandoned or peer.lost:
            _tell(transfer.loop, transfer.ended, error=PeerLost("the connection to the peer is lost"))
            return
        try:
            transfer.handle = self._agent.make_prepped_xfer(
                "READ",
                self._local_blocks,
                _indices((run.destination, run.num_blocks) for run in transfer.runs),
                peer.blocks,
                _indices((run.source, run.num_blocks) for run in transfer.runs),
            )
            if self._agent.transfer(transfer.handle) == "PROC":
                self._in_flight.append(transfer)
                peer.num_in_flight += 1
                return
            self._succeed(transfer)
        except self._errors as error:
            self._fail(transfer, error)

    def _succeed(self, transfer: NixlTransfer) -> None:
        self._release(transfer)
        _tell(transfer.loop, transfer.ended)

    def _fail(self, transfer: NixlTransfer, error: Exception) -> None:
        """The library reports errors when a transfer is over, never before: nothing lands after one."""
        self._release(transfer)
        if isinstance(error, self._lost_errors):
            transfer.peer.lost = True
            _tell(transfer.loop, transfer.ended, error=PeerLost(f"NIXL lost the peer: {error}"))
        else:
            _tell(transfer.loop, transfer.ended, error=TransferError(f"NIXL refused the read: {error}"))

    def _release(self, transfer: NixlTransfer) -> None:
        handle, transfer.handle = transfer.handle, None
        if handle is None:
            return
        try:
            handle.release()
        except self._errors as error:
            log.info("NIXL could not release a transfer to %s: %s", transfer.peer.name, error)

    def _add(self, peer: NixlPeer) -> NixlPeer:
        known = self._peers.get(peer.name)
        if known is not None and known.lost:
            if known.num_in_flight:
                raise PeerLost(f"reads over the lost connection to {peer.name} have not ended yet")
            self._forget(known)  # a lost agent must be removed before it is added again, or its name is spoilt
            known = None
        if known is None:
            name = self._agent.add_remote_agent(peer.metadata).decode()
            if name != peer.name:
                self._agent.remove_remote_agent(name)
                raise TransferError(f"the NIXL metadata of {peer.name} is of {name}")
            peer.blocks = self._descriptors(name, peer.address, peer.num_blocks)
            known = self._peers[name] = peer
        known.num_links += 1
        return known

    def _drop(self, peer: NixlPeer) -> None:
        peer.num_links -= 1
        self._left(peer, in_flight=0)

    def _left(self, peer: NixlPeer, in_flight: int = 1) -> None:
        peer.num_in_flight -= in_flight
        if peer.num_in_flight == 0 and peer.num_links == 0 and self._peers.get(peer.name) is peer:
            self._forget(peer)

    def _forget(self, peer: NixlPeer) -> None:
        del self._peers[peer.name]
        try:
            peer.blocks.release()
            self._agent.remove_remote_agent(peer.name)
        except self._errors as error:
            log.info("NIXL could not forget %s: %s", peer.name, error)
        finally:
            peer.blocks = None  # it holds the agent

    def _shut_down(self) -> None:
        if self._in_flight:
            log.warning("NIXL stops with %d reads unfinished", len(self._in_flight))
            _undying.append((self._agent, self._in_flight, self._arena.tensor()))
            return
        for peer in list(self._peers.values()):
            self._forget(peer)
        self._local_blocks.release()
        self._local_blocks = self._agent = None  # the last references: the agent ends here, on its own thread

    def _descriptors(self, agent_name: str, address: int, num_blocks: int) -> Any:
        """One descriptor per block of an arena: rows of (address, bytes, device)."""
        rows = np.zeros((num_blocks, 3), np.uint64)
        rows[:, 0] = np.uint64(address) + np.arange(num_blocks, dtype=np.uint64) * np.uint64(self._arena.block_bytes)
        rows[:, 1] = self._arena.block_bytes
        return self._agent.prep_xfer_dlist(agent_name, rows, "DRAM")


def _indices(runs: Iterable[tuple[int, int]]) -> NDArray[np.int32]:
    return np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in runs])


def _tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], *, result: Any = None, error: Exception | None = None
) -> None:
    """Resolve a future of the event loop from the agent thread."""

    def resolve() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        log.debug("the event loop ended before a NIXL call did")
