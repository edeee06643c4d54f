"""Every eviction policy: its books, its order, its bounds; and that ours is worth having."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kv_store.policy import density
from kv_store.policy.arc import ARCPolicy
from kv_store.policy.density import DensityPolicy
from kv_store.policy.factory import POLICY_NAMES, PolicyName, make_policy
from kv_store.policy.lru import LRUPolicy
from kv_store.policy.policy import STEP_BLOCKS, EvictionPolicy
from kv_store.policy.reuse_model import Floats, ReuseModel
from kv_store.policy.s3fifo import S3FIFOPolicy
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock
from tests.support.store_parts import blocks_of, hashes_of

CAPACITY = 12


def block_hash(path: tuple[int, ...]) -> BlockHash:
    return BlockHash(bytes(path).rjust(16, b"\xff"))


def chain(path: tuple[int, ...]) -> list[CachedBlock]:
    """The blocks whose addresses are the leading parts of `path`: equal beginnings are equal blocks."""
    return [CachedBlock(block_hash(path[: i + 1]), block_hash(path[:i]), i) for i in range(len(path))]


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), PATHS, st.floats(0, 300)),
        st.tuples(st.just("only want"), PATHS, st.floats(0, 300)),
        st.tuples(st.just("only add"), PATHS, st.integers(0, 5)),
        st.tuples(st.just("drop"), PATHS, st.integers(0, 5)),
        st.tuples(st.just("ask"), PATHS, st.integers(0, CAPACITY)),
    ),
    max_size=60,
)


class Tier:
    """What a policy is told of, and checks of what it answers."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.held: dict[BlockHash, CachedBlock] = {}
        self.now = 0.0

    def victims(self, count: int, may_evict: Callable[[BlockHash], bool] = lambda _: True) -> list[BlockHash]:
        chosen = self.policy.victims(count, self.now, may_evict)
        assert len(chosen) <= count
        assert len(set(chosen)) == len(chosen)
        left = set(self.held)
        for victim in chosen:
            assert victim in left, "not held"
            assert may_evict(victim)
            assert not any(self.held[other].parent == victim for other in left), "went before what continues it"
            left.remove(victim)
        if len(chosen) < count:
            # Whatever stayed may not go, or something that continues it may not.
            for stayed in left:
                assert not may_evict(stayed) or any(self.held[other].parent == stayed for other in left)
        return chosen

    def remove(self, block_hashes: list[BlockHash]) -> None:
        self.policy.removed(block_hashes)
        for gone in block_hashes:
            self.held.pop(gone, None)

    def add(self, blocks: list[CachedBlock], protected: set[BlockHash]) -> None:
        new = [block for block in blocks if block.block_hash not in self.held]
        over = len(self.held) + len(new) - CAPACITY
        if over > 0:
            self.remove(self.victims(over, lambda candidate: candidate not in protected))
        new = new[: CAPACITY - len(self.held)]
        self.policy.added(new, self.now)
        self.held.update((BlockHash(block.block_hash), block) for block in new)

    def want(self, blocks: list[CachedBlock]) -> None:
        num_held = next((i for i, block in enumerate(blocks) if block.block_hash not in self.held), len(blocks))
        for _ in self.policy.wanted(blocks, num_held, self.now):
            pass

    def step(self, kind: str, path: tuple[int, ...], amount: float) -> None:
        blocks = chain(path)
        if kind in ("request", "only want"):
            self.now += amount
            self.want(blocks)
        if kind == "request":
            self.add(blocks, {BlockHash(block.block_hash) for block in blocks})
        elif kind == "only add":
            self.add(blocks[int(amount) :], set())
        elif kind == "drop":
            # As after a checksum failure: from the middle of a chain, too, and what is not there.
            self.remove([BlockHash(block.block_hash) for block in blocks[int(amount) :][:2]])
        elif kind == "ask":
            self.victims(int(amount), lambda candidate: candidate[-1] != path[0])


