"""Who is registered, what they hold, and where a prompt goes."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import LayoutMismatch, ModelNotFound, NoWorker, ProtocolError, TransferError, WireVersionMismatch
from protocol.ids import BlockHash, Incarnation, RequestId, WorkerId
from protocol.kv_events import AllBlocksCleared, BlocksRemoved, BlocksStored, KVEventBatch
from protocol.kv_layout import KVLayout
from protocol.tokens import SampledToken, TokenChunk
from protocol.wire import WIRE_VERSION
from protocol.workers import Heartbeat, Role, WorkerInfo, WorkerLoad
from router.in_flight import InFlight
from router.merge import TokenMerge
from router.policy import ClusterView, DecodeCandidate, PrefillCandidate, Prompt, RouteDecision, decide
from router.prefix_index import EXPECTED_TTL_S, PrefixIndex
from router.workers import WorkerRegistry
from runtime.clock import ManualClock

HASHES = hash_blocks(range(64), 16, root_hash("layout"))
A, B, C, D = (Incarnation(name) for name in "abcd")


def layout(**changes: object) -> KVLayout:
    fields: dict[str, object] = {
        "model": "m",
        "revision": "r",
        "dtype": "float32",
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 16,
        "rope": "none",
    }
    return KVLayout(**(fields | changes))  # type: ignore[arg-type]


def info(worker_id: str = "w", incarnation: str = "one", role: Role = "decode", **changes: object) -> WorkerInfo:
    fields: dict[str, object] = {
        "wire_version": WIRE_VERSION,
        "control_url": "http://127.0.0.1:1",
        "served_model": "m",
        "vocab_size": 100,
        "max_model_len": 128,
        "num_blocks": 10,
        "layout": layout(),
        "transports": ("inproc",),
    }
    return WorkerInfo(worker_id=worker_id, incarnation=incarnation, role=role, **(fields | changes))  # type: ignore[arg-type]


def load(**changes: object) -> WorkerLoad:
    fields: dict[str, object] = {
        "running": 0,
        "waiting": 0,
        "waiting_tokens": 0,
        "free_blocks": 10,
        "steps": 1,
        "draining": False,
    }
    return WorkerLoad(**(fields | changes))  # type: ignore[arg-type]


class TestRegistry:
    def setup_method(self) -> None:
        self.clock = ManualClock()
        self.registry = WorkerRegistry("m", timeout_s=5, clock=self.clock)

    def beat(self, worker_id: str = "w", incarnation: str = "one", **changes: object) -> bool:
        message = Heartbeat(worker_id=worker_id, incarnation=incarnation, load=load(**changes))
        return self.registry.heartbeat(message) is not None

    def test_a_newer_incarnation_voids_the_older_for_ever(self) -> None:
        self.registry.register(info(incarnation="one"))
        replaced = self.registry.register(info(incarnation="two"))
        assert replaced is not None
        assert replaced.incarnation == "one"
        assert not self.beat(incarnation="one")
        assert self.beat(incarnation="two")
        with pytest.raises(ProtocolError, match="worker_id"):
            self.registry.register(info(incarnation="one"))
        assert [worker.incarnation for worker in self.registry.snapshot.workers] == ["two"]

    def test_silence_removes_and_the_same_life_may_return(self) -> None:
        self.registry.register(info())
        self.clock.advance(4)
        assert self.beat()
        self.clock.advance(4)
        assert self.registry.expire() == []
        self.clock.advance(2)
        assert [worker.worker_id for worker in self.registry.expire()] == ["w"]
        assert not self.beat()
        self.registry.register(info())
        assert self.beat()

    def test_a_snapshot_does_not_change(self) -> None:
        before = self.registry.snapshot
        self.registry.register(info())
        assert before.workers == ()
        after = self.registry.snapshot
        self.beat(running=3)
        assert after.workers[0].load.running == 0
        assert self.registry.snapshot.workers[0].load.running == 3

    def test_leaving_and_draining_admit_nothing(self) -> None:
        self.registry.register(info())
        self.registry.leave(WorkerId("w"), Incarnation("older"))
        assert self.registry.snapshot.workers[0].admits
        self.registry.leave(WorkerId("w"), Incarnation("one"))
        assert not self.registry.snapshot.workers[0].admits
        assert self.beat()
        assert not self.registry.snapshot.workers[0].admits
        self.registry.register(info("v"))
        self.beat("v", draining=True)
        assert not self.registry.snapshot.workers[1].admits

    def test_refusals_are_typed(self) -> None:
        with pytest.raises(WireVersionMismatch):
            self.registry.register(info(wire_version=WIRE_VERSION + 1))
        with pytest.raises(ModelNotFound, match="other"):
            self.registry.register(info(served_model="other"))
        self.registry.register(info("p", role="prefill"))
        with pytest.raises(LayoutMismatch, match="num_layers"):
            self.registry.register(info("d", layout=layout(num_layers=3)))
        assert len(self.registry.snapshot.workers) == 1

    def test_a_restart_may_bring_another_layout(self) -> None:
        self.registry.register(info())
        self.registry.register(info(incarnation="two", layout=layout(block_size=32)))
        assert self.registry.snapshot.layout == layout(block_size=32)


class TestPrefixIndex:
    def setup_method(self) -> None:
        self.clock = ManualClock()
        self.index = PrefixIndex(self.clock)
        for node in (A, B):
            self.index.add_worker(node)

    def stored(self, node: Incarnation, first: int, hashes: list[BlockHash], tier: str = "device") -> bool:
        return self.index.apply(KVEventBatch(node, first, (BlocksStored(tuple(hashes), tier),)))  # type: ignore[arg-type]

    def snapshot(self, node: Incarnation, first: int, hashes: list[BlockHash]) -> bool:
        return self.index.apply(KVEventBatch(node, first, (AllBlocksCleared(), BlocksStored(tuple(hashes)))))

    def test_matches_leading_blocks_only(self) -> None:
        assert self.snapshot(A, 0, HASHES[:3])
        assert self.snapshot(B, 0, [HASHES[0], HASHES[2]])
        assert self.index.match(HASHES) == {A: 3, B: 1}
        assert self.index.match([]) == {}

    def test_events_count_on(self) -> None:
        assert self.index.needs_snapshot(A)
        assert self.snapshot(A, 5, HASHES[:1])
        assert not self.index.needs_snapshot(A)
        assert self.stored(A, 7, HASHES[1:2])
        assert self.index.apply(KVEventBatch(A, 8, (BlocksRemoved((HASHES[0],)), BlocksRemoved((b"?" * 16,)))))
        assert self.index.match(HASHES) == {}

    def test_a_gap_voids_the_worker_until_its_snapshot(self) -> None:
        self.snapshot(A, 0, HASHES)
        assert not self.stored(A, 9, HASHES[:1])
        assert self.index.match(HASHES) == {}
        assert self.index.needs_snapshot(A)
        assert not self.stored(A, 10, HASHES[:1])
        assert self.snapshot(A, 11, HASHES[:2])
        assert self.index.match(HASHES) == {A: 2}

    def test_an_unknown_incarnation_is_not_indexed(self) -> None:
        assert not self.snapshot(C, 0, HASHES)
        assert len(self.index) == 0

    def test_a_block_is_gone_when_its_last_tier_is(self) -> None:
        self.snapshot(A, 0, HASHES[:1])
        self.stored(A, 2, HASHES[:1], "host")
        self.index.apply(KVEventBatch(A, 3, (BlocksRemoved((HASHES[0],), "device"),)))
        assert self.index.match(HASHES) == {A: 1}
        self.index.apply(KVEventBatch(A, 4, (BlocksRemoved((HASHES[0],), "host"),)))
        assert self.index.match(HASHES) == {}

    def test_a_block_that_left_the_device_for_the_host_tier_is_still_here_and_may_come_back(self) -> None:
        self.snapshot(A, 0, HASHES[:3])
        self.stored(A, 2, HASHES[1:3], "host")
        self.index.apply(KVEventBatch(A, 3, (BlocksRemoved(tuple(HASHES[1:3])),)))
        assert self.index.match(HASHES) == {A: 3}, "a chain may lie in several tiers"
        self.stored(A, 4, HASHES[1:2])
        removed = (BlocksRemoved(tuple(HASHES[1:3]), "host"), BlocksStored((HASHES[2],), "disk"))
        self.index.apply(KVEventBatch(A, 5, removed))
        assert self.index.match(HASHES) == {A: 3}
        self.index.apply(KVEventBatch(A, 7, (BlocksRemoved((HASHES[2],), "disk"), BlocksRemoved((HASHES[2],)))))
        assert self.index.match(HASHES) == {A: 2}
        assert len(self.index) == 2

    def test_a_snapshot_tells_of_every_tier(self) -> None:
        stored = (BlocksStored(tuple(HASHES[:1])), BlocksStored(tuple(HASHES[1:2]), "host"))
        assert self.index.apply(KVEventBatch(A, 0, (AllBlocksCleared(), *stored)))
        assert self.index.match(HASHES) == {A: 2}

    def test_what_was_just_sent_is_expected_for_a_while(self) -> None:
        self.index.expect(A, HASHES)
        assert self.index.match(HASHES) == {}, "a worker that never stored a block does not cache"
        self.snapshot(A, 0, [BlockHash(b"x" * 16)])
        self.index.expect(A, HASHES[:2])
        assert self.index.match(HASHES) == {A: 2}
        self.clock.advance(EXPECTED_TTL_S + 0.1)
        assert self.index.match(HASHES) == {}

    def test_removed_workers_leave_nothing(self) -> None:
        self.snapshot(A, 0, HASHES)
        self.snapshot(B, 0, HASHES[:1])
        self.index.expect(A, HASHES)
        self.index.remove_worker(A)
        assert self.index.match(HASHES) == {B: 1}
        self.index.add_worker(C)
        assert self.index.match(HASHES) == {B: 1}
        assert len(self.index) == 1

    @given(
        st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.sets(st.integers(0, 3), max_size=4)), max_size=20)
    )
    def test_equals_a_plain_model(self, steps: list[tuple[str, bool, set[int]]]) -> None:
        self.setup_method()
        held: dict[str, set[int]] = {"a": set(), "b": set()}
        numbers = {"a": 1, "b": 1}
        for node in (A, B):
            self.index.apply(KVEventBatch(node, 0, (AllBlocksCleared(),)))
        for name, store, blocks in steps:
            hashes = tuple(HASHES[i] for i in sorted(blocks))
            event = BlocksStored(hashes) if store else BlocksRemoved(hashes)
            assert self.index.apply(KVEventBatch(name, numbers[name], (event,)))
            numbers[name] += 1
            held[name] = held[name] | blocks if store else held[name] - blocks
        expected = {
            Incarnation(name): length
            for name, blocks in held.items()
            if (length := next(i for i in range(5) if i not in blocks))
        }
        assert self.index.match(HASHES) == expected


class TestInFlight:
    def test_counts_ours_until_it_ends(self) -> None:
        in_flight = InFlight()
        in_flight.add_worker(A)
        with in_flight.sequence(A), in_flight.prefill(A, 100):
            assert (in_flight.prefill_tokens(A), in_flight.sequences(A)) == (100, 1)
            in_flight.remove_worker(A)
        assert (in_flight.prefill_tokens(A), in_flight.sequences(A)) == (0, 0)

    def test_what_exceeds_ours_is_another_routers(self) -> None:
        in_flight = InFlight()
        in_flight.add_worker(A)
        with in_flight.sequence(A), in_flight.prefill(A, 100):
            in_flight.heard(A, load(running=1, waiting=2, waiting_tokens=150))
            assert (in_flight.prefill_tokens(A), in_flight.sequences(A)) == (150, 3)
        assert (in_flight.prefill_tokens(A), in_flight.sequences(A)) == (50, 2)
        in_flight.heard(A, load())
        assert in_flight.sequences(A) == 0


PREFILL = PrefillCandidate
DECODE = DecodeCandidate
PROMPT = Prompt(num_tokens=100, num_blocks=7, tokens_left=50)


def route(prefill: list[PrefillCandidate], decode: list[DecodeCandidate], **options: object) -> RouteDecision:
    arguments: dict[str, object] = {"local_prefill_tokens": 16, "rng": Random(0)} | options
    prompt = arguments.pop("prompt", PROMPT)
    return decide(ClusterView(tuple(prefill), tuple(decode)), prompt, **arguments)  # type: ignore[arg-type]


class TestPolicy:
    def test_load_outweighs_a_short_prefix_and_a_long_prefix_outweighs_load(self) -> None:
        decode = [DECODE(C, 0, 100, 0)]
        assert route([PREFILL(A, 0, 0), PREFILL(B, 25, 48)], decode).prefill == A
        assert route([PREFILL(A, 0, 0), PREFILL(B, 23, 48)], decode).prefill == B

    def test_whoever_computes_borrows_from_those_that_hold_more(self) -> None:
        prefill = [PREFILL(A, 0, 16), PREFILL(B, 500, 48)]
        chosen = route(prefill, [DECODE(C, 0, 100, 64)])
        assert (chosen.prefill, chosen.prefill_sources, chosen.cached_tokens) == (A, (C, B), 64)
        assert chosen.decode_sources == (), "what C holds it need not import, and B holds no more"
        other = route(prefill, [DECODE(C, 9, 100, 64), DECODE(D, 0, 100, 0)])
        assert (other.decode, other.decode_sources) == (D, (C, B)), "what A does not have from the start either"
        assert route([PREFILL(A, 0, 80)], [DECODE(C, 0, 100, 64)]).prefill_sources == ()
        local = route([], [DECODE(C, 9, 100, 64), DECODE(D, 0, 100, 0)])
        assert (local.decode, local.decode_sources, local.cached_tokens) == (D, (C,), 64)

    def test_after_a_failure_nothing_is_borrowed(self) -> None:
        chosen = route([PREFILL(A, 0, 0), PREFILL(B, 0, 0)], [DECODE(C, 0, 100, 64)], avoid={B})
        assert (chosen.prefill, chosen.prefill_sources, chosen.decode_sources) == (A, (), ())

    def test_the_least_loaded_decode_node_with_room(self) -> None:
        prefill = [PREFILL(C, 0, 0)]
        assert route(prefill, [DECODE(A, 2, 100, 0), DECODE(B, 1, 100, 0)]).decode == B
        assert route(prefill, [DECODE(A, 2, 100, 0), DECODE(B, 1, 6, 0)]).decode == A
        assert route(prefill, [DECODE(A, 2, 0, 0), DECODE(B, 1, 0, 0)]).decode == B
        assert route(prefill, [DECODE(A, 1, 100, 0), DECODE(B, 1, 100, 16)]).decode == B

    def test_short_rests_are_computed_where_they_are_decoded(self) -> None:
        prefill = [PREFILL(C, 0, 0)]
        assert route(prefill, [DECODE(A, 3, 9, 84), DECODE(B, 0, 9, 0)]) == RouteDecision(None, A, 84)
        assert route(prefill, [DECODE(A, 3, 9, 83), DECODE(B, 0, 9, 0)]).prefill == C
        crowded = route(prefill, [DECODE(A, 9, 9, 99), DECODE(B, 0, 9, 0)])
        assert (crowded.prefill, crowded.decode) == (C, B)

    def test_without_prefill_nodes_decode_nodes_do_it_all(self) -> None:
        assert route([], [DECODE(A, 0, 9, 0)]) == RouteDecision(None, A, 0)
        assert route([PREFILL(B, 0, 0)], [DECODE(A, 0, 9, 0)], avoid={B}) == RouteDecision(None, A, 0)

    def test_one_token_needs_no_decode_node(self) -> None:
        single = Prompt(num_tokens=100, num_blocks=7, tokens_left=1)
        assert route([PREFILL(A, 0, 32)], [], prompt=single) == RouteDecision(A, None, 32)
        assert route([], [DECODE(B, 0, 9, 0)], prompt=single) == RouteDecision(None, B, 0)

    def test_nobody_left(self) -> None:
        with pytest.raises(NoWorker, match="decode"):
            route([PREFILL(A, 0, 0)], [])
        with pytest.raises(NoWorker, match="left"):
            route([], [DECODE(A, 0, 9, 0)], avoid={A})

    def test_pure_and_ties_are_spread(self) -> None:
        prefill = [PREFILL(A, 0, 0), PREFILL(B, 0, 0)]
        decode = [DECODE(C, 0, 9, 0)]
        assert len({route(prefill, decode, rng=Random(7)) for _ in range(20)}) == 1
        assert {route(prefill, decode, rng=Random(seed)).prefill for seed in range(20)} == {A, B}


def chunk(index: int, *token_ids: int) -> TokenChunk:
    return TokenChunk(RequestId("r"), index, tuple(SampledToken(token_id) for token_id in token_ids))


class TestMerge:
    @given(st.permutations([(0, 1), (0, 3), (1, 2), (2, 4), (0, 1), (5, 6), (4, 6)]))
    def test_any_order_gives_one_sequence(self, spans: list[tuple[int, int]]) -> None:
        emitted: list[int] = []
        merge = TokenMerge(emitted)
        new = [token.token_id for a, b in spans for token in merge.push(chunk(a, *range(10 + a, 10 + b)))]
        assert new == emitted == list(range(10, 16))
        assert not merge.has_gap

    def test_a_gap_waits(self) -> None:
        merge = TokenMerge([7])
        assert merge.push(chunk(2, 9)) == []
        assert merge.has_gap
        assert [token.token_id for token in merge.push(chunk(0, 7, 8))] == [8, 9]

    def test_contradictions_are_not_hidden(self) -> None:
        merge = TokenMerge([])
        merge.push(chunk(0, 5))
        with pytest.raises(TransferError, match="disagree"):
            merge.push(chunk(0, 6, 7))
