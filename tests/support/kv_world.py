"""A world of owners and readers of KV blocks on one virtual clock: real export tables, routes, importers and hand-offs;
arenas whose blocks are used again at once; a network and a transport that fail as they are told.

    BlockStore    lends the blocks of one arena, last returned first, and knows what must be in each
    SimOwner      a node that prefills, and may restart: its address stays, its incarnation does not
    SimReader     a node that fetches; stands for the engine behind decode_node's Handoffs
    World         all of them, the clock, the weather, and what must be true of them at any time

Wrong bytes show wherever they are: a free block that something was written into, a block in use whose contents changed, a
context that was called valid and is not the prompt's. What is wrong is noted in `World.wrongs`, because much of it is found
inside callbacks of the product, which must survive any error.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from blake3 import blake3
from starlette.applications import Starlette

from decode_node.handoff import Handoffs
from engine.events import Reserved
from kv_transfer.arena import HostArena
from kv_transfer.checksum import checksums
from kv_transfer.exports import ExportTable
from kv_transfer.factory import lend_nothing
from kv_transfer.fetch import FetchResult
from kv_transfer.imports import Importer, OnArrived
from kv_transfer.inproc_transport import Course, InprocTransport
from kv_transfer.peers import Reader
from kv_transfer.pushers import Pushers
from kv_transfer.routes import kv_routes
from kv_transfer.staging import HostStaging, InPlaceStaging
from kv_transfer.transport_set import TransportSet
from protocol.errors import Cancelled, HeadraceError, PeerLost, TransferError
from protocol.ids import ContextHash, RequestId, WorkerId, new_incarnation
from protocol.kv_layout import KVLayout
from protocol.phases import HandoffPhases, PrefillPhases
from protocol.tokens import SampledToken
from protocol.transfer import Direction, TransferTicket
from runtime.node_config import TransferOptions
from tests.support.memory_network import MemoryNetwork, MemoryRpcClient, Weather
from tests.support.virtual_loop import VirtualLoop

LAYOUT = KVLayout(
    model="world",
    revision="1",
    dtype="float16",
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    block_size=4,
    rope="none",
)
NUM_BLOCKS = 48
NUM_SCRATCH_BLOCKS = 4
OPTIONS = TransferOptions(
    transport="inproc", lease_ttl_s=3.0, stall_timeout_s=1.0, max_bytes_in_flight=12 * LAYOUT.block_bytes
)
CLUSTER_KEY = "a-cluster-key-for-tests"
PHASES = PrefillPhases(queue_s=0.25, prefill_s=0.5)
LONGEST_STALL_S = 6.0
WORK_S = 0.01
PATIENCE_S = 60.0
"""By then everything is over: the longest prefill and stall, all retries and every lease."""

FREE = b"\xdb"


class LoopClock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()


@dataclass(frozen=True)
class Prompt:
    """What is to be computed: its blocks' bytes and its first token can be worked out by anyone."""

    request_id: RequestId
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        return LAYOUT.num_blocks_for(self.num_tokens)

    @property
    def first_token(self) -> SampledToken:
        return SampledToken(blake3(self.request_id.encode()).digest()[0])

    def block(self, index: int) -> bytes:
        return blake3(f"{self.request_id}/{index}".encode()).digest(length=LAYOUT.block_bytes)


