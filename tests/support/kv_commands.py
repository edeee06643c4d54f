"""What a NodeProcess does inside its process: the commands of an owner and of a reader, and the loop that runs them.

Commands take and return plain values, and a fetch returns an Outcome whatever became of it. Nothing here judges.
"""

import asyncio
import contextlib
import inspect
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import msgspec
import psutil

from kv_transfer.handoff.imports import FetchFailed
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from protocol.errors import InternalError
from protocol.ids import RequestId, TicketId, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Direction, Introduction, ReleaseLease, RenewLease, TransferTicket, TransportKind
from runtime.node_config import TransferOptions
from tests.support.kv_owner import LAYOUT, Owner, running_owner
from tests.support.kv_reader import ReaderNode, running_reader
from tests.support.mapped_memory import arena_mappings

SMALL_BLOCKS = LAYOUT
LARGE_BLOCKS = msgspec.structs.replace(LAYOUT, num_layers=128)
"""512 KiB a block, 32 MiB an arena: long enough on the way to be hit there."""

POOLED = re.compile("_[1-9][0-9]*$")
"""The name of a thread that a pool has started after its first. Pools start theirs as they are needed, up to a number."""

Role = Literal["owner", "reader"]


@dataclass(frozen=True)
class NodeSpec:
    """What to start. `network_namespace`: one of network.private_network. `environment`: on top of the test's UCX_*."""

    role: Role
    kind: TransportKind = "nixl"
    direction: Direction = "pull"
    port: int = 0
    host: str = "127.0.0.1"
    seed: int = 1
    layout: KVLayout = SMALL_BLOCKS
    stall_s: float = 0.6
    lease_s: float = 30.0
    network_namespace: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> TransferOptions:
        return TransferOptions(
            transport=self.kind, direction=self.direction, stall_timeout_s=self.stall_s, lease_ttl_s=self.lease_s
        )


@dataclass(frozen=True)
class Outcome:
    """How a fetch ended. `error`: None for success, else the code of the error, or "cancelled". `settled`: its local
    blocks were free at once."""

    error: str | None
    message: str
    num_valid: int
    settled: bool
    took_s: float


@dataclass(frozen=True)
class Resources:
    """What a process holds. `quarantined`: reads and fetches whose bytes may still land. `leases`: open exports."""

    threads: int
    files: int
    tasks: int
    quarantined: int
    leases: int

    def excess_over(self, before: "Resources", files: int = 2) -> list[str]:
        """What there is more of. A few files come and go with connections, and a pool may have started its second thread."""
        limits = {"threads": 1, "files": files, "tasks": 0, "quarantined": 0, "leases": 0}
        found = {name: getattr(self, name) - getattr(before, name) for name in limits}
        return [f"{more} {name}" for name, more in found.items() if more > limits[name]]


class Commands:
    """Of both roles."""

    def __init__(self, arena: HostArena, pipe: Connection) -> None:
        self.arena = arena
        self.pipe = pipe
        self.leaving = asyncio.Event()

    def leave(self) -> None:
        self.leaving.set()

    def digests(self, block_ids: list[int]) -> list[int]:
        return list(checksums(self.arena, block_ids))

    def paint(self, block_ids: list[int], value: int) -> None:
        """What the next user of these blocks would do: write into them."""
        for block_id in block_ids:
            self.arena.block(block_id)[:] = bytes([value]) * self.arena.block_bytes

    def painted(self, block_ids: list[int], value: int) -> bool:
        expected = bytes([value]) * self.arena.block_bytes
        return all(self.arena.block(block_id) == expected for block_id in block_ids)

    def mapping(self) -> list[str]:
        """Where the arena lies."""
        return [line.split()[0] for line in arena_mappings()]

    def strike(self, pid: int, number: int, block_id: int) -> None:
        """Signal a process at the moment at which bytes arrive in a local block, which is zeroed first."""
        self.paint([block_id], 0)
        block = self.arena.block(block_id)

        def watch() -> None:
            while block[:8] == bytes(8):
                time.sleep(0)
            os.kill(pid, number)

        threading.Thread(target=watch, daemon=True).start()

    def cut_sockets(self, spared_ports: list[int]) -> int:
        """Break every TCP connection of this process but those of the control plane, as a network would: at once, and
        without a word to either library. How many there were."""
        found = [
            connection.fd
            for connection in psutil.Process().net_connections("tcp")
            if connection.status == psutil.CONN_ESTABLISHED
            and not {connection.laddr.port, connection.raddr.port} & set(spared_ports)
        ]
        for number in found:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as handle:
                handle.shutdown(socket.SHUT_RDWR)  # one connection's end may already have ended another
        return len(found)

    def resources(self) -> Resources:
        return Resources(
            threads=sum(name.startswith("kv-") and not POOLED.search(name) for name in _thread_names()),
            files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208  # Path.iterdir opens one more at some other moment
            tasks=sum(
                not task.get_name().startswith("kv-presence") for task in asyncio.all_tasks()
            ),  # one an owner, kept
            quarantined=self.num_quarantined(),
            leases=self.num_leases(),
        )

    def num_quarantined(self) -> int:
        return 0

    def num_leases(self) -> int:
        return 0


