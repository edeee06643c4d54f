"""A prefill that ends early while its blocks are written to a reader: they are not used again before the write has ended.

The engine, its service and the exports are real, on a manual clock; the wire is another arena of this process, and stands
still for as long as a test wants.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest
from engine_bench import LAYOUT, VOCAB_SIZE, request
from prometheus_client import CollectorRegistry

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Mode
from engine.runner import StepPlan, StepResult
from engine.simulated_runner import SimulatedRunner
from kv_transfer.handoff.exports import ExportTable
from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import HostStaging
from kv_transfer.transports.inproc import Faults, InprocLink, InprocTransport
from prefill_node.service import PrefillService
from protocol.errors import InvalidParameter
from protocol.ids import RequestId, WorkerId, new_incarnation
from protocol.requests import PrefillRequest
from protocol.sampling import SamplingParams
from protocol.transfer import Introduction, OpenHandoff, PushTarget, TransferTicket, TransportKind
from runtime.clock import ManualClock
from runtime.metrics import NodeMetrics
from runtime.node_config import TransferOptions

NUM_BLOCKS = 12
PROMPT = tuple(range(3, 43))
NUM_EXPORTED = len(PROMPT) // LAYOUT.block_size
STEP_TOKENS = 8
STEPS_BEFORE_THE_END = 2
NUM_FINAL = STEPS_BEFORE_THE_END * STEP_TOKENS // LAYOUT.block_size
DEADLINE_S = 100.0
WAIT_S = 10.0
REQUEST = RequestId("p")


class GatedRunner(SimulatedRunner):
    """Takes a step for every permit. `broken`: the steps of the prefill raise."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(LAYOUT, NUM_BLOCKS, vocab_size=VOCAB_SIZE, max_model_len=1000, memory=memory)
        self.permits = threading.Semaphore(0)
        self.broken = False

    def compute(self, plan: StepPlan) -> StepResult:
        assert self.permits.acquire(timeout=WAIT_S)
        if self.broken and plan.chunks[0].request_id == REQUEST:
            raise RuntimeError("the device hiccups")
        return super().compute(plan)


class Nobody:
    """Stands for the token outbox, where nobody listens, and for the prefixes of others, who have none."""

    def expect(self, *_: object) -> int:
        return 0

    def forget(self, _: object) -> None: ...

    def cancel(self, _: object) -> None: ...

    def post(self, _: object) -> None: ...


class OneLink:
    def __init__(self, link: InprocLink) -> None:
        self._link = link

    async def link(self, worker: str, incarnation: str, kind: TransportKind) -> InprocLink:
        return self._link

    def forget(self, worker: str, incarnation: str, kind: TransportKind) -> None: ...


class Node:
    """A prefill node without its control plane, and the arena of its one reader."""

    def __init__(self, link: InprocLink, staging: HostStaging, theirs: HostArena) -> None:
        self.clock = ManualClock(100.0)
        self.ours, self.theirs = staging.arena, theirs
        self.runner = GatedRunner(self.ours.memory)
        config = EngineConfig(max_num_batched_tokens=STEP_TOKENS, watermark=0.0, async_scheduling="off")
        self.engine = Engine(self.runner, config, self.clock, new_incarnation())
        self.released: list[RequestId] = []
        self.exports = ExportTable(
            staging,
            owner=WorkerId("prefill-0"),
            incarnation=new_incarnation(),
            layout=LAYOUT,
            control_url="http://127.0.0.1:1",
            options=TransferOptions(transport="inproc", stall_timeout_s=WAIT_S),
            clock=self.clock,
            on_released=self.release,
            push_links=OneLink(link),
        )
        self.service = PrefillService(
            self.engine,
            SimpleNamespace(exports=self.exports, prefixes=Nobody(), lender=None),  # type: ignore[arg-type]  # fakes
            Nobody(),  # type: ignore[arg-type]  # a fake
            NodeMetrics(CollectorRegistry()),
            VOCAB_SIZE,
            LAYOUT.identity,
        )

    def release(self, request_id: RequestId) -> None:
        self.released.append(request_id)
        self.engine.release(request_id)

    def prefill(self) -> TransferTicket:
        asked = PrefillRequest(
            request_id=REQUEST,
            trace_id="t",
            router_id="r",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=4, seed=0),
            deadline_s=DEADLINE_S,
        )
        return self.service.prefill(asked).ticket

    def read_by_push(self, ticket: TransferTicket) -> AsyncIterator[bytes]:
        target = PushTarget(transport="inproc", block_ids=tuple(range(NUM_EXPORTED)))
        return self.exports.attach(
            OpenHandoff(
                ticket_id=ticket.ticket_id,
                incarnation=ticket.incarnation,
                reader="decode-0",
                reader_incarnation="j",
                skip_blocks=0,
                push=target,
            )
        )


