"""A world of owners and readers of KV blocks on one virtual clock: real export tables, routes, importers and hand-offs;
arenas whose blocks are used again at once; a network and a transport that fail as they are told.

Wrong bytes show wherever they are: a free block that something was written into, a block in use whose contents changed, a
context that was called valid and is not the prompt's. What is wrong is noted in `World.wrongs`.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from typing import Any

import msgspec

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from kv_transfer.memory.staging import HostStaging, InPlaceStaging
from kv_transfer.transports.inproc import Course
from protocol.errors import PeerLost, TransferError
from protocol.ids import RequestId
from protocol.transfer import Direction
from runtime.node_config import TransferOptions
from tests.support.memory_network import MemoryNetwork, Weather
from tests.support.sim_blocks import LAYOUT, NUM_BLOCKS, BlockStore, Prompt
from tests.support.sim_owner import SimOwner
from tests.support.sim_reader import SimReader
from tests.support.virtual_loop import VirtualLoop

OPTIONS = TransferOptions(
    transport="inproc", lease_ttl_s=3.0, stall_timeout_s=1.0, max_bytes_in_flight=12 * LAYOUT.block_bytes
)
LONGEST_STALL_S = 6.0
WORK_S = 0.01
PATIENCE_S = 60.0
"""By then everything is over: the longest prefill and stall, all retries and every lease."""


class LoopClock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()


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
        before, num_fetches = self.outcomes["activated"], 0
        for i, owner in enumerate(self.owners):
            for j, reader in enumerate(self.readers):
                prompt = Prompt(RequestId(f"last-{i}-{j}"), 3 * LAYOUT.block_size + 1)
                ticket = owner.now.prefill(prompt, 2, 0.1)
                if ticket is None:
                    self.expect(False, "an owner has leaked blocks")
                elif reader.fetch(ticket, prompt, 0, 5.0):
                    num_fetches += 1
                else:
                    self.expect(bool(self._unproven(reader)), "a reader has leaked blocks")
        await asyncio.sleep(5.0)
        num_failed = before + num_fetches - self.outcomes["activated"]
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
