"""UcxHelper: a node's hold on its helper process. Starts it, speaks with it, and starts it anew when it has died.

Every helper is one generation. What belongs to a generation (links, reads, the payload that peers were given) ends with
it: reads in flight fail with PeerLost, which is the truth, since nothing can land any more. A thread of the node listens
to the helper, answers its questions, and sees it die.
"""

import asyncio
import itertools
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kv_transfer.memory.arena import HEADER_BYTES, HostArena
from kv_transfer.transports.plan import CopyRun
from kv_transfer.transports.ucx.library import require_ucxx, set_environment
from kv_transfer.transports.ucx.wire import (
    MAX_MESSAGE_BYTES,
    AskPermission,
    Command,
    Connect,
    Disconnect,
    Event,
    HelperSettings,
    Note,
    Permission,
    Read,
    ReadEnded,
    Started,
    StartFailed,
    UcxPayload,
)
from protocol.errors import ConfigError, HeadraceError, PeerLost, TransferError
from protocol.ids import TicketId
from protocol.wire import decode, encode
from runtime.child_python import child_python

START_TIMEOUT_S = 30.0
RESTART_PAUSE_S = 1.0

log = logging.getLogger(__name__)

MayReadRuns = Callable[[TicketId, Sequence[tuple[int, int]]], bool]


@dataclass(frozen=True, slots=True)
class UcxPeer:
    """A peer that one generation of the helper was told of."""

    generation: int
    peer_id: int