@pytest.fixture
def wire() -> Faults:
    return Faults(stall=threading.Event())


@pytest.fixture
async def node(wire: Faults) -> AsyncIterator[Node]:
    ours, theirs = (HostArena(NUM_BLOCKS, LAYOUT.block_bytes) for _ in range(2))
    owner, reader = (InprocTransport(arena, lambda *_: False) for arena in (ours, theirs))
    owner.faults = wire
    staging = HostStaging(ours)
    peer = Introduction(
        worker="decode-0",
        incarnation="j",
        layout=LAYOUT,
        num_blocks=NUM_BLOCKS,
        num_scratch_blocks=0,
        endpoints=(reader.endpoint(),),
    )
    link = await owner.connect(peer, reader.endpoint())
    made = Node(link, staging, theirs)
    made.engine.start(made.service.listener(asyncio.get_running_loop()))
    try:
        async with made.exports:
            yield made
            open_up(wire)
            made.runner.permits.release(100)
    finally:
        open_up(wire)
        made.runner.permits.release(100)
        assert await asyncio.to_thread(made.engine.stop, WAIT_S)
        await link.close()
        await staging.close()
        for transport in (owner, reader):
            await transport.close()
        for arena in (ours, theirs):
            arena.close()


def open_up(wire: Faults) -> None:
    assert wire.stall is not None
    wire.stall.set()


def cancel(node: Node) -> None:
    node.service.cancel([REQUEST])


def expire(node: Node) -> None:
    node.clock.advance(DEADLINE_S)


def stumble(node: Node) -> None:
    node.runner.broken = True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


async def drain(stream: AsyncIterator[bytes]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("end", [cancel, expire, stumble])
async def test_blocks_under_a_push_are_not_used_again(node: Node, wire: Faults, end: Callable[[Node], None]) -> None:
    reading = asyncio.create_task(drain(node.read_by_push(node.prefill())))
    node.runner.permits.release(STEPS_BEFORE_THE_END)
    await until(lambda: node.exports.queue_stats().num_blocks_in_flight == NUM_FINAL)
    before = bytes(node.ours.memory)
    end(node)
    # The next one wants every block there is.
    node.engine.submit(request("next", range(200, 200 + NUM_BLOCKS * LAYOUT.block_size - 4), Mode.GENERATE))
    node.runner.permits.release(100)
    await until(lambda: node.engine.load().num_held == 1 and node.engine.load().waiting == 1)
    await until(lambda: node.exports.stats().num_failed == 1)
    assert (node.exports.stats().num_unsettled, node.released) == (1, [])
    with pytest.raises(InvalidParameter, match="exported already"):
        node.prefill()
    open_up(wire)
    await until(lambda: node.released == [REQUEST])
    await reading
    for block_id in range(NUM_FINAL):
        landed = bytes(node.theirs.block(block_id))
        assert any(landed)
        assert landed in before
    await until(lambda: node.engine.load().free_blocks == NUM_BLOCKS)
    assert node.engine.load().num_held == 0


async def test_a_prefill_that_ends_unread_is_freed_at_once(node: Node) -> None:
    node.prefill()
    node.runner.permits.release(STEPS_BEFORE_THE_END)
    await until(lambda: node.exports.stats().num_bytes_announced > 0)
    cancel(node)
    node.runner.permits.release(100)
    await until(lambda: node.engine.load().free_blocks == NUM_BLOCKS)
    assert node.released == [REQUEST]