class BlockStore:
    """Every block is free, or lent to somebody. A free one is overwritten at once, so that whoever still reads it reads
    something else, and must not change until it is lent again."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self._free = list(range(arena.num_blocks))
        self._blank = FREE * arena.block_bytes
        arena.memory[: arena.num_blocks * arena.block_bytes] = self._blank * arena.num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> tuple[int, ...] | None:
        if num_blocks > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(num_blocks))

    def give_back(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            assert block_id not in self._free, f"block {block_id} is given back twice"
            self.arena.block(block_id)[:] = self._blank
            self._free.append(block_id)

    def fill(self, block_ids: Sequence[int], prompt: Prompt, first: int = 0) -> None:
        for index, block_id in enumerate(block_ids, first):
            self.arena.block(block_id)[:] = prompt.block(index)

    def written(self) -> list[int]:
        """Free blocks that bytes have landed in."""
        return [block_id for block_id in self._free if self.arena.block(block_id) != self._blank]

    def differing(self, block_ids: Sequence[int], prompt: Prompt) -> list[int]:
        """Blocks of the context that are not what was computed, by index."""
        return [i for i, block_id in enumerate(block_ids) if self.arena.block(block_id) != prompt.block(i)]


@dataclass
class _Prefill:
    prompt: Prompt
    block_ids: tuple[int, ...]
    released: bool = False
    computed: bool = False


class _OwnerLife:
    """One incarnation of an owner: what ends with its process, except its memory."""

    def __init__(self, world: "World", worker_id: str, url: str) -> None:
        self.arena = HostArena(NUM_BLOCKS, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
        self.store = BlockStore(self.arena)
        self.incarnation = new_incarnation()
        self.transport = InprocTransport(self.arena, lambda ticket_id, ids: self.exports.may_read(ticket_id, ids))
        self.transport.faults.course = world.draw_course
        self._transports = TransportSet(self.arena, [self.transport])
        self._pushers = Pushers(self._transports, world.clock)
        self._staging = world.make_staging(self.arena)
        self._stopping = asyncio.Event()
        self.prefills: dict[RequestId, _Prefill] = {}
        self._world = world
        self._tasks: dict[asyncio.Task[None], None] = {}
        self.exports = ExportTable(
            self._staging,
            owner=WorkerId(worker_id),
            incarnation=self.incarnation,
            layout=LAYOUT,
            control_url=url,
            options=world.options,
            clock=world.clock,
            on_released=self._on_released,
            push_links=self._pushers,
        )
        self.routes = kv_routes(
            self.exports,
            self._transports,
            self._pushers,
            LAYOUT,
            worker_id=WorkerId(worker_id),
            incarnation=self.incarnation,
            cluster_key=CLUSTER_KEY,
        )

    async def live(self) -> None:
        async with self._pushers, self.exports:
            self._start(self.exports.run())
            await self._stopping.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._staging.close()
        await self._transports.close()

    async def drain(self) -> None:
        """Tell readers, and let what is being written end; but not for ever."""
        self.exports.end_all()
        for _ in range(10):
            await asyncio.sleep(0.1)

    async def die(self) -> None:
        """Not a byte leaves it any more. What is left of it is only this simulation's to clear away."""
        await self.transport.close()
        self._stopping.set()

    def prefill(self, prompt: Prompt, chunk_blocks: int, chunk_s: float) -> TransferTicket | None:
        """Begin one. None if there are not enough free blocks."""
        block_ids = self.store.take(prompt.num_blocks)
        if block_ids is None:
            return None
        self.prefills[prompt.request_id] = _Prefill(prompt, block_ids)
        ticket = self.exports.open(prompt.request_id, prompt.num_tokens, ContextHash(prompt.block(0)[:16]))
        self._start(self._compute(self.prefills[prompt.request_id], chunk_blocks, chunk_s))
        return ticket

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))

    async def _compute(self, prefill: _Prefill, chunk_blocks: int, chunk_s: float) -> None:
        """Chunk by chunk, whether or not anybody listens. The blocks are in use until the end of it."""
        prompt, ids = prefill.prompt, prefill.block_ids
        for first in range(0, len(ids), chunk_blocks):
            await asyncio.sleep(chunk_s)
            chunk = ids[first : first + chunk_blocks]
            self.store.fill(chunk, prompt, first)
            staged = self.exports.stage_at_once(chunk) if self._world.rng.random() < 0.5 else None
            self.exports.publish(prompt.request_id, first, chunk, staged)
        self.exports.finish(prompt.request_id, prompt.first_token, False, self._world.loop.time(), PHASES)
        prefill.computed = True
        self._maybe_give_back(prefill)

    def _on_released(self, request_id: RequestId) -> None:
        prefill = self.prefills[request_id]
        self._world.expect(not prefill.released, f"{request_id} is released twice")
        prefill.released = True
        self._maybe_give_back(prefill)

    def _maybe_give_back(self, prefill: _Prefill) -> None:
        if prefill.released and prefill.computed:
            del self.prefills[prefill.prompt.request_id]
            self.store.give_back(prefill.block_ids)