class _Generation:
    """One helper process, from its start to its end."""

    def __init__(self, number: int, arena: HostArena, host: str) -> None:
        self.number = number
        self.ended = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = HelperSettings(arena.fd, HEADER_BYTES, arena.block_bytes, arena.num_wire_blocks, theirs.fileno())
        command, environment = child_python(
            "kv_transfer.transports.ucx.process", msgspec.json.encode(settings).decode()
        )
        set_environment(environment, host)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                command,
                stdin=subprocess.PIPE,  # held open by this process alone: its end tells the helper of ours
                pass_fds=(arena.fd, theirs.fileno()),
                env=environment,
            )

    def receive(self, timeout_s: float | None = None) -> Event | None:
        """None when the helper has died, or takes longer than `timeout_s`."""
        try:
            self.control.settimeout(timeout_s)
            message = self.control.recv(MAX_MESSAGE_BYTES)
        except OSError:  # a timeout is one
            return None
        return decode(message, Event) if message else None

    def send(self, command: Command) -> None:
        try:
            self.control.sendall(encode(command))
        except OSError as error:  # it has died; the listening thread says so to everybody
            log.debug("the UCX helper takes no commands: %s", error)

    def end(self) -> None:
        """Kill the process, if it lives, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.control.close()


class UcxHelper:
    """Started on construction, which takes half a second; raises ConfigError where ucxx is missing or cannot start.

    `may_read` answers for the blocks of a request; it is called from the listening thread.
    """

    def __init__(self, arena: HostArena, host: str, may_read: MayReadRuns) -> None:
        require_ucxx()
        self._arena = arena
        self._host = host
        self._may_read = may_read
        self._lock = threading.Lock()
        self._reads: dict[int, asyncio.Future[None]] = {}
        self._ids = itertools.count()
        self._closing = threading.Event()
        self._current, self.payload = self._begin(0)
        self._listener = threading.Thread(target=self._run, name="kv-ucx", daemon=True)
        self._listener.start()

    # Called on the event loop.

    def connect(self, payload: UcxPayload) -> UcxPeer:
        """Tell the helper of a peer. Whether it can be reached shows at the first read. Raises PeerLost without a helper."""
        with self._lock:
            generation = self._live_generation()
            peer = UcxPeer(generation.number, next(self._ids))
        generation.send(Connect(peer.peer_id, payload))
        return peer

    def disconnect(self, peer: UcxPeer) -> None:
        """The counterpart of connect. The helper keeps the connection for reads that have not ended."""
        if peer.generation == self._current.number:
            self._current.send(Disconnect(peer.peer_id))

    def read(self, peer: UcxPeer, ticket_id: TicketId, runs: Sequence[CopyRun]) -> asyncio.Future[None]:
        """Begin a read of at most MAX_RUNS runs. The future gets its result, or a TransferError, when no more bytes can
        land. Raises PeerLost where the helper that knew the peer is gone."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            generation = self._live_generation()
            if generation.number != peer.generation:
                raise PeerLost("the UCX helper process that was connected to this peer has ended")
            read_id = next(self._ids)
            self._reads[read_id] = ended
        generation.send(Read(read_id, peer.peer_id, ticket_id, tuple(runs)))
        return ended

    def fence(self, peer: UcxPeer) -> None:
        """End the helper that knew this peer: the one proof that its reads are over. Another takes its place."""
        with self._lock:
            if self._current.number == peer.generation and not self._current.ended:
                log.warning("ending the UCX helper process: a peer does not let a read end")
                self._current.process.kill()

    @property
    def pid(self) -> int:
        """Of the present helper process."""
        return self._current.process.pid

    async def close(self) -> None:
        """End the helper, and with it every read. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            with self._lock:
                if not self._current.ended:
                    self._current.process.kill()
            await asyncio.to_thread(self._listener.join)

    def _live_generation(self) -> _Generation:
        if self._current.ended:
            raise PeerLost("the UCX helper process has ended and is being replaced")
        return self._current

    # Called on the listening thread, but for the first start.

    def _begin(self, number: int) -> tuple[_Generation, UcxPayload]:
        generation = _Generation(number, self._arena, self._host)
        event = generation.receive(START_TIMEOUT_S)
        if isinstance(event, Started):
            return generation, event.payload
        generation.end()
        reason = event.reason if isinstance(event, StartFailed) else "its output says why"
        raise ConfigError(f"the UCX helper process does not start: {reason}", param="transfer.transport")

    def _run(self) -> None:
        while True:
            generation = self._current
            while (event := generation.receive()) is not None:
                self._act(generation, event)
            with self._lock:
                generation.ended = True
                unfinished, self._reads = self._reads, {}
            generation.end()
            for ended in unfinished.values():
                _tell(ended, PeerLost("the UCX helper process has ended"))
            if self._closing.is_set():
                return
            log.warning("the UCX helper process has ended (exit status %s)", generation.process.returncode)
            if not self._replace(generation.number + 1):
                return

    def _replace(self, number: int) -> bool:
        """Start the next generation, however often that takes. False if we are told to close before."""
        pause_s = RESTART_PAUSE_S
        while True:
            started = time.monotonic()
            try:
                generation, payload = self._begin(number)
            except ConfigError as error:
                log.error("%s", error.message)
            else:
                with self._lock:
                    self._current, self.payload = generation, payload
                    if self._closing.is_set():
                        generation.process.kill()
                return True
            if self._closing.wait(max(0.0, pause_s - (time.monotonic() - started))):
                return False
            pause_s = min(2 * pause_s, 60 * RESTART_PAUSE_S)

    def _act(self, generation: _Generation, event: Event) -> None:
        match event:
            case ReadEnded(read_id, error):
                with self._lock:
                    ended = self._reads.pop(read_id)
                _tell(ended, None if error is None else _as_transfer_error(error.to_error()))
            case AskPermission(question_id, ticket_id, runs):
                generation.send(Permission(question_id, self._may_read(TicketId(ticket_id), runs)))
            case Note(text):
                log.info("the UCX helper is %s", text)
            case _:
                log.warning("the UCX helper sends what it should not: %r", event)


def _as_transfer_error(error: HeadraceError) -> TransferError:
    return error if isinstance(error, TransferError) else TransferError(error.message)


def _tell(ended: asyncio.Future[None], error: TransferError | None) -> None:
    """Resolve a future of the event loop from the listening thread."""

    def resolve() -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    try:
        ended.get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:
        log.debug("the event loop ended before a UCX read did")
