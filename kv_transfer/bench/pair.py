"""Pair: two stations on loopback whose contestants have met, under one setting of UCX."""

import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

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
from kv_transfer.bench.shapes import Shape
from protocol.errors import InternalError, NodeLost
from protocol.transfer import Direction, TransportKind
from protocol.wire import decode, encode
from runtime.child_python import child_python

REPLY_TIMEOUT_S = 120.0
GOODBYE_S = 5.0

R = TypeVar("R", bound=Reply)


class StationProcess:
    """A station, started and spoken to. `with` ends it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(REPLY_TIMEOUT_S)
        with theirs:
            command, base = child_python("kv_transfer.bench.station", str(theirs.fileno()))
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                command,
                stdin=subprocess.PIPE,  # its end is ours, however we end
                stdout=subprocess.DEVNULL,  # UCX prints there
                pass_fds=(theirs.fileno(),),
                env={**base, **environment},
                start_new_session=True,  # Ctrl-C is for us
            )
        self.pid = self._process.pid

    def tell(self, command: Command) -> None:
        try:
            self._control.sendall(encode(command))
        except OSError as error:
            raise self._dead() from error

    def hear(self, reply_type: type[R]) -> R:
        """Raises what the station has raised, and NodeLost when it has died or says nothing for long."""
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise self._dead() from error
        if not message:
            raise self._dead()
        reply: Reply = decode(message, Reply)
        if isinstance(reply, Failed):
            raise reply.error.to_error()
        if not isinstance(reply, reply_type):
            raise InternalError(f"a station answered {type(reply).__name__} where {reply_type.__name__} was due")
        return reply

    def ask(self, command: Command, reply_type: type[R]) -> R:
        self.tell(command)
        return self.hear(reply_type)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()  # a station that is well ends now, and tidies up
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _dead(self) -> NodeLost:
        return NodeLost(f"a process of the benchmark ended or hangs (exit status {self._process.poll()})")


class Pair:
    """`ucx_tls` None: UCX is as the user has set it."""

    def __init__(self, ucx_tls: str | None) -> None:
        self.setting = "" if ucx_tls is None else f"UCX_TLS={ucx_tls}"
        environment = {} if ucx_tls is None else {"UCX_TLS": ucx_tls}
        self._owner = StationProcess(environment)
        try:
            self._reader = StationProcess(environment)
        except BaseException:
            self._owner.__exit__()
            raise
        self._pids: tuple[int, ...] = (self._owner.pid, self._reader.pid)
        self.directions: dict[str, tuple[Direction, ...]] = {}
        self.missing: dict[str, str] = {}

    def idle(self, transport: TransportKind, seconds: float) -> float | None:
        return self._owner.ask(Idle(transport, seconds), Idled).cpu_share

    def open(self, transports: Sequence[TransportKind], block_bytes: int, num_blocks: int, *, baselines: bool) -> None:
        """Make both arenas, the owner's filled with random bytes, and let all contestants meet."""
        command = Open(tuple(transports), baselines, block_bytes, num_blocks, seed=1)
        stations = (self._owner, self._reader)
        for station in stations:
            station.tell(command)
        of_owner, of_reader = (station.hear(Opened) for station in stations)
        self._pids = (*self._pids, *of_owner.pids, *of_reader.pids)
        self.missing = {**of_owner.missing, **of_reader.missing}
        self.directions = {name: found for name, found in of_owner.directions.items() if name in of_reader.directions}
        for station, offers in ((self._owner, of_reader.offers), (self._reader, of_owner.offers)):
            station.tell(Meet({name: offer for name, offer in offers.items() if name in self.directions}))
        for station in stations:
            station.hear(Done)

    def prove(self, contestant: str, direction: Direction, shape: Shape) -> bool:
        """Move once onto blocks that were wiped; whether the bytes are the owner's then. Also the warm-up."""
        self._reader.ask(Wipe(shape.destination), Done)
        self.move(contestant, direction, shape, checksums=False, seconds=0, at_least=1)
        sums = [
            station.ask(Sum(ids), Sums).checksums
            for station, ids in ((self._owner, shape.source), (self._reader, shape.destination))
        ]
        return sums[0] == sums[1]

    def move(
        self, contestant: str, direction: Direction, shape: Shape, *, checksums: bool, seconds: float, at_least: int
    ) -> tuple[tuple[float, ...], float]:
        """The durations in seconds, and the CPU seconds that both stations and their helpers have spent on them all."""
        initiator = self._reader if direction == "pull" else self._owner
        command = Move(contestant, direction, shape.source, shape.destination, checksums, seconds, at_least)
        before = self._cpu_seconds()
        moved = initiator.ask(command, Moved)
        return moved.seconds, self._cpu_seconds() - before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._reader.__exit__()
        finally:
            self._owner.__exit__()

    def _cpu_seconds(self) -> float:
        return sum(map(cpu_seconds, self._pids))
