"""SimOwner: a node that prefills, and may restart: its address stays, its incarnation does not. Its export table, transport
and routes are real, the prefill is a sleep.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.meeting.pushers import Pushers
from kv_transfer.memory.arena import HostArena
from kv_transfer.routes import kv_routes
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import ContextHash, RequestId, WorkerId, new_incarnation
from protocol.phases import PrefillPhases
from protocol.transfer import TransferTicket
from tests.support.sim_blocks import LAYOUT, NUM_BLOCKS, NUM_SCRATCH_BLOCKS, BlockStore, Prompt
from tests.support.sim_scene import CLUSTER_KEY, Scene

PHASES = PrefillPhases(queue_s=0.25, prefill_s=0.5)


@dataclass
class _Prefill:
    prompt: Prompt
    block_ids: tuple[int, ...]
    released: bool = False
    computed: bool = False


class _OwnerLife:
    """One incarnation of an owner: what ends with its process, except its memory."""

    def __init__(self, world: Scene, worker_id: str, url: str) -> None:
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
    def __init__(self, world: Scene, worker_id: str) -> None:
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
