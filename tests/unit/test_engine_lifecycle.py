"""Whatever happens to requests, in whatever order: right tokens, one end each, the promised budget, and every block back.

The tokens come out of KV memory (see engine.simulated_runner), so a block that is shared wrongly, reused too early or
indexed before it is computed shows as a wrong token. The bench checks the order of events and the shape of every step.

With and without a step in flight while the next one is planned, with and without guesses, with stop tokens that nobody sees
coming and with steps that raise.
"""

from typing import Any

from engine_bench import BLOCK_SIZE, LAYOUT, VOCAB_SIZE, Bench, Oracle, continuation, request
from engine_store import BenchStore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import SpeculationConfig
from engine.request import Mode
from engine.runner import StepPlan, StepResult
from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import DeadlineExceeded, Draining, InternalError, PeerLost
from protocol.kv_events import AllBlocksCleared, BlocksRemoved, BlocksStored

NUM_BLOCKS = 12
MAX_TOKENS = NUM_BLOCKS * BLOCK_SIZE


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        max_num_batched_tokens=st.integers(1, 24),
        max_num_seqs=st.integers(1, 6),
        max_prefill_chunk=st.none() | st.integers(1, 9),
        enable_prefix_cache=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1, 0.5]),
        async_scheduling=st.sampled_from(["off", "on"]),
        speculation=st.none() | st.builds(SpeculationConfig, num_draft_tokens=st.integers(1, 6)),
        store=st.sampled_from([None, None, "write-back", "write-through"]),
    )
    def start(self, store: str | None, **config: Any) -> None:
        kept = None if store is None else BenchStore(eager=store == "write-through")
        self.bench = Bench(NUM_BLOCKS, drafter=Oracle(), store=kept, **config)
        self.given_back: set[str] = set()
        self.count = 0
        self.index: set[bytes] = set()
        self.pins: dict[str, list[int]] = {}

    @rule(
        modes=st.lists(st.sampled_from(Mode), min_size=1, max_size=4),
        family=st.integers(0, 1),
        length=st.integers(1, 20) | st.integers(1, MAX_TOKENS - 4),
        num_emitted=st.integers(0, 3),
        max_tokens=st.integers(4, 30),
        stops_after=st.none() | st.integers(0, 9),
        deadline_s=st.sampled_from([5.0, 1e6, 1e6, 1e6]),
        share_imported=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    )
    def submit(
        self,
        modes: list[Mode],
        family: int,
        length: int,
        num_emitted: int,
        max_tokens: int,
        stops_after: int | None,
        deadline_s: float,
        share_imported: float,
    ) -> None:
        """Prompts of one family share their beginning."""
        for mode in modes:
            self.count += 1
            prompt = [(family * 100 + position) % VOCAB_SIZE for position in range(length)]
            whole = continuation(prompt, num_emitted + 10)
            stops = () if stops_after is None else (whole[num_emitted + stops_after],)
            candidate = request(
                f"r{self.count}",
                prompt,
                mode,
                emitted=whole[:num_emitted],
                stop_token_ids=stops,
                max_tokens=max_tokens,
                deadline_s=deadline_s,
                import_tokens=self.some_blocks(mode, length + num_emitted, share_imported),
            )
            self.bench.submit(candidate)
            length = min(length + 3, MAX_TOKENS - 4)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.bench.step()

    @rule(calls=st.integers(1, 3))
    def step_with_a_fault(self, calls: int) -> None:
        """The runner raises, `calls` times in a row: a step, and maybe some of its sequences when they are tried alone."""
        left = calls

        def fault(_: StepPlan) -> StepResult | None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise RuntimeError("the device hiccups")
            return None

        self.bench.runner.fault = fault
        self.step(1)
        self.bench.runner.fault = None

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.bench.cancel(data.draw(st.sampled_from(sorted(self.bench.heard))))

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.bench.heard)))
        self.given_back.add(name)
        if self.bench.requests[name].mode is Mode.PREFILL_ONLY:
            self.bench.release(name)

    @property
    def landing(self) -> list[str]:
        """Requests whose blocks belong to a transfer."""
        return sorted(name for name, heard in self.bench.heard.items() if heard.awaiting)

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def proceed(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.landing))
        heard = self.bench.heard[name]
        assert heard.reserved is not None
        if heard.reserved.prefix and not heard.front_end:
            self.bench.proceed(name, data.draw(st.integers(0, len(heard.reserved.block_ids))) * BLOCK_SIZE)

    @precondition(lambda self: self.bench.offers)
    @rule(data=st.data(), kept=st.booleans())
    def save(self, data: st.DataObject, kept: bool) -> None:
        self.bench.save(data.draw(st.sampled_from(sorted(self.bench.offers))), kept=kept)

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.landing))
        self.arrive(name, data.draw(st.sampled_from([0.0, 0.5, 1.0])))

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.landing))
        num_valid_tokens = data.draw(st.integers(0, len(self.context(name))))
        self.land(name, num_blocks=-(-num_valid_tokens // BLOCK_SIZE))
        self.bench.abandon(name, num_valid_tokens, PeerLost("gone"))

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """What is cached of some context stays readable for as long as it is pinned."""
        name = data.draw(st.sampled_from(sorted(self.bench.heard)))
        context = self.context(name)
        pin_id = f"pin-{len(self.bench.pinned)}"
        block_ids = self.bench.pin(pin_id, hash_blocks(context, BLOCK_SIZE, root_hash(LAYOUT.identity)))
        assert len(block_ids) <= len(context) // BLOCK_SIZE
        self.pins[pin_id] = context

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin_id = data.draw(st.sampled_from(sorted(self.pins)))
        del self.pins[pin_id]
        self.bench.unpin(pin_id)
        self.bench.unpin(pin_id)

    @invariant()
    def what_is_pinned_stays_as_it_is(self) -> None:
        for pin_id, context in self.pins.items() if hasattr(self, "bench") else ():
            self.bench.check_blocks(self.bench.pinned[pin_id], context, f"{pin_id} was pinned")

    @rule(clear=st.booleans())
    def time_passes(self, clear: bool) -> None:
        self.bench.clock.advance(3.0)
        if clear:
            self.bench.core.clear_prefix_cache()

    @invariant()
    def every_token_is_right(self) -> None:
        if not hasattr(self, "bench"):
            return
        for name, heard in self.bench.heard.items():
            if heard.tokens and (heard.over or len(heard.tokens) < 4):
                assert heard.tokens == continuation(self.context(name), len(heard.tokens))
            if heard.finished is not None:
                assert heard.tokens == self.all_tokens(name)

    @invariant()
    def what_is_exported_stays_as_it_is(self) -> None:
        """Until it is released, however its request ends."""
        for name in self.bench.heard if hasattr(self, "bench") else ():
            if name not in self.given_back:
                self.bench.check_exported(name)

    @invariant()
    def the_events_tell_what_is_cached(self) -> None:
        """A follower never ends up with more addresses than there are blocks."""
        batch = self.bench.kv_events.take() if hasattr(self, "bench") else None
        for event in batch.events if batch else ():
            match event:
                case AllBlocksCleared():
                    self.index.clear()
                case BlocksStored():
                    assert not self.index & set(event.block_hashes)
                    self.index |= set(event.block_hashes)
                case BlocksRemoved():
                    assert self.index >= set(event.block_hashes)
                    self.index -= set(event.block_hashes)
            assert len(self.index) <= NUM_BLOCKS

    def teardown(self) -> None:
        """Let everything come to an end on its own, one way or the other, and see that nothing is left behind."""
        if not hasattr(self, "bench"):
            return
        for turn in range(200):
            self.bench.run()
            for name in self.landing:
                self.arrive(name, 1.0)
            if self.bench.store is not None:
                self.bench.save()
            for pin_id in self.pins:
                self.bench.unpin(pin_id)
            for name, heard in self.bench.heard.items():
                if heard.over and heard.block_ids:
                    self.bench.release(name)
            if all(heard.over for heard in self.bench.heard.values()):
                break
            if turn == 100:
                self.bench.core.close(Draining("stopping"))
                self.bench.listen()
        for heard in self.bench.heard.values():
            assert heard.over
            assert not isinstance(heard.error, Draining), "it could have come to its end"
            expected = (DeadlineExceeded, InternalError, type(None))
            assert isinstance(heard.error, expected) or heard.error.status in (499, 503)
        load = self.bench.core.load()
        assert (load.free_blocks, load.running, load.waiting, load.waiting_tokens) == (NUM_BLOCKS, 0, 0, 0)
        assert (load.num_held, load.num_importing, load.num_pins, load.num_offered_blocks) == (0, 0, 0, 0)
        assert sorted(self.bench.runner.forgotten) == sorted(self.bench.heard)
        assert sorted(self.bench.core.take_departed()) == sorted(self.bench.heard)

    def all_tokens(self, name: str) -> list[int]:
        """What a request gets if nothing comes between: up to its length, or to the first stop token."""
        request, context = self.bench.requests[name], self.context(name)
        limit = min(request.sampling.max_tokens - len(request.emitted_token_ids), MAX_TOKENS - len(context))
        tokens = continuation(context, limit)
        ends = [place for place, token in enumerate(tokens, 1) if token in request.sampling.stop_token_ids]
        return tokens[: ends[0]] if ends else tokens

    def context(self, name: str) -> list[int]:
        request = self.bench.requests[name]
        return [*request.prompt_token_ids, *request.emitted_token_ids]

    def some_blocks(self, mode: Mode, num_tokens: int, share: float) -> int:
        """Tokens in so much of the whole blocks that a request may import before it computes."""
        return 0 if mode is Mode.IMPORT else int(share * ((num_tokens - 1) // BLOCK_SIZE)) * BLOCK_SIZE

    def arrive(self, name: str, share: float) -> None:
        """The whole of an awaited context, or so much of an awaited prefix."""
        reserved = self.bench.heard[name].reserved
        assert reserved is not None
        if not reserved.prefix:
            self.land(name, num_blocks=None)
            self.bench.activate(name, continuation(self.context(name), 1)[0], self.bench.clock.now())
        else:
            num_blocks = int(share * len(reserved.block_ids))
            self.land(name, num_blocks)
            self.bench.resume(name, num_blocks * BLOCK_SIZE)

    def land(self, name: str, num_blocks: int | None) -> None:
        """Fill the blocks of an import as another node would have, or from the store: those it lacks, and no other."""
        heard, store = self.bench.heard[name], self.bench.store
        reserved = heard.reserved
        assert reserved is not None
        context = [*self.context(name), *heard.tokens]
        other = Bench(NUM_BLOCKS, enable_prefix_cache=False)
        other.submit(request("source", context[: MAX_TOKENS - 1], Mode.PREFILL_ONLY))
        other.run()
        source = other.heard["source"].block_ids
        wanted = len(reserved.block_ids) if num_blocks is None else min(num_blocks, len(reserved.block_ids))
        for index in range(max(reserved.num_cached_blocks, heard.front_end // BLOCK_SIZE), wanted):
            block_hash = reserved.block_hashes[index] if index < len(reserved.block_hashes) else None
            if store is not None and block_hash in store.kept:
                self.bench.runner.import_block(memoryview(store.kept[block_hash]), 0, reserved.block_ids[index])
            else:
                self.bench.runner.import_block(other.runner.memory, source[index], reserved.block_ids[index])


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