class SimOwner:
    def __init__(self, world: "World", worker_id: str) -> None:
        self._world = world
        self._worker_id = worker_id
        self.url = f"http://{worker_id}:1"
        self.lives: list[_OwnerLife] = []
        """The last one is now. Memory of the others is still there: who reads it reads what was left in it."""
        self._restarting = False

    @property
    def now(self) -> _OwnerLife:
        return self.lives[-1]

    def start(self) -> None:
        life = _OwnerLife(self._world, self._worker_id, self.url)
        self.lives.append(life)
        self._world.start(life.live())
        self._world.network.listen(self.url, Starlette(routes=life.routes))

    async def restart(self, *, killed: bool) -> None:
        if self._restarting:
            return
        self._restarting = True
        if not killed:
            await self.now.drain()
        await self.stop()
        self.start()
        self._restarting = False

    async def stop(self) -> None:
        await self.now.die()
        await self._world.network.stop_listening(self.url)


class _TimedImporter(Importer):
    """Notes when a fetch takes longer than it may."""

    world: "World"

    async def fetch(
        self,
        ticket: TransferTicket,
        local_block_ids: Sequence[int],
        num_cached_blocks: int,
        deadline_s: float,
        on_arrived: OnArrived | None = None,
    ) -> FetchResult:
        started = self.world.loop.time()
        try:
            return await super().fetch(ticket, local_block_ids, num_cached_blocks, deadline_s, on_arrived)
        finally:
            took_s = self.world.loop.time() - started
            self.world.expect(took_s <= deadline_s + 1e-3, f"a fetch of {deadline_s} s took {took_s} s")


@dataclass
class _Import:
    prompt: Prompt
    incarnation: str
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    holds: bool = False


class SimReader:
    """Also the engine of its Handoffs: `activate` and `abandon_import` are where the outcome of a hand-off is judged."""

    def __init__(self, world: "World", worker_id: str) -> None:
        self._world = world
        self.arena = HostArena(NUM_BLOCKS, LAYOUT.block_bytes, NUM_SCRATCH_BLOCKS)
        self.store = BlockStore(self.arena)
        self.transport = InprocTransport(self.arena, lend_nothing)
        self._transports = TransportSet(self.arena, [self.transport])
        self._staging = world.make_staging(self.arena)
        self.imports: dict[RequestId, _Import] = {}
        self._client = MemoryRpcClient(world.network, CLUSTER_KEY)
        self.importer = _TimedImporter(
            client=self._client,
            transports=self._transports,
            staging=self._staging,
            reader=Reader(WorkerId(worker_id), new_incarnation(), LAYOUT),
            options=world.options,
            clock=world.clock,
        )
        self.importer.world = world
        self._handoffs = Handoffs(self, self.importer, LAYOUT.block_size)  # type: ignore[arg-type]  # see above
        self._stopping = asyncio.Event()

    async def live(self) -> None:
        async with self._client, self.importer, self._handoffs:
            await self._stopping.wait()
        await self._staging.close()
        await self._transports.close()

    def stop(self) -> None:
        self._stopping.set()

    def fetch(self, ticket: TransferTicket, prompt: Prompt, num_cached_blocks: int, deadline_s: float) -> bool:
        """False if there is no room, or the request is here already."""
        block_ids = None if prompt.request_id in self.imports else self.store.take(prompt.num_blocks)
        if block_ids is None:
            return False
        cached = min(num_cached_blocks, prompt.num_blocks)
        self.store.fill(block_ids[:cached], prompt)
        self.imports[prompt.request_id] = _Import(prompt, ticket.incarnation, block_ids, cached)
        self._handoffs.start(Reserved(prompt.request_id, block_ids, cached), ticket, deadline_s)
        return True

    def cancel(self, request_id: RequestId) -> None:
        self._handoffs.cancel([request_id])

    def activate(
        self, request_id: RequestId, first_token: SampledToken, computed_at: float, _landing: HandoffPhases
    ) -> None:
        arrived = self.imports[request_id]
        expect = self._world.expect
        expect(not arrived.holds, f"{request_id} is activated twice")
        expect(first_token == arrived.prompt.first_token, f"{request_id} got the first token of something else")
        expect(computed_at <= self._world.loop.time(), f"{request_id} was computed in the future")
        differing = self.store.differing(arrived.block_ids, arrived.prompt)
        expect(not differing, f"blocks {differing} of {request_id} are not what was computed")
        arrived.holds = True
        self._world.outcomes["activated"] += 1

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        failed = self.imports.pop(request_id)
        expect = self._world.expect
        num_valid = num_valid_tokens // LAYOUT.block_size
        expect(not failed.holds, f"{request_id} is abandoned after it was activated")
        expect(isinstance(error, TransferError | Cancelled), f"{request_id} failed with {error!r}")
        expect(failed.num_cached_blocks <= num_valid <= len(failed.block_ids), f"{num_valid} blocks are valid?")
        differing = self.store.differing(failed.block_ids[:num_valid], failed.prompt)
        expect(not differing, f"blocks {differing} of {request_id} are called valid and are not")
        self.store.give_back(failed.block_ids)
        self._world.outcomes[getattr(error, "reason", error).code] += 1

    def finish(self, request_id: RequestId) -> None:
        """Its last token is sampled: the blocks go to somebody else, if they are still what they were."""
        done = self.imports[request_id]
        if done.holds:
            differing = self.store.differing(done.block_ids, done.prompt)
            self._world.expect(not differing, f"blocks {differing} of {request_id} changed while in use")
            del self.imports[request_id]
            self.store.give_back(done.block_ids)


