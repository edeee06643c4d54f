"""An engine core on a bench: stepped by hand, on a manual clock, over simulated KV memory, with every step checked.

The simulated runner reads the context back from KV memory, so a token that equals `continuation` proves that the blocks
held the right context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from engine_store import BenchStore

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.events import (
    BlocksComputed,
    BlocksOffered,
    EngineEvent,
    Failed,
    Finished,
    Pinned,
    PrefillFinished,
    PromptComputed,
    Reserved,
    TokensSampled,
)
from engine.kv_event_log import KVEventLog
from engine.request import EngineRequest, Mode
from engine.runner import ScheduledChunk, StepPlan, StepResult
from engine.simulated_runner import SimulatedCost, SimulatedRunner, next_token
from engine.speculation import Drafter
from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import HeadraceError
from protocol.ids import BlockHash, Incarnation, PinId, RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.clock import ManualClock

BLOCK_SIZE = 4
VOCAB_SIZE = 997
LAYOUT = KVLayout(
    model="simulated",
    revision="1",
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    block_size=BLOCK_SIZE,
    rope="none",
)


def continuation(context: Sequence[int], count: int) -> list[int]:
    """The tokens that follow, worked out without an engine."""
    tokens = list(context)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(context) :]


def prompt(number: int, num_tokens: int) -> list[int]:
    """Prompts of different numbers share nothing, if they are no longer than 100 tokens."""
    return list(range(100 * number, 100 * number + num_tokens))


def hashes_of(tokens: Sequence[int], salt: str | None = None) -> list[BlockHash]:
    return hash_blocks(tokens, BLOCK_SIZE, root_hash(LAYOUT.identity, salt))


def request(
    request_id: str,
    prompt: Sequence[int],
    mode: Mode = Mode.GENERATE,
    *,
    max_tokens: int = 4,
    emitted: Sequence[int] = (),
    deadline_s: float = 3600.0,
    cache_salt: str | None = None,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    import_tokens: int = 0,
) -> EngineRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=0, temperature=0.0, stop_token_ids=stop_token_ids, min_tokens=min_tokens
    )
    return EngineRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        mode=mode,
        emitted_token_ids=tuple(emitted),
        cache_salt=cache_salt,
        deadline_s=deadline_s,
        import_tokens=import_tokens,
    )


class Oracle:
    """A drafter that knows the simulated runner's rule, and is wrong from a place on that depends on the context."""

    def begin_step(self) -> None:
        """It keeps to no budget."""

    def propose(self, request_id: RequestId, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        guesses = continuation(token_ids, max_drafts)
        wrong_from = sum(token_ids) % (max_drafts + 3)
        return guesses[:wrong_from] + [(guess + 1) % VOCAB_SIZE for guess in guesses[wrong_from:]]

    def forget(self, request_id: RequestId) -> None:
        """It remembers nothing."""


class CheckedRunner(SimulatedRunner):
    """Keeps every plan. `fault` may answer for the runner: raise, or return a result."""

    def __init__(self, clock: ManualClock, num_blocks: int, config: EngineConfig, max_model_len: int) -> None:
        self.memory = memoryview(bytearray(num_blocks * LAYOUT.block_bytes))
        super().__init__(
            LAYOUT,
            num_blocks,
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            cost=SimulatedCost(step_s=1.0),
            sleep=clock.advance,
            memory=self.memory,
            asynchronous=config.async_scheduling == "on",
        )
        self._config = config
        self.plans: list[tuple[ScheduledChunk, ...]] = []
        self.forgotten: list[RequestId] = []
        self.fault: Callable[[StepPlan], StepResult | None] | None = None

    def compute(self, plan: StepPlan) -> StepResult:
        assert 1 <= plan.num_tokens <= self._config.max_num_batched_tokens
        assert len(plan.chunks) <= self._config.max_num_seqs
        for chunk in plan.chunks:
            assert len(chunk.token_ids) - chunk.num_drafts <= (self._config.max_prefill_chunk or plan.num_tokens)
            assert len(chunk.block_ids) == LAYOUT.num_blocks_for(chunk.start + len(chunk.token_ids))
        self.plans.append(plan.chunks)
        faulty = self.fault(plan) if self.fault is not None else None
        return faulty if faulty is not None else super().compute(plan)

    def forget(self, request_id: RequestId) -> None:
        self.forgotten.append(request_id)
        super().forget(request_id)

    def import_block(self, source: memoryview, source_id: int, block_id: int) -> None:
        size = LAYOUT.block_bytes
        self.memory[block_id * size : (block_id + 1) * size] = source[source_id * size : (source_id + 1) * size]


@dataclass
class Heard:
    """What the engine has reported of one request."""

    tokens: list[int] = field(default_factory=list)
    reserved: Reserved | None = None
    awaiting: bool = False
    """The last Reserved has not been answered."""
    front_end: int = 0
    """What it was told to proceed with meanwhile."""
    block_ids: list[int] = field(default_factory=list)
    prefill: PrefillFinished | None = None
    computed: PromptComputed | None = None
    finished: Finished | None = None
    error: HeadraceError | None = None

    @property
    def over(self) -> bool:
        return self.prefill is not None or self.finished is not None or self.error is not None


class Bench:
    """With `async_scheduling="on"` the runner is asynchronous too: it touches memory only when a step is collected."""

    DEFAULTS: ClassVar[dict[str, object]] = {"watermark": 0.0, "async_scheduling": "off"}

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        max_model_len: int = 10_000,
        drafter: Drafter | None = None,
        store: BenchStore | None = None,
        **settings: object,
    ) -> None:
        self.config = EngineConfig(**(self.DEFAULTS | settings))  # type: ignore[arg-type]
        self.clock = ManualClock(100.0)
        self.runner = CheckedRunner(self.clock, num_blocks, self.config, max_model_len)
        self.kv_events = KVEventLog(Incarnation("bench"))
        self.core = EngineCore(self.runner, self.config, self.clock, self.kv_events, drafter)
        self.heard: dict[str, Heard] = {}
        self.requests: dict[str, EngineRequest] = {}
        self.pinned: dict[str, tuple[int, ...]] = {}
        self.store = store
        self.offers: dict[PinId, BlocksOffered] = {}
        if store is not None:
            self.core.back_with(store)

    def submit(self, request: EngineRequest) -> None:
        self.requests[request.request_id] = request
        self.heard[request.request_id] = Heard()
        self.core.submit(request, self.clock.now())

    def cancel(self, *request_ids: str) -> None:
        self.core.cancel([RequestId(request_id) for request_id in request_ids])
        self.listen()

    def release(self, request_id: str) -> None:
        self.core.release(RequestId(request_id))
        self.listen()

    def activate(self, request_id: str, first_token: int, computed_at: float | None = None) -> None:
        self.heard[request_id].awaiting = False
        self.core.activate(RequestId(request_id), SampledToken(first_token), computed_at)
        self.listen()

    def proceed(self, request_id: str, num_tokens: int) -> None:
        self.heard[request_id].front_end = num_tokens
        self.core.proceed(RequestId(request_id), num_tokens)
        self.listen()

    def resume(self, request_id: str, num_valid_tokens: int) -> None:
        self.heard[request_id].awaiting = False
        self.core.resume(RequestId(request_id), num_valid_tokens)
        self.listen()

    def bring(self, request_id: str, num_blocks: int | None = None) -> int:
        """Load what is awaited from the store, behind the front, or so many leading blocks of it. Returns how many tokens
        are valid then."""
        reserved = self.heard[request_id].reserved
        assert reserved is not None
        assert self.store is not None
        end = len(reserved.block_ids) if num_blocks is None else num_blocks
        for index in range(max(reserved.num_cached_blocks, self.heard[request_id].front_end // BLOCK_SIZE), end):
            kept = memoryview(self.store.kept[reserved.block_hashes[index]])
            self.runner.import_block(kept, 0, reserved.block_ids[index])
        return end * BLOCK_SIZE

    def save(self, *pin_ids: PinId, kept: bool = True) -> None:
        """Answer these offers, by default all there are; without `kept` the store has failed."""
        assert self.store is not None
        for pin_id in pin_ids or list(self.offers):
            offer = self.offers.pop(pin_id)
            if kept:
                self.store.save(offer, self.runner.memory, LAYOUT.block_bytes)
            self.core.saved(pin_id)
        self.listen()

    def pin(self, pin_id: str, block_hashes: Sequence[BlockHash]) -> tuple[int, ...]:
        self.core.pin(PinId(pin_id), tuple(block_hashes))
        self.listen()
        return self.pinned[pin_id]

    def unpin(self, pin_id: str) -> None:
        self.core.unpin(PinId(pin_id))

    def abandon(self, request_id: str, num_valid_tokens: int, error: HeadraceError) -> None:
        self.heard[request_id].awaiting = False
        self.core.abandon_import(RequestId(request_id), num_valid_tokens, error)
        self.listen()

    def step(self) -> bool:
        """One turn of the engine. False if there was nothing to run."""
        schedule = self.core.schedule()
        self.listen()
        if schedule is None and not self.core.in_flight:
            load = self.core.load()
            assert load.running == 0 or load.num_offered_blocks, "something runs, but nothing was scheduled"
            return False
        self.core.run(schedule)
        self.listen()
        return True

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing can run."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"still running after {max_steps} steps")

    def generate(self, request: EngineRequest) -> Heard:
        self.submit(request)
        self.run()
        return self.heard[request.request_id]

    @property
    def busy_blocks(self) -> int:
        load = self.core.load()
        return load.total_blocks - load.free_blocks

    def check_exported(self, request_id: str) -> None:
        """The announced blocks of a PREFILL_ONLY request hold what the simulated runner says they hold."""
        request = self.requests[request_id]
        context = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.check_blocks(self.heard[request_id].block_ids, context, f"{request_id} was exported")

    def check_blocks(self, block_ids: Sequence[int], context: Sequence[int], whose: str) -> None:
        """These blocks hold the beginning of this context."""
        for index, block_id in enumerate(block_ids):
            start, end = index * BLOCK_SIZE, min(len(context), (index + 1) * BLOCK_SIZE)
            expected = sum((position + 1) * (context[position] + 1) for position in range(start, end))
            slot = block_id * LAYOUT.block_bytes + (end - start - 1) * LAYOUT.token_bytes
            found = int.from_bytes(self.runner.memory[slot : slot + 8], "little")
            assert found == expected, f"block {index} of {whose} and then changed"

    def listen(self) -> None:
        for event in self.core.take_events():
            self._hear(event)

    def _hear(self, event: EngineEvent) -> None:
        """Check what every request is promised, whatever happens to it."""
        if isinstance(event, Pinned):
            self.pinned[event.pin_id] = event.block_ids
            return
        if isinstance(event, BlocksOffered):
            self._hear_offer(event)
            return
        heard, request = self.heard[event.request_id], self.requests[event.request_id]
        assert not heard.over, f"{event} after the end"
        match event:
            case BlocksComputed():
                assert request.mode is Mode.PREFILL_ONLY
                assert event.first_block == len(heard.block_ids)
                heard.block_ids += event.block_ids
                self.check_exported(event.request_id)
            case PrefillFinished():
                assert request.mode is Mode.PREFILL_ONLY
                assert len(heard.block_ids) == LAYOUT.num_blocks_for(request.num_context_tokens)
                heard.tokens.append(event.first_token.token_id)
                heard.prefill = event
            case Reserved():
                assert not heard.awaiting
                first = heard.reserved is None
                heard.reserved, heard.awaiting, heard.front_end = event, True, 0
                assert first or self.store is not None, "only a store brings back what was preempted"
                if first and request.mode is Mode.IMPORT:
                    assert not event.prefix
                    assert len(event.block_ids) == LAYOUT.num_blocks_for(request.num_context_tokens)
                    return
                assert event.prefix
                num_asked_for = request.import_tokens // BLOCK_SIZE if first else 0
                assert self.store is not None or len(event.block_ids) == num_asked_for
                assert len(event.block_ids) >= max(num_asked_for, event.num_cached_blocks + 1)
                assert len(event.block_hashes) == (len(event.block_ids) if self.config.enable_prefix_cache else 0)
            case TokensSampled():
                assert request.mode is not Mode.PREFILL_ONLY
                assert event.index == len(request.emitted_token_ids) + len(heard.tokens)
                heard.tokens += [token.token_id for token in event.tokens]
            case PromptComputed():
                assert request.mode is Mode.GENERATE
                assert heard.computed is None
                assert len(heard.tokens) == 1, "it comes right after the first token"
                heard.computed = event
            case Finished():
                assert (heard.computed is not None) == (request.mode is Mode.GENERATE)
                assert event.imported == (request.mode is Mode.IMPORT)
                heard.finished = event
            case Failed():
                heard.error = event.error

    def _hear_offer(self, offer: BlocksOffered) -> None:
        """Blocks of one chain come parents first, and no block is in two offers at a time."""
        assert offer.pin_id not in self.offers
        assert 0 < len(offer.blocks) == len(offer.block_ids) <= 64
        others = {block_id for other in self.offers.values() for block_id in other.block_ids}
        assert others.isdisjoint(offer.block_ids)
        places = {block.block_hash: place for place, block in enumerate(offer.blocks)}
        assert len(places) == len(offer.blocks)
        assert all(places.get(block.parent, -1) < place for place, block in enumerate(offer.blocks))
        self.offers[offer.pin_id] = offer
