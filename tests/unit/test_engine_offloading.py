"""What the device is about to forget is offered to the store, once and in time; what the store has comes back."""

import pytest
from engine_bench import BLOCK_SIZE, LAYOUT, Bench, continuation, hashes_of, prompt, request
from engine_store import BenchStore
from hypothesis import given
from hypothesis import strategies as st

from engine.events import BlocksOffered
from engine.request import Mode
from protocol.block_hash import root_hash
from protocol.errors import Cancelled
from protocol.ids import PinId
from protocol.kv_blocks import chain, tenant_of

NUM_BLOCKS = 64  # at most 16 are offered at a time, 4 of them when no more than 4 can be handed out without loss


def full(store: BenchStore | None = None, *, num_blocks: int = NUM_BLOCKS, num_prompts: int = 15) -> Bench:
    """A bench whose pool holds so many prompts of four full blocks each, the first of them least recently used."""
    bench = Bench(num_blocks, store=store or BenchStore())
    for number in range(num_prompts):
        bench.generate(request(f"p{number}", prompt(number, 4 * BLOCK_SIZE), max_tokens=1))
    return bench


# Offers.


def test_nothing_is_offered_while_there_is_room() -> None:
    bench = full(num_prompts=14)
    assert (bench.offers, bench.core.load().num_offered_blocks) == ({}, 0)


def test_the_coldest_chain_is_offered_in_its_order_when_room_runs_out() -> None:
    bench = full()
    (offer,) = bench.offers.values()
    tokens = prompt(0, 4 * BLOCK_SIZE)
    assert list(offer.blocks) == chain(root_hash(LAYOUT.identity), hashes_of(tokens))
    bench.check_blocks(offer.block_ids, tokens, "an offer")
    assert bench.core.load().num_offered_blocks == 4
    assert bench.core.load().free_blocks == NUM_BLOCKS - 4


def test_an_offer_says_whose_blocks_they_are() -> None:
    bench = Bench(store=BenchStore(eager=True))
    bench.generate(request("a", prompt(1, 8), cache_salt="x", max_tokens=1))
    (offer,) = bench.offers.values()
    assert {block.tenant for block in offer.blocks} == {tenant_of("x")}
    assert offer.blocks[0].parent == root_hash(LAYOUT.identity, "x")


def test_what_was_saved_is_forgotten_first_and_what_was_used_meanwhile_is_not() -> None:
    bench = full()
    bench.generate(request("again", prompt(1, 4 * BLOCK_SIZE), max_tokens=1))
    bench.save()
    bench.generate(request("new", prompt(20, 6 * BLOCK_SIZE), max_tokens=1))
    assert bench.pin("first", hashes_of(prompt(0, 16))) == ()
    assert len(bench.pin("second", hashes_of(prompt(1, 12)))) == 3
    assert bench.core.load().lost_blocks == 0


def test_the_store_is_asked_once_about_a_block_until_it_is_used_again() -> None:
    store = BenchStore(keeps=False)
    bench = full(store)
    for number in range(20, 24):
        bench.generate(request(f"q{number}", prompt(number, 4), max_tokens=1))
    assert len(store.asked) == len({block.block_hash for block in store.asked}) >= 8
    assert bench.offers == {}
    first, second = (bench.pin(PinId(f"pin{i}"), hashes_of(prompt(2, 16))) for i in range(2))
    assert first == second
    bench.unpin("pin0")
    bench.unpin("pin1")
    num_asked = len(store.asked)
    bench.generate(request("other", prompt(30, 50 * BLOCK_SIZE), max_tokens=1))
    asked = [block.block_hash for block in store.asked]
    assert len(asked) > num_asked
    assert max(map(asked.count, asked)) <= 2


