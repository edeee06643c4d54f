"""NixlAgent: the active agent, which reads and writes peers' blocks, and the one thread that calls it.

The library is not promised to be thread-safe, some of its calls copy all bytes before they return, and a transfer makes
progress only while somebody polls it. So after the start one thread makes every call: it takes commands from a queue,
posts the chunks of all transfers in turn without waiting for them, and polls those in flight. A peer that stands still
delays nobody else. Because it polls, the agent goes without the library's progress thread, which would only compete.

NIXL cannot cancel a transfer, nor does it time one out: a chunk is over when the library says so, and until then its
bytes may move. The thread therefore polls every chunk until then, however long ago its caller gave up, and a peer's
connection is given up only when no transfer to it is left.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from kv_transfer.transports.nixl.blocks import NixlBlocks
from kv_transfer.transports.nixl.library import error_types, lost_peer_errors, make_agent, register
from kv_transfer.transports.nixl.mailbox import Mailbox
from kv_transfer.transports.nixl.transfer import NixlPeer, NixlTransfer
from protocol.errors import PeerLost, TransferError

POLL_MIN_S = 30e-6
POLL_MAX_S = 1e-3
POLL_SHARE = 0.25
"""Of the time since something last happened: so polling adds at most a quarter to how long a chunk takes."""
POLL_ABANDONED_S = 20e-3
IDLE_PROGRESS_S = 1.0
"""How often an idle agent looks at its connections: UCX keeps them alive by messages that somebody must take."""
MAX_UNUSED_PEERS = 64
"""Kept for their next link: to forget a peer that lives costs two sockets for good, one at either end, which the library
does not close."""

T = TypeVar("T")

log = logging.getLogger(__name__)

_undying: list[Any] = []
"""Agents that were closed with a transfer unfinished or in a state that we do not know, and the memory that it may still touch. Destroying such an agent
would abort the process at the other end; unmapping the memory, this one."""


class NixlAgent:
    """Made at start; raises ConfigError without a working NIXL. `keep_alive` is what holds the blocks' memory."""

    def __init__(self, api: ModuleType, name: str, blocks: NixlBlocks, keep_alive: object) -> None:
        self._blocks = blocks
        self._keep_alive = keep_alive
        self._errors = error_types(api)
        self._lost_errors = lost_peer_errors(api)
        self._agent = make_agent(api, name, progress_delay_us=None)
        register(api, self._agent, blocks)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", blocks.rows(), blocks.memory)
        self._commands = Mailbox()
        self._transfers: deque[NixlTransfer] = deque()
        """Not over yet, in the order of their turns."""
        self._peers: dict[str, NixlPeer] = {}
        self._stopping = False
        self._broken = False
        """What went wrong is unknown to us: nothing is asked of the library any more."""
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._thread.start()

    # Called on the event loop.

    async def add_peer(self, name: str, metadata: bytes, blocks: NixlBlocks) -> NixlPeer:
        """Know a peer's passive agent, from metadata whose checksum holds. Raises TransferError."""
        return await self._call(lambda: self._add(NixlPeer(name, metadata, blocks)))

    async def drop_peer(self, peer: NixlPeer) -> None:
        """The counterpart of one add_peer."""
        await self._call(lambda: self._drop(peer))

    def start(self, transfer: NixlTransfer) -> None:
        """Post its chunks as they have their turn; returns at once."""
        self._commands.put(lambda: self._begin(transfer))

    async def close(self) -> None:
        """Stop the thread. What has not ended never will: its blocks stay quarantined to the process's end."""
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
            if self._broken:
                _tell(loop, answer, error=_no_agent())
                return
            try:
                result = work()
            except TransferError as error:
                _tell(loop, answer, error=error)
            except self._errors as error:
                _tell(loop, answer, error=TransferError(f"NIXL: {error}"))
            except Exception:
                log.exception("a NIXL call failed")
                _tell(loop, answer, error=TransferError("a NIXL call failed; see this process's log"))
            else:
                _tell(loop, answer, result=result)

        self._commands.put(command)
        return await answer

    # Called on the agent thread.

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            log.exception("NIXL failed in a way that we do not know: this process moves no more KV by it")
            self._refuse_all()
        self._shut_down()

    def _refuse_all(self) -> None:
        """Until the end, as every call would else wait for ever. Transfers end, but not those with a chunk in flight: its
        bytes may still move. Their callers run into their deadlines, and the blocks stay in quarantine."""
        self._broken = True
        for transfer in [transfer for transfer in self._transfers if not transfer.in_flight]:
            self._transfers.remove(transfer)
            _tell(transfer.loop, transfer.ended, error=_no_agent())
        while not self._stopping:
            self._obey(None)

    def _work(self) -> None:
        last_event = time.monotonic()
        while not self._stopping:
            obeyed = self._obey(self._pause(last_event))
            posted = self._post_one()
            if self._poll() or obeyed or posted:
                last_event = time.monotonic()
            self._end_those_over()
            if self._peers and not self._transfers:
                self._look_around()

    def _pause(self, last_event: float) -> float | None:
        """How long to wait for a command before posting or polling again; None is for ever."""
        if not self._transfers:
            return IDLE_PROGRESS_S if self._peers else None
        if any(transfer.may_post for transfer in self._transfers):
            return 0.0
        if all(transfer.abandoned for transfer in self._transfers):
            return POLL_ABANDONED_S
        return min(POLL_MAX_S, max(POLL_MIN_S, POLL_SHARE * (time.monotonic() - last_event)))

    def _obey(self, pause_s: float | None) -> bool:
        """Follow the commands that are there, or come within `pause_s`. False if none did."""
        commands = self._commands.take(pause_s)
        for command in commands:
            command()
        return bool(commands)

    def _look_around(self) -> None:
        """For an idle agent: take what the network has for it."""
        try:
            self._agent.get_new_notifs()  # for its side effect; nobody sends any
        except self._errors as error:
            log.info("NIXL has bad news of a peer, which the next transfer will meet: %s", error)

    def _begin(self, transfer: NixlTransfer) -> None:
        if self._broken:
            _tell(transfer.loop, transfer.ended, error=_no_agent())
            return
        transfer.peer.num_transfers += 1
        self._transfers.append(transfer)

    def _post_one(self) -> bool:
        """Post the next chunk of the transfer whose turn it is. False if none has any to post."""
        for _ in range(len(self._transfers)):
            transfer = self._transfers[0]
            self._transfers.rotate(-1)
            if transfer.may_post:
                self._post_chunk(transfer)
                return True
        return False

    def _post_chunk(self, transfer: NixlTransfer) -> None:
        local, remote = transfer.next_chunk()
        handle = None
        try:
            handle = self._agent.make_prepped_xfer(
                transfer.operation, self._local, local, transfer.peer.descriptors, remote
            )
            transfer.in_flight.append(handle)  # before the call: after an error that we do not know it may be
            if self._agent.transfer(handle) == "PROC":
                return
        except self._errors as error:
            self._note(transfer, error)
        if handle is not None:
            transfer.in_flight.remove(handle)
            self._release(transfer, handle)

    def _poll(self) -> bool:
        """Look at every chunk in flight; True if one ended."""
        num_ended = 0
        for transfer in self._transfers:
            for handle in list(transfer.in_flight):
                if self._ended(transfer, handle):
                    transfer.in_flight.remove(handle)
                    self._release(transfer, handle)
                    num_ended += 1
        return num_ended > 0

    def _ended(self, transfer: NixlTransfer, handle: Any) -> bool:
        try:
            return bool(self._agent.check_xfer_state(handle) != "PROC")
        except self._errors as error:
            self._note(transfer, error)
            return True

    def _note(self, transfer: NixlTransfer, error: Exception) -> None:
        """The library reports an error when a chunk is over, never before: nothing of it moves after one."""
        if isinstance(error, self._lost_errors):
            transfer.peer.lost = True
            failure: TransferError = PeerLost(f"NIXL lost the peer: {error}")
        else:
            failure = TransferError(f"NIXL refused to {transfer.operation.lower()}: {error}")
        transfer.error = transfer.error or failure

    def _end_those_over(self) -> None:
        for transfer in [transfer for transfer in self._transfers if transfer.over]:
            self._transfers.remove(transfer)
            transfer.peer.num_transfers -= 1
            _tell(transfer.loop, transfer.ended, error=transfer.outcome())
            self._forget_if_unused(transfer.peer)

    def _release(self, transfer: NixlTransfer, handle: Any) -> None:
        try:
            handle.release()
        except self._errors as error:
            log.info("NIXL could not release a transfer to %s: %s", transfer.peer.name, error)

    def _add(self, peer: NixlPeer) -> NixlPeer:
        known = self._peers.get(peer.name)
        if known is not None and known.lost:
            if known.num_transfers:
                raise PeerLost(f"transfers over the lost connection to {peer.name} have not ended yet")
            self._forget(known)  # a lost agent must be removed before it is added again, or its name is spoilt
            known = None
        if known is None:
            found: bytes = self._agent.add_remote_agent(peer.metadata)
            name = found.decode(errors="replace")
            if name != peer.name:
                if name not in self._peers:
                    self._agent.remove_remote_agent(found)
                raise TransferError(f"the NIXL metadata of {peer.name} is of {name}")
            peer.descriptors = self._agent.prep_xfer_dlist(name, peer.blocks.rows(), peer.blocks.memory)
            known = self._peers[name] = peer
        elif known.blocks != peer.blocks:
            raise TransferError(f"{peer.name} announced other blocks before")
        known.num_links += 1
        return known

    def _drop(self, peer: NixlPeer) -> None:
        peer.num_links -= 1
        self._forget_if_unused(peer)

    def _forget_if_unused(self, peer: NixlPeer) -> None:
        """At once if it is lost; else when many others have come after it."""
        if peer.in_use or self._peers.get(peer.name) is not peer:
            return
        self._peers[peer.name] = self._peers.pop(peer.name)
        unused = [known for known in self._peers.values() if not known.in_use]
        for known in [peer] if peer.lost else unused[: max(0, len(unused) - MAX_UNUSED_PEERS)]:
            self._forget(known)

    def _forget(self, peer: NixlPeer) -> None:
        del self._peers[peer.name]
        try:
            peer.descriptors.release()
            self._agent.remove_remote_agent(peer.name)
        except self._errors as error:
            log.info("NIXL could not forget %s: %s", peer.name, error)
        finally:
            peer.descriptors = None  # it holds the agent

    def _shut_down(self) -> None:
        unfinished = [transfer for transfer in self._transfers if transfer.in_flight]
        if unfinished or self._broken:
            log.warning("NIXL stops with %d transfers unfinished", len(unfinished))
            _undying.append((self._agent, unfinished, self._keep_alive))
            return
        for peer in list(self._peers.values()):
            self._forget(peer)
        self._local.release()
        self._local = self._agent = None  # the last references: the agent ends here, on its own thread


def _no_agent() -> PeerLost:
    return PeerLost("this node's NIXL agent has failed; see this process's log")


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