class OwnerCommands(Commands):
    def __init__(self, owner: Owner, pipe: Connection) -> None:
        super().__init__(owner.arena, pipe)
        self._owner = owner
        self._blocks: dict[str, list[int]] = {}
        self._reuse = False

    def hand_off(self, request_id: str, block_ids: list[int]) -> TransferTicket:
        self._blocks[request_id] = block_ids
        return self._owner.hand_off(request_id, len(block_ids) * LAYOUT.block_size, block_ids)

    def open(self, request_id: str, num_blocks: int) -> TransferTicket:
        return self._owner.open(request_id, num_blocks * LAYOUT.block_size)

    def publish(self, request_id: str, first_block: int, block_ids: list[int]) -> None:
        self._blocks.setdefault(request_id, []).extend(block_ids)
        self._owner.exports.publish(RequestId(request_id), first_block, block_ids)

    def finish(self, request_id: str) -> None:
        self._owner.finish(request_id)

    def fail(self, request_id: str) -> None:
        self._owner.exports.fail(RequestId(request_id), InternalError("the engine stumbled"))

    def renew(self, ticket_id: str, incarnation: str) -> bool:
        return all(self._owner.exports.renew(RenewLease((ticket_id,), incarnation)).held)

    def release(self, ticket_id: str, incarnation: str) -> bool:
        return self._owner.exports.release(ReleaseLease(ticket_id, incarnation)).held

    def reap(self) -> None:
        self._owner.exports.reap()

    async def announced(self, ticket: TransferTicket) -> None:
        """Returns when the checksums of all published blocks are known."""
        while not self._owner.exports.may_read(TicketId(ticket.ticket_id), self._blocks[ticket.request_id]):
            await asyncio.sleep(0.002)

    def introduction(self) -> Introduction:
        return self._owner.introduction()

    def released(self) -> list[str]:
        return list(self._owner.released)

    def endings(self) -> dict[str, int]:
        stats = self._owner.exports.stats()
        return {
            "open": stats.num_open,
            "opened": stats.num_opened,
            "released": stats.num_released,
            "expired": stats.num_expired,
            "failed": stats.num_failed,
        }

    def reuse_released_blocks(self) -> None:
        """From now on: what a busy engine does with blocks the moment they are its own again."""
        self._reuse = True

    def on_released(self, request_id: RequestId) -> None:
        if self._reuse:
            self.paint(self._blocks.get(request_id, []), 0xEE)

    def num_leases(self) -> int:
        return self._owner.exports.stats().num_open