class World:
    """Lives from construction to `close`, which frees what it holds. `faults` counts what was done to it."""

    def __init__(
        self, seed: int, faults: Counter[str], direction: Direction, num_owners: int = 2, num_readers: int = 2
    ) -> None:
        self.options = msgspec.structs.replace(OPTIONS, direction=direction)
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(self.rng, WORK_S)
        self.clock = LoopClock(self.loop)
        self.faults = faults
        self.wrongs: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.weather = Weather(self.rng, faults)
        self.network = MemoryNetwork(self.weather)
        self.owners = [SimOwner(self, f"prefill-{i}") for i in range(num_owners)]
        self.readers: list[SimReader] = []
        self._num_readers = num_readers
        self._started: dict[asyncio.Task[None], None] = {}
        self._errors = _ErrorLog(self.wrongs)
        self._errors.start()
        self.run(self._start())

    def close(self) -> None:
        self._errors.stop()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with contextlib.suppress(Exception):  # what went wrong has been said
            self.loop.run_until_complete(asyncio.sleep(PATIENCE_S))
        self.loop.close()
        for store in self._stores():
            store.arena.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something, and see whether everything that must be true still is."""
        result = self.loop.run_until_complete(work)
        self.check()
        return result

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that may take its time."""
        task = asyncio.create_task(work)
        self._started[task] = None
        task.add_done_callback(lambda ended: self._started.pop(ended, None))

    def pass_time(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def expect(self, condition: bool, otherwise: str) -> None:
        if not condition:
            self.wrongs.append(otherwise)

    def check(self) -> None:
        for store in self._stores():
            written = store.written()
            self.expect(not written, f"bytes landed in free blocks {written}")
        for reader in self.readers:
            held = sum(len(found.block_ids) for found in reader.imports.values())
            self.expect(reader.store.num_free + held == NUM_BLOCKS, "a reader's blocks do not add up")
            for found in reader.imports.values():
                if found.holds:
                    differing = reader.store.differing(found.block_ids, found.prompt)
                    self.expect(not differing, f"blocks {differing} of {found.prompt.request_id} changed while in use")
        for life in (life for owner in self.owners for life in owner.lives):
            held = sum(len(prefill.block_ids) for prefill in life.prefills.values())
            self.expect(life.store.num_free + held == NUM_BLOCKS, "an owner's blocks do not add up")
            stats = life.exports.stats()
            ended = stats.num_released + stats.num_expired + stats.num_failed
            self.expect(stats.num_opened == stats.num_open + ended, "an owner's exports do not add up")
        self.wrongs += [str(context) for context in self.loop.unhandled]
        assert not self.wrongs, "; ".join(self.wrongs)

    def make_staging(self, arena: HostArena) -> InPlaceStaging:
        """With the checksums on the event loop, as of small blocks, or on another thread."""
        return self.rng.choice((HostStaging(arena), InPlaceStaging(arena, partial(checksums, arena))))

    def draw_course(self, num_blocks: int) -> Course:
        """How the next transfer goes, in this weather."""
        rng, strikes = self.rng, self.weather.strikes
        pauses_s = [rng.random() * WORK_S for _ in range(num_blocks)]
        if strikes("transfer delayed"):
            pauses_s[0] += rng.random() * OPTIONS.stall_timeout_s
        if strikes("transfer stalled"):
            pauses_s[rng.randrange(num_blocks)] += rng.uniform(OPTIONS.stall_timeout_s, LONGEST_STALL_S)
        flips = []
        while strikes("bits flipped"):
            flips.append((rng.randrange(num_blocks), rng.randrange(LAYOUT.block_bytes * 8)))
        failure: TransferError | None = None
        if strikes("transfer broke"):
            failure = TransferError("injected")
        elif strikes("peer lost in transfer"):
            failure = PeerLost("injected")
        return Course(pauses_s, rng.randrange(num_blocks), failure, flips)

    def settle(self) -> None:
        """Faults are lifted and time passes: everything ends, everything is back where it was, and everybody can still
        talk to everybody."""
        self.weather.clear_up()
        self.network.heal()
        self.pass_time(PATIENCE_S)
        self._finish_all()
        self.run(self._all_meet())
        self._finish_all()
        self.pass_time(PATIENCE_S)
        for reader in self.readers:
            unproven = self._unproven(reader)
            self.outcomes["unproven"] += len(unproven)
            stuck = sorted(set(reader.imports) - set(unproven))
            self.expect(not stuck, f"hand-offs of {stuck} never ended")
            self.expect(reader.importer.stats().num_unsettled == len(unproven), "blocks are in quarantine for ever")
            self.expect(reader.transport.stats().num_quarantined == 0, "transfers are abandoned for ever")
        for life in (life for owner in self.owners for life in owner.lives):
            self.expect(life.exports.stats().num_open == 0, "leases have leaked")
        for owner in self.owners:
            self.expect(owner.now.store.num_free == NUM_BLOCKS, "an owner has leaked blocks")
        self.run(self._stop())
        left = [str(task) for task in asyncio.all_tasks(self.loop)]
        self.expect(not left, f"tasks are left: {left}")
        self.check()

    def _finish_all(self) -> None:
        for reader in self.readers:
            for request_id in list(reader.imports):
                reader.finish(request_id)

    async def _all_meet(self) -> None:
        before = self.outcomes["activated"]
        for i, owner in enumerate(self.owners):
            for j, reader in enumerate(self.readers):
                prompt = Prompt(RequestId(f"last-{i}-{j}"), 3 * LAYOUT.block_size + 1)
                ticket = owner.now.prefill(prompt, 2, 0.1)
                if ticket is not None:  # else the blocks have leaked, and it counts as failed
                    reader.fetch(ticket, prompt, 0, 5.0)
        await asyncio.sleep(5.0)
        num_failed = before + len(self.owners) * len(self.readers) - self.outcomes["activated"]
        self.expect(num_failed == 0, f"after everything was well again {num_failed} hand-offs failed")

    def _unproven(self, reader: SimReader) -> list[RequestId]:
        """Requests whose blocks an owner may have been writing when it died, unseen by its reader: nobody is left who could
        say that it has ended, so they stay in quarantine, as they must. Only a push can do that."""
        if self.options.direction == "pull":
            return []
        living = {owner.now.incarnation for owner in self.owners}
        return [found.prompt.request_id for found in reader.imports.values() if found.incarnation not in living]

    async def _start(self) -> None:
        for owner in self.owners:
            owner.start()
        for i in range(self._num_readers):
            reader = SimReader(self, f"decode-{i}")
            self.readers.append(reader)
            self.start(reader.live())

    async def _stop(self) -> None:
        for reader in self.readers:
            reader.stop()
        await asyncio.sleep(PATIENCE_S)
        for owner in self.owners:
            await owner.stop()
        await asyncio.gather(*self._started)
        await self.network.close()

    def _stores(self) -> list[BlockStore]:
        owned = [life.store for owner in self.owners for life in owner.lives]
        return owned + [reader.store for reader in self.readers]


class _ErrorLog(logging.Handler):
    """An error in the log is a bug of ours: whatever a peer does is a warning at most."""

    def __init__(self, wrongs: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._wrongs = wrongs

    def start(self) -> None:
        logging.getLogger().addHandler(self)
        logging.disable(logging.WARNING)

    def stop(self) -> None:
        logging.disable(logging.NOTSET)
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._wrongs.append(self.format(record))