FORKED: list[tuple[str, tuple[int, ...], float]] = [
    ("request", (0,), 0.0),
    ("request", (0, 1, 0, 0), 0.0),
    ("request", (0, 1, 0, 1), 0.0),
    ("ask", (0,), 2),
]
"""A choice that is not carried out, and stops at a fork one of whose ends may not go."""


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(steps=STEPS)
@example(steps=FORKED)
@settings(max_examples=60, deadline=None)
def test_books_stay_true_and_tails_go_first(name: PolicyName, steps: list[tuple[str, tuple[int, ...], float]]) -> None:
    tier = Tier(make_policy(name, CAPACITY))
    for step in steps:
        tier.step(*step)
    everything = tier.victims(len(tier.held))
    assert set(everything) == set(tier.held)
    tier.remove(everything)
    assert tier.victims(1) == []


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_choosing_is_repeatable_until_it_is_done(name: PolicyName) -> None:
    """What was chosen counts as held until `removed`; the same history gives the same choice."""
    tiers = [Tier(make_policy(name, CAPACITY)) for _ in range(2)]
    for tier in tiers:
        for number in range(30):
            tier.step("request", (number % 5, number % 3, number % 7), 10.0)
    assert tiers[0].victims(4) == tiers[1].victims(4)
    assert set(tiers[0].victims(4)) <= set(tiers[0].held)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_whatever_may_not_go_stands_in_nobodys_way(name: PolicyName) -> None:
    tier = Tier(make_policy(name, CAPACITY))
    for number in range(6):
        tier.step("request", (number, 1), 1.0)
    pinned = {block_hash((number, 1)) for number in range(5)}
    assert tier.victims(CAPACITY, lambda candidate: candidate not in pinned) == [block_hash((5, 1)), block_hash((5,))]
    assert len(tier.victims(CAPACITY)) == CAPACITY


def cycle(*numbers: int) -> list[CachedBlock]:
    """Each continues the one before it, and the first the last."""
    hashes = [block_hash((number,)) for number in numbers]
    return [CachedBlock(own, hashes[i - 1], i) for i, own in enumerate(hashes)]


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_what_claims_to_continue_itself_can_go(name: PolicyName, length: int) -> None:
    policy = make_policy(name, CAPACITY)
    blocks = cycle(*range(length))
    policy.added(blocks, 0.0)
    chosen = policy.victims(CAPACITY, 1.0, lambda _: True)
    assert chosen == hashes_of(blocks[::-1])
    policy.removed(chosen)
    assert policy.victims(CAPACITY, 2.0, lambda _: True) == []


FORGED_BLOCKS = st.builds(
    lambda own, parent, position: CachedBlock(block_hash((own,)), block_hash((parent,)), position),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(0, 3),
)
FORGED_STEPS = st.lists(
    st.tuples(st.sampled_from(["want", "add", "drop"]), st.lists(FORGED_BLOCKS, min_size=1, max_size=5)), max_size=30
)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(steps=FORGED_STEPS)
@settings(max_examples=100, deadline=None)
def test_whatever_is_said_of_blocks_all_can_go_and_longer_chains_first(
    name: PolicyName, steps: list[tuple[str, list[CachedBlock]]]
) -> None:
    """Cycles, blocks at two places, several parents, a chain with a block twice in it."""
    policy = make_policy(name, CAPACITY)
    held: dict[BlockHash, CachedBlock] = {}
    for now, (kind, blocks) in enumerate(steps):
        if kind == "want":
            for _ in policy.wanted(blocks, 0, float(now)):
                pass
        elif kind == "add":
            new = {BlockHash(b.block_hash): b for b in blocks if b.block_hash not in held}
            policy.added(list(new.values()), float(now))
            held |= new
        else:
            gone = [h for h in dict.fromkeys(hashes_of(blocks)) if h in held]
            policy.removed(gone)
            for h in gone:
                del held[h]
    order = policy.victims(len(held), 1e3, lambda _: True)
    assert sorted(order) == sorted(held)
    at = {h: index for index, h in enumerate(order)}
    for h, block in held.items():
        parent = held.get(BlockHash(block.parent))
        if parent is not None and parent.position == block.position - 1:
            assert at[h] < at[BlockHash(parent.block_hash)]
    policy.removed(order)
    assert policy.victims(1, 1e3, lambda _: True) == []


def test_lru_gives_up_the_oldest_conversation_from_its_end() -> None:
    tier = Tier(LRUPolicy())
    for path in ((1, 2, 3), (4, 5), (1, 6)):
        tier.step("request", path, 1.0)
    assert tier.victims(3) == [block_hash((1, 2, 3)), block_hash((1, 2)), block_hash((4, 5))]


@pytest.mark.parametrize("make", [ARCPolicy, S3FIFOPolicy])
def test_ghosts_are_no_more_than_the_tier_is_large(make: Callable[[int], ARCPolicy | S3FIFOPolicy]) -> None:
    policy = make(CAPACITY)
    tier = Tier(policy)
    for number in range(200):
        tier.step("request", (number, number % 3), 1.0)
        assert policy.num_ghosts <= CAPACITY