@pytest.mark.parametrize(("num_blocks", "most"), [(8, 4), (16, 8), (48, 16), (64, 16), (256, 64)])
def test_offers_hold_a_quarter_of_the_pool_at_most_or_a_few_blocks(num_blocks: int, most: int) -> None:
    bench = full(num_blocks=num_blocks, num_prompts=num_blocks // 4 - 1)
    for number in range(100, 140):
        bench.submit(request(f"q{number}", prompt(number, 4 * BLOCK_SIZE), max_tokens=1))
    bench.run()
    assert 0 < bench.core.load().num_offered_blocks <= most
    while bench.step() or bench.offers:
        assert bench.core.load().num_offered_blocks <= most
        bench.save()
    assert bench.core.load().free_blocks == num_blocks


def test_what_is_forgotten_faster_than_it_is_saved_is_counted() -> None:
    bench = full()
    whole = request("whole", prompt(20, NUM_BLOCKS * BLOCK_SIZE - 4), max_tokens=1)
    bench.submit(whole)
    while not bench.heard["whole"].over:
        bench.step()
        bench.save()
    num_lost = bench.core.load().lost_blocks
    assert num_lost > 10, "it did not wait for more than half of the pool"
    assert bench.store is not None
    assert num_lost + len(bench.store.kept) >= 15 * 4


def test_room_is_made_for_what_waits_while_others_run() -> None:
    """More than a window of it, and half of the pool at most."""
    bench = Bench(NUM_BLOCKS, store=BenchStore(), max_num_seqs=1)
    for number in range(8):
        bench.generate(request(f"p{number}", prompt(number, 4 * BLOCK_SIZE), max_tokens=1))
    bench.submit(request("long", prompt(20, 16 * BLOCK_SIZE - 8), max_tokens=8))
    bench.step()
    assert bench.offers == {}
    for number in range(21, 31):
        bench.submit(request(f"q{number}", prompt(number, 4 * BLOCK_SIZE), max_tokens=1))
    bench.step()
    assert bench.core.load().num_offered_blocks == 15, "17 are empty"
    bench.save()
    bench.step()
    assert bench.core.load().num_offered_blocks == 0, "half of the pool is clean"


def test_clearing_the_prefix_cache_forgets_offered_blocks_but_not_their_bytes() -> None:
    bench = full()
    bench.core.clear_prefix_cache()
    (offer,) = bench.offers.values()
    bench.check_blocks(offer.block_ids, prompt(0, 16), "an offer")
    bench.save()
    assert bench.core.load().free_blocks == NUM_BLOCKS
    assert bench.core.load().num_offered_blocks == 0


def test_a_stop_voids_all_offers() -> None:
    bench = full()
    (pin_id,) = bench.offers
    bench.core.close(Cancelled("stopping"))
    assert bench.busy_blocks == 0
    bench.core.saved(pin_id)
    assert bench.busy_blocks == 0


# Who needs the blocks.


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_a_decode_waits_for_blocks_that_are_being_saved_and_preempts_nobody(async_scheduling: str) -> None:
    bench = Bench(16, store=BenchStore(), async_scheduling=async_scheduling)
    bench.generate(request("cold", prompt(1, 4), max_tokens=1))
    old, young = prompt(2, 7 * BLOCK_SIZE - 2), prompt(3, 7 * BLOCK_SIZE - 2)
    bench.submit(request("old", old, max_tokens=12))
    bench.submit(request("young", young, max_tokens=3))
    bench.run()
    assert bench.core.load().num_offered_blocks == 2
    assert bench.core.load().preemptions == 0
    bench.save()
    bench.run()
    assert bench.heard["old"].tokens == continuation(old, 12)
    assert bench.heard["young"].tokens == continuation(young, 3)
    assert bench.core.load().preemptions == 0


def test_an_admission_waits_for_blocks_that_are_being_saved() -> None:
    bench = full()
    whole = prompt(20, NUM_BLOCKS * BLOCK_SIZE - 4)
    bench.submit(request("whole", whole, max_tokens=2))
    for _ in range(100):
        if bench.step() or not bench.offers:
            continue
        bench.save()
    assert bench.heard["whole"].tokens == continuation(whole, 2)


@pytest.mark.parametrize("lag", [1, 4])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("num_blocks", "size"), [(48, 20), (64, 16), (256, 20), (256, 64), (256, 120)])
def test_nothing_is_lost_where_a_prompt_takes_half_of_the_pool_at_most(
    num_blocks: int, size: int, together: bool, lag: int
) -> None:
    """A save takes `lag` turns. No sequence grows, which would not wait."""
    store = BenchStore()
    bench = Bench(num_blocks, store=store, max_num_batched_tokens=8 * BLOCK_SIZE)
    requests = [request(f"p{number}", prompt(number, size * BLOCK_SIZE - 2), max_tokens=1) for number in range(12)]
    offered_at: dict[PinId, int] = {}
    for turn in range(10_000):
        if all(heard.over for heard in bench.heard.values()):
            if not requests:
                break
            num_now = len(requests) if together else 1
            for each in requests[:num_now]:
                bench.submit(each)
            del requests[:num_now]
        bench.step()
        done = [pin_id for pin_id in bench.offers if turn - offered_at.setdefault(pin_id, turn) >= lag]
        if done:
            bench.save(*done)
    assert all(heard.finished for heard in bench.heard.values())
    assert len(store.kept) >= 12 * (size - 1) - num_blocks, "the last block of each is not full"
    assert (bench.core.load().lost_blocks, bench.core.load().preemptions) == (0, 0)


