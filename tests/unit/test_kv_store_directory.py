"""TierDirectory: conservation under anything, and who may be evicted when."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_store.directory import TierDirectory
from kv_store.entries import Entry
from kv_store.policy.density import DensityPolicy
from kv_store.policy.lru import LRUPolicy
from kv_store.policy.policy import STEP_BLOCKS
from kv_store.policy.tenant_orders import TenantOrders
from kv_store.quotas import Quotas
from protocol.ids import BlockHash
from protocol.kv_blocks import NO_TENANT, CachedBlock, Tenant
from runtime.clock import ManualClock
from tests.support.store_parts import TailsFirst, blocks_of, hashes_of

ALICE, BOB = Tenant("alice"), Tenant("bob")


def directory(num_slots: int = 8, quotas: Quotas | None = None) -> tuple[TierDirectory, ManualClock]:
    clock = ManualClock()
    return TierDirectory(num_slots, TailsFirst(), clock=clock, quotas=quotas), clock


def store(tier: TierDirectory, blocks: list[CachedBlock]) -> list[CachedBlock]:
    """What had to go for them."""
    reservation = tier.reserve(blocks)
    tier.commit(reservation.entries, [1] * len(reservation.entries))
    return [entry.block for entry in reservation.evicted]


def test_a_block_is_found_when_it_is_committed_and_not_before() -> None:
    tier, _ = directory()
    blocks = blocks_of("a", 3)
    reservation = tier.reserve(blocks)
    assert len({entry.slot for entry in reservation.entries}) == 3
    assert tier.num_ready(hashes_of(blocks)) == 0
    assert all(block_hash in tier for block_hash in hashes_of(blocks)), "they are on their way"
    tier.commit(reservation.entries[:2], [11, 12])
    tier.abort(reservation.entries[2:])
    assert tier.num_ready(hashes_of(blocks)) == 2
    assert [(entry.slot, entry.checksum) for entry in tier.hold(hashes_of(blocks))] == [
        (reservation.entries[0].slot, 11),
        (reservation.entries[1].slot, 12),
    ]


def test_what_leaves_does_not_shield_what_it_continues() -> None:
    tier = TierDirectory(16, LRUPolicy(), clock=ManualClock())
    old, new = blocks_of("old", 8), blocks_of("new", 8)
    store(tier, old)
    store(tier, new)
    leaving = [entry.block for _ in range(3) for entry in tier.leave(2)]
    assert leaving == old[:1:-1], "the older chain from its end, whatever of it is leaving already"


def test_what_is_here_or_on_its_way_is_not_written_twice() -> None:
    tier, _ = directory()
    blocks = blocks_of("a", 4)
    store(tier, blocks[:1])
    first = tier.reserve(blocks[:3])
    second = tier.reserve([*blocks, blocks[3]])
    assert [entry.block for entry in first.entries] == blocks[1:3]
    assert [entry.block for entry in second.entries] == blocks[3:]
    assert (first.num_duplicates, second.num_duplicates) == (1, 4)


def test_what_is_read_stays_and_what_lacks_room_is_refused_from_the_tail() -> None:
    tier, _ = directory(4)
    old = blocks_of("old", 4)
    store(tier, old)
    held = tier.hold(hashes_of(old[:3]))
    reservation = tier.reserve(blocks_of("new", 3))
    assert [entry.block for entry in reservation.evicted] == old[3:]
    assert [entry.block.position for entry in reservation.entries] == [0]
    assert reservation.num_without_room == 2
    tier.let_go(held)
    assert tier.reserve(blocks_of("new", 3)).num_without_room == 0


def test_a_block_that_is_forgotten_while_it_is_read_keeps_its_slot() -> None:
    tier, _ = directory(2)
    block = blocks_of("a", 1)
    store(tier, block)
    held = tier.hold(hashes_of(block))
    assert tier.forget([*hashes_of(block), *hashes_of(block)]) == held
    assert tier.num_ready(hashes_of(block)) == 0
    again = tier.reserve(block).entries
    assert again[0].slot != held[0].slot
    assert tier.reserve(blocks_of("b", 1)).num_without_room == 1
    tier.let_go(held)
    assert tier.reserve(blocks_of("b", 1)).num_without_room == 0
    tier.commit(again, [1])
    assert tier.drop(held) == [], "what has been stored anew under the address stays"
    assert tier.num_ready(hashes_of(block)) == 1


def test_leaving_blocks_are_read_until_they_are_out_and_a_reader_keeps_them() -> None:
    tier, _ = directory(4)
    blocks = blocks_of("a", 4)
    store(tier, blocks)
    leaving = tier.leave(2)
    assert [entry.block for entry in leaving] == [blocks[3], blocks[2]]
    assert tier.leave(4) != leaving
    assert tier.num_ready(hashes_of(blocks)) == 4
    assert tier.reserve(blocks_of("b", 1)).entries == (), "everything is leaving: nobody goes at once"
    held = tier.hold(hashes_of(blocks[:3]))
    assert [entry.block for entry in tier.take_out(leaving)] == [blocks[3]]
    assert (tier.num_free, tier.occupancy().leaving) == (1, 2)
    tier.let_go(held)
    assert tier.num_ready(hashes_of(blocks)) == 3


def test_pins_end_with_their_time_and_take_half_of_a_tier_at_most() -> None:
    tier, clock = directory(4)
    blocks = blocks_of("a", 4)
    store(tier, blocks)
    assert tier.pin(hashes_of(blocks), 60.0) == 2
    assert store(tier, blocks_of("b", 4)) == [blocks[3], blocks[2]]
    clock.advance(60.0)
    assert not tier.is_pinned(hashes_of(blocks)[0])
    assert tier.occupancy().pinned == 0
    assert store(tier, blocks_of("c", 1)) == [blocks[1]]
    assert tier.unpin(hashes_of(blocks)) == 0
    assert tier.pin(hashes_of(blocks), 60.0) == 1
    assert tier.unpin() == 1


def test_a_tenant_over_its_quota_gives_up_its_own_first() -> None:
    tier, _ = directory(8, Quotas(share=1.0, blocks_by_tenant={ALICE: 3}))
    bobs = blocks_of("x", 4, BOB)
    store(tier, bobs)
    older = blocks_of("old", 3, ALICE)
    store(tier, older)
    assert tier.lacking(blocks_of("new", 2, ALICE)) == [(2, ALICE)]
    assert store(tier, blocks_of("new", 2, ALICE)) == [older[2], older[1]]
    assert tier.slots_by_tenant() == {ALICE: 3, BOB: 4}
    held = tier.hold(hashes_of(older[:1])) + tier.hold(hashes_of(blocks_of("new", 2, ALICE)))
    assert len(held) == 3
    refused = tier.reserve(blocks_of("more", 1, ALICE))
    assert (refused.entries, refused.num_over_quota) == ((), 1)
    assert tier.num_ready(hashes_of(bobs)) == 4, "its neighbours pay nothing for it"


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_every_tenant_may_have_a_block(share: float) -> None:
    tier, _ = directory(2, Quotas(share))
    assert len(tier.reserve(blocks_of("a", 2, ALICE)).entries) == 1


class Counting(TailsFirst):
    """Counts the blocks that it is asked to choose among."""

    def __init__(self) -> None:
        super().__init__()
        self.num_looked_at = 0

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:
        self.num_looked_at += len(self._blocks)
        return super().victims(count, now, may_evict)


def test_a_tenant_at_its_quota_makes_nobody_look_through_the_tier() -> None:
    policy = Counting()
    tier = TierDirectory(1000, policy, clock=ManualClock(), quotas=Quotas(share=0.01))
    for number in range(99):
        store(tier, blocks_of("their", 10, Tenant(f"tenant{number}")))
    store(tier, blocks_of("my", 10, ALICE))
    assert tier.num_free == 0
    for number in range(20):
        chosen = tier.leave(2, ALICE)
        assert {entry.block.tenant for entry in chosen} == {ALICE}
        tier.stay(chosen)
        assert len(store(tier, blocks_of(f"more{number}", 5, ALICE))) == 5
    assert tier.slots_by_tenant()[ALICE] == 10
    assert policy.num_looked_at == 0


def test_within_a_quota_the_least_recently_used_goes_first() -> None:
    tier, _ = directory(8, Quotas(blocks_by_tenant={ALICE: 4}))
    older, newer = blocks_of("older", 2, ALICE), blocks_of("newer", 2, ALICE)
    store(tier, older)
    store(tier, newer)
    for _ in tier.requested(older):
        pass
    assert store(tier, blocks_of("third", 2, ALICE)) == [newer[1], newer[0]]
    assert tier.forget(hashes_of(older))
    assert store(tier, blocks_of("fourth", 4, ALICE)) == [
        blocks_of("third", 2, ALICE)[1],
        blocks_of("third", 2, ALICE)[0],
    ]


def test_an_order_of_ones_own_lives_as_long_as_a_limited_tenant_has_blocks() -> None:
    orders = TenantOrders(TailsFirst(), lambda tenant: tenant != BOB)
    bobs = blocks_of("his", 2, BOB)
    orders.added(bobs, 0.0)
    assert orders.num_orders == 0, "nothing limits him"
    for number in range(50):
        one_off = blocks_of("a", 2, Tenant(f"tenant{number}"))
        orders.added(one_off, 0.0)
        assert orders.victims(5, 0.0, lambda _: True, Tenant(f"tenant{number}")) == hashes_of(one_off[::-1])
        orders.removed(one_off[:1])
        assert orders.num_orders == 1
        orders.removed(one_off[1:])
        assert orders.num_orders == 0
    assert orders.victims(5, 0.0, lambda _: True) == hashes_of(bobs[::-1])


def test_no_share_binds_requests_without_a_salt_together() -> None:
    tier, _ = directory(8, Quotas(share=0.25))
    assert len(tier.reserve(blocks_of("a", 6)).entries) == 6
    assert len(tier.reserve(blocks_of("b", 6, ALICE)).entries) == 2
    named, _ = directory(8, Quotas(share=1.0, blocks_by_tenant={NO_TENANT: 3}))
    assert len(named.reserve(blocks_of("a", 6)).entries) == 3


def test_a_long_chain_is_learnt_from_in_steps_between_which_anything_may_happen() -> None:
    chain = blocks_of("a", 1000, ALICE)
    tier = TierDirectory(2000, DensityPolicy(2000), clock=ManualClock(), quotas=Quotas(share=0.9))
    store(tier, chain)
    steps = list(zip(tier.requested(chain), range(100), strict=False))
    assert len(steps) >= 1000 // STEP_BLOCKS
    going, other = tier.requested(chain), tier.requested(chain[:700])
    for _ in going:
        next(other, None)
        tier.forget(hashes_of(chain[-300:-200]))
        tier.leave(50, ALICE)
    assert len(tier.forget(hashes_of(chain))) == 900


class Broken(TailsFirst):
    """Cannot do without a certain block."""

    def __init__(self, needed: BlockHash) -> None:
        super().__init__()
        self._needed = needed

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        if self._needed in block_hashes:
            raise KeyError("a bug")
        super().removed(block_hashes)


def test_a_policy_that_fails_costs_no_slots(caplog: pytest.LogCaptureFixture) -> None:
    old, new = blocks_of("old", 4), blocks_of("new", 8)
    tier = TierDirectory(4, Broken(hashes_of(old)[1]), clock=ManualClock())
    store(tier, old)
    assert len(tier.forget(hashes_of(old))) == 4
    assert tier.num_free == 4
    for block in new:
        store(tier, [block])
    assert tier.num_ready(hashes_of(new[4:])) == 4, "although the policy still names the old ones"
    store(tier, old)
    assert tier.num_ready(hashes_of(old)) == 4
    tier.forget(hashes_of(old))
    occupancy = tier.occupancy()
    assert (occupancy.free, occupancy.writing, occupancy.ready) == (4, 0, 0)
    assert caplog.text.count("eviction policy") == 1


class AnySequence(RuleBasedStateMachine):
    """Whatever is done in whatever order, every slot is in one state, and nothing that is read is given to somebody else."""

    NUM_SLOTS = 6

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        quotas = Quotas(0.7, {ALICE: 3})
        self.tier = TierDirectory(self.NUM_SLOTS, TailsFirst(), clock=self.clock, quotas=quotas)
        self.writing: list[Entry] = []
        self.held: list[Entry] = []
        self.leaving: list[Entry] = []

    chains = st.sampled_from([blocks_of(name, 5, tenant) for name in "ab" for tenant in (ALICE, BOB)])
    some = st.integers(0, 4)

    @rule(chain=chains, first=some, count=some)
    def reserve(self, chain: list[CachedBlock], first: int, count: int) -> None:
        self.writing += self.tier.reserve(chain[first : first + count]).entries

    @rule(count=some, held=st.booleans())
    def commit(self, count: int, held: bool) -> None:
        done, self.writing = self.writing[:count], self.writing[count:]
        self.tier.commit(done, [entry.slot for entry in done], held=held)
        if held:
            self.held += done

    @rule(count=some)
    def abort(self, count: int) -> None:
        gone, self.writing = self.writing[:count], self.writing[count:]
        self.tier.abort(gone)

    @rule(chain=chains, count=some)
    def hold(self, chain: list[CachedBlock], count: int) -> None:
        entries = self.tier.hold(hashes_of(chain[:count]))
        self.tier.used(entries)
        self.held += entries

    @rule(count=some)
    def let_go(self, count: int) -> None:
        gone, self.held = self.held[:count], self.held[count:]
        self.tier.let_go(gone)

    @rule(count=some, tenant=st.sampled_from([None, ALICE]))
    def leave(self, count: int, tenant: Tenant | None) -> None:
        self.leaving += self.tier.leave(count, tenant)

    @rule(count=some, stays=st.booleans())
    def decide(self, count: int, stays: bool) -> None:
        chosen, self.leaving = self.leaving[:count], self.leaving[count:]
        if stays:
            self.tier.stay(chosen)
        else:
            self.tier.take_out(chosen)
            self.tier.stay(chosen)

    @rule(chain=chains, count=some)
    def forget(self, chain: list[CachedBlock], count: int) -> None:
        self.tier.forget(hashes_of(chain[:count]))

    @rule(chain=chains, count=some)
    def pin(self, chain: list[CachedBlock], count: int) -> None:
        pinned = self.tier.pin(hashes_of(chain[:count]), 10.0)
        assert pinned <= self.tier.num_ready(hashes_of(chain[:count]))

    @rule(chain=chains)
    def requested(self, chain: list[CachedBlock]) -> None:
        for _ in self.tier.requested(chain):
            pass

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def conserved(self) -> None:
        slots = self.tier.occupancy()
        assert slots.free + slots.writing + slots.ready + slots.doomed == self.NUM_SLOTS
        assert slots.writing == len(self.writing)
        assert sum(self.tier.slots_by_tenant().values()) == self.NUM_SLOTS - slots.free
        assert self.tier.slots_by_tenant().get(ALICE, 0) <= 3
        assert slots.pinned <= self.NUM_SLOTS // 2

    @invariant()
    def nobody_shares_a_slot(self) -> None:
        in_use = {id(entry): entry.slot for entry in [*self.writing, *self.held, *self.tier.snapshot()]}
        assert len(set(in_use.values())) == len(in_use)
        assert self.tier.occupancy().held == len({id(entry) for entry in self.held})


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