class ReaderCommands(Commands):
    def __init__(self, reader: ReaderNode, pipe: Connection) -> None:
        super().__init__(reader.arena, pipe)
        self._reader = reader
        self._fetching: dict[str, asyncio.Task[object]] = {}
        self._settling: dict[str, asyncio.Event] = {}

    async def fetch(self, ticket: TransferTicket, local: list[int], num_cached: int, deadline_s: float) -> Outcome:
        started = time.perf_counter()
        importer = self._reader.importer
        fetching = asyncio.create_task(importer.fetch(ticket, local, num_cached, deadline_s))
        self._fetching[ticket.ticket_id] = fetching
        error, message, num_valid = None, "", len(local)
        try:
            await fetching
            settled = importer.settled(TicketId(ticket.ticket_id))
        except FetchFailed as failed:
            error, message, num_valid = failed.reason.code, failed.message, failed.num_valid_blocks
            settled = failed.settled
        except asyncio.CancelledError:
            error, num_valid = "cancelled", num_cached
            settled = importer.settled(TicketId(ticket.ticket_id))
        finally:
            del self._fetching[ticket.ticket_id]
        self._settling[ticket.ticket_id] = settled
        return Outcome(error, message, num_valid, settled.is_set(), time.perf_counter() - started)

    async def read_unasked(self, peer: Introduction, remote: list[int], local: list[int]) -> None:
        """Past the control plane: what a peer can do that has kept an address."""
        link = await self._reader.connect(peer)
        try:
            await link.read(TicketId("none"), remote, local, 5.0)
        finally:
            await link.close()

    def cancel(self, ticket_id: str) -> None:
        """Nothing to do if the fetch has just ended."""
        if ticket_id in self._fetching:
            self._fetching[ticket_id].cancel()

    def is_settled(self, ticket_id: str) -> bool:
        return self._settling[ticket_id].is_set()

    async def settle(self, ticket_id: str) -> None:
        await self._settling[ticket_id].wait()

    def bytes_moved(self) -> int:
        return self._reader.transport.stats().num_bytes

    def num_peers(self) -> int:
        return self._reader.importer.stats().num_peers

    def num_quarantined(self) -> int:
        return self._reader.transport.stats().num_quarantined + self._reader.importer.stats().num_unsettled


def _thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


async def serve_commands(pipe: Connection, spec: NodeSpec) -> None:
    """Run the node and its commands until told to leave, or until the test's end of the pipe is closed."""
    if spec.role == "owner":
        hooks: list[Callable[[RequestId], None]] = []
        async with running_owner(
            spec.kind,
            port=spec.port,
            host=spec.host,
            layout=spec.layout,
            options=spec.options,
            seed=spec.seed,
            on_released=lambda request_id: [hook(request_id) for hook in hooks],
        ) as owner:
            owner_commands = OwnerCommands(owner, pipe)
            hooks.append(owner_commands.on_released)
            await _serve(pipe, owner_commands, int(owner.url.rsplit(":", 1)[1]))
    else:
        worker = WorkerId(f"decode-{os.getpid()}")
        async with running_reader(
            spec.kind, host=spec.host, layout=spec.layout, options=spec.options, worker=worker
        ) as reader:
            await _serve(pipe, ReaderCommands(reader, pipe), 0)


async def _serve(pipe: Connection, commands: Commands, port: int) -> None:
    running: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    def receive() -> None:
        try:
            serial, method, arguments = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            commands.leave()
            return
        task = loop.create_task(_run(pipe, commands, serial, method, arguments))
        running.add(task)
        task.add_done_callback(running.discard)

    loop.add_signal_handler(signal.SIGTERM, commands.leave)
    loop.add_reader(pipe.fileno(), receive)
    pipe.send((0, None, port))
    await commands.leaving.wait()
    loop.remove_reader(pipe.fileno())
    await asyncio.gather(*running)


async def _run(pipe: Connection, commands: Commands, serial: int, method: str, arguments: tuple[Any, ...]) -> None:
    try:
        result = getattr(commands, method)(*arguments)
        value = await result if inspect.isawaitable(result) else result
        answer: tuple[int, str | None, Any] = (serial, None, value)
    except Exception as error:  # noqa: BLE001  # the test raises it
        answer = (serial, f"{method}: {type(error).__name__}: {error}", None)
    with contextlib.suppress(OSError):  # a test that is over does not listen
        pipe.send(answer)