def test_an_admission_is_put_off_once_and_for_no_more_than_it_lacked() -> None:
    bench = full()
    bench.save()
    bench.submit(request("big", prompt(20, 13 * BLOCK_SIZE), max_tokens=1))
    assert not bench.step()
    first, *others = bench.offers.values()
    assert others, "there is a window behind what is lacking"
    assert len(first.blocks) == 13 - 4 - 4 + NUM_BLOCKS // 32, "4 are empty, 4 saved, and some are forgotten ahead"
    assert not bench.step()
    bench.save(first.pin_id, kept=False)
    assert bench.step()
    assert bench.heard["big"].over
    assert bench.core.load().lost_blocks == 0, "the store had its chance"


def test_no_admission_waits_for_what_nobody_wants() -> None:
    bench = full(BenchStore(keeps=False))
    bench.submit(request("big", prompt(20, 40 * BLOCK_SIZE), max_tokens=1))
    assert bench.step()
    assert bench.heard["big"].over


def test_a_request_that_is_put_off_may_be_cancelled() -> None:
    bench = full()
    bench.submit(request("big", prompt(20, 40 * BLOCK_SIZE), max_tokens=1))
    bench.submit(request("small", prompt(21, 2 * BLOCK_SIZE), max_tokens=1))
    assert not bench.step()
    bench.cancel("big")
    bench.run()
    assert bench.heard["small"].over
    bench.save()
    assert bench.busy_blocks == 0


# Write-through.


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_an_eager_store_is_offered_what_is_computed_decoded_and_imported(async_scheduling: str) -> None:
    store = BenchStore(eager=True)
    bench = Bench(256, store=store, async_scheduling=async_scheduling)
    tokens = prompt(1, 10)
    bench.generate(request("r", tokens, max_tokens=8))
    bench.save()
    whole = [*tokens, *continuation(tokens, 8)]
    assert list(store.kept) == hashes_of(whole[:-1]), "the last token's KV is never computed"
    other = Bench(256)
    other.generate(request("source", prompt(2, 9), Mode.PREFILL_ONLY))
    bench.submit(request("i", prompt(2, 9), import_tokens=8))
    bench.run()
    reserved = bench.heard["i"].reserved
    assert reserved is not None
    for source, block_id in zip(other.heard["source"].block_ids, reserved.block_ids, strict=False):
        bench.runner.import_block(other.runner.memory, source, block_id)
    bench.resume("i", 8)
    bench.run()
    bench.save()
    assert set(hashes_of(prompt(2, 8))) <= set(store.kept)
    assert bench.busy_blocks == 0