def test_density_forgets_the_oldest_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "MIN_GHOSTS", 40)
    policy = DensityPolicy(CAPACITY // 2)
    tier = Tier(policy)
    for number in range(250):
        tier.step("request", (number, 1, 2), 1.0)
        assert policy.num_ghosts <= max(40, density.GHOSTS_PER_BLOCK * (CAPACITY // 2))
    # What is neither held nor remembered has left no trace at all.
    assert len(policy._stretches) <= policy.num_ghosts + len(tier.held)
    assert len(policy._owners) == policy.num_ghosts + len(tier.held)


def test_no_request_pays_for_more_than_a_portion_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[list[int]] = []

    class Recording(ReuseModel):
        def fit(self, waiting: Iterable[tuple[NDArray[np.int64], Floats]]) -> Iterator[None]:
            fits.append([])

            def portions() -> Iterator[tuple[NDArray[np.int64], Floats]]:
                for classes, ages_s in waiting:
                    fits[-1].append(len(classes))
                    yield classes, ages_s

            return super().fit(portions())

    monkeypatch.setattr(density, "ReuseModel", Recording)
    monkeypatch.setattr(density, "FIT_PORTION", 16)
    tier = Tier(DensityPolicy(CAPACITY))
    for number in range(600):
        num_portions = sum(map(len, fits))
        tier.want(chain((number % 250, number // 250)))
        assert sum(map(len, fits)) <= num_portions + 1
    assert len(fits) == 4
    assert all(size <= 16 for fit in fits for size in fit)
    # Nobody is left out or counted twice, but those who come while it goes on.
    for begun_after, fit in zip((120, 248, 376, 504), fits, strict=True):
        assert begun_after - 1 <= sum(fit) <= begun_after + len(fit)


def test_the_steps_of_a_long_prompt_may_be_apart() -> None:
    """In between, blocks of it may come, go, and be wanted by somebody else."""
    blocks = blocks_of("long", 5 * STEP_BLOCKS)
    policy = DensityPolicy(len(blocks))
    tier = Tier(policy)
    tier.want(blocks)
    policy.added(blocks[: 4 * STEP_BLOCKS], 1.0)
    first, second = (policy.wanted(blocks, 4 * STEP_BLOCKS, 2.0) for _ in range(2))
    for number, _ in enumerate(first):
        next(second, None)
        gone = hashes_of(blocks[STEP_BLOCKS - 1 - number : STEP_BLOCKS - number])
        policy.removed(gone)
        assert not set(gone) & set(policy.victims(10, 3.0, lambda _: True))
    for _ in second:
        pass
    left = policy.victims(len(blocks), 4.0, lambda _: True)
    assert len(left) == 4 * STEP_BLOCKS - number - 1
    policy.removed(left)
    assert policy.victims(1, 5.0, lambda _: True) == []


@pytest.mark.parametrize("name", ["s3fifo", "arc", "density"])
def test_what_many_begin_with_stays(name: PolicyName) -> None:
    """A system prompt outlives the conversations of one request that pass by."""
    tier = Tier(make_policy(name, CAPACITY))
    for number in range(250):
        tier.step("request", (9, 9, number), 5.0)
    assert {block_hash((9,)), block_hash((9, 9))} <= set(tier.held)


def num_hits(name: PolicyName, paths: list[tuple[int, ...]], gap_s: float) -> int:
    tier = Tier(make_policy(name, CAPACITY))
    hits = 0
    for path in paths:
        hits += sum(block.block_hash in tier.held for block in chain(path))
        tier.step("request", path, gap_s)
    return hits


def test_density_keeps_a_part_of_a_scan_that_is_too_long() -> None:
    """LRU gives each block up just before it is wanted again."""
    scan = [(number % 20,) for number in range(2_000)]
    assert num_hits("lru", scan, 2.0) == 0
    assert num_hits("density", scan, 2.0) > 0.8 * 2_000 * CAPACITY / 20


def test_density_keeps_who_comes_back_rather_than_passers_by() -> None:
    """Four conversations are continued every twelve requests for good; the others, which come between, never are."""
    paths: list[tuple[int, ...]] = []
    for number in range(1_500):
        paths.append((number % 200, number // 200, 1, 1))
        if number % 3 == 0:
            paths.append((250, number // 3 % 4))
    assert num_hits("lru", paths, 2.0) == 0
    assert num_hits("density", paths, 2.0) > 500