def test_what_there_is_no_room_for_is_offered_to_an_eager_store_when_there_is() -> None:
    store = BenchStore(eager=True)
    bench = Bench(NUM_BLOCKS, store=store)
    bench.generate(request("r", prompt(1, 160), max_tokens=1))
    for num_saved in (16, 32, 40):
        assert 0 < bench.core.load().num_offered_blocks <= 16
        bench.save()
        assert list(store.kept) == hashes_of(prompt(1, 160))[:num_saved]
        bench.run()
    assert bench.offers == {}
    assert len(store.asked) == 40


def test_a_block_whose_turn_has_not_come_is_not_offered_for_both_reasons() -> None:
    tokens = prompt(1, 15 * BLOCK_SIZE)
    store = BenchStore(eager=True)
    source = Bench(256, store=store)
    source.generate(request("source", tokens, max_tokens=1))
    source.save()
    last = hashes_of(tokens)[-1]
    del store.kept[last]
    store.asked.clear()
    bench = Bench(16, store=store)
    bench.submit(request("r", tokens, max_tokens=1))
    bench.run()
    bench.resume("r", bench.bring("r", 0))
    bench.run()
    (offer,) = bench.offers.values()
    assert [block.block_hash for block in offer.blocks] == [last]
    bench.save()
    for _ in range(20):
        bench.step()
    assert len(store.asked) == len({block.block_hash for block in store.asked})
    assert bench.busy_blocks == 0


@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "step", "step", "save", "lose", "load"]), st.integers(0, 1 << 16)
        )
    ),
    num_blocks=st.integers(16, 40),
    eager=st.booleans(),
    async_scheduling=st.sampled_from(["off", "on"]),
)
def test_tokens_are_right_whatever_is_offered_saved_lost_and_loaded(
    actions: list[tuple[str, int]], num_blocks: int, eager: bool, async_scheduling: str
) -> None:
    bench = Bench(num_blocks, store=BenchStore(eager=eager), async_scheduling=async_scheduling)
    for count, (action, dice) in enumerate(actions):
        awaiting = [name for name, heard in bench.heard.items() if heard.awaiting]
        match action:
            case "submit":
                tokens = prompt(dice % 5, 6 + dice % 37)
                bench.submit(request(f"r{count}", tokens, max_tokens=1 + dice % 20))
            case "step":
                for _ in range(1 + dice % 20):
                    bench.step()
            case "save" | "lose" if bench.offers:
                bench.save(sorted(bench.offers)[dice % len(bench.offers)], kept=action == "save")
            case "load" if awaiting:
                bench.resume(awaiting[dice % len(awaiting)], bench.bring(awaiting[dice % len(awaiting)]))
            case _:
                pass
    for _ in range(10_000):
        for name, heard in bench.heard.items():
            if heard.awaiting:
                bench.resume(name, bench.bring(name))
        bench.save()
        if not bench.step() and all(heard.over for heard in bench.heard.values()) and not bench.offers:
            break
    for name, heard in bench.heard.items():
        context, limit = bench.requests[name].prompt_token_ids, bench.requests[name].sampling.max_tokens
        assert heard.tokens == continuation(context, min(limit, num_blocks * BLOCK_SIZE - len(context)))
    assert bench.busy_blocks == 0
    known = {
        block.block_hash: block
        for name, heard in bench.heard.items()
        for block in chain(
            root_hash(LAYOUT.identity), hashes_of([*bench.requests[name].prompt_token_ids, *heard.tokens])
        )
    }
    assert bench.store is not None
    assert all(known[block_hash] == block for block_hash, block in bench.store.blocks.items()), "parents and positions"


def test_an_offer_is_an_event_like_any_other() -> None:
    """Nothing is offered twice at a time, and every id is new."""
    bench = full()
    seen: set[PinId] = set()
    for number in range(20, 30):
        bench.generate(request(f"q{number}", prompt(number, 4 * BLOCK_SIZE), max_tokens=1))
        assert all(isinstance(offer, BlocksOffered) for offer in bench.offers.values())
        assert seen.isdisjoint(bench.offers)
        seen |= set(bench.offers)
        bench.save()
    assert len(seen) >= 10
