"""KVEventLog: numbered without gaps, bounded, and a reader that follows it always ends up with the whole truth."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv_event_log import KVEventLog
from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import AllBlocksCleared, BlocksRemoved, BlocksStored, KVEventBatch, StorageTier

A, B, C = (BlockHash(bytes([i]) * 16) for i in range(3))
TIERS: tuple[StorageTier, ...] = ("device", "host", "disk")


def test_neighbours_of_a_kind_are_one_event_and_numbers_go_on() -> None:
    log = KVEventLog(Incarnation("i"))
    assert log.take() is None
    log.stored([A, B])
    log.stored([C])
    log.removed([A])
    assert log.take() == KVEventBatch("i", 0, (BlocksStored((A, B, C)), BlocksRemoved((A,))))
    assert log.take() is None
    log.stored([A])
    assert log.take() == KVEventBatch("i", 2, (BlocksStored((A,)),))


def test_a_snapshot_replaces_what_is_pending() -> None:
    log = KVEventLog(Incarnation("i"))
    log.stored([A, B])
    log.take()
    log.removed([A])
    assert log.snapshot() == KVEventBatch("i", 1, (AllBlocksCleared(), BlocksStored((B,))))
    assert log.take() is None
    log.stored([C])
    assert log.take() == KVEventBatch("i", 3, (BlocksStored((C,)),))


def test_the_snapshot_of_an_empty_cache() -> None:
    assert KVEventLog(Incarnation("i")).snapshot() == KVEventBatch("i", 0, (AllBlocksCleared(),))


def test_too_much_to_tell_becomes_a_snapshot() -> None:
    log = KVEventLog(Incarnation("i"), max_pending_blocks=2)
    log.stored([A, B])
    log.removed([A])
    log.stored([C])
    assert log.take() == KVEventBatch("i", 0, (AllBlocksCleared(), BlocksStored((B, C))))
    log.removed([B])
    assert log.take() == KVEventBatch("i", 2, (BlocksRemoved((B,)),))


def test_tiers_are_told_apart_and_only_the_device_is_cleared() -> None:
    log = KVEventLog(Incarnation("i"))
    log.stored([A, B])
    log.stored([A], "host")
    log.stored([B], "host")
    log.removed([A])
    events = (BlocksStored((A, B)), BlocksStored((A, B), "host"), BlocksRemoved((A,)))
    assert log.take() == KVEventBatch("i", 0, events)
    log.removed([C, A], "host")
    log.stored([C], "disk")
    assert log.take() == KVEventBatch("i", 3, (BlocksRemoved((A,), "host"), BlocksStored((C,), "disk")))
    log.cleared()
    whole = (AllBlocksCleared(), BlocksStored((B,), "host"), BlocksStored((C,), "disk"))
    assert log.take() == KVEventBatch("i", 5, whole)
    assert log.snapshot() == KVEventBatch("i", 8, whole)


def test_of_a_tier_too_large_to_tell_what_came_first_is_said_to_be_gone() -> None:
    log = KVEventLog(Incarnation("i"), max_known_blocks=2)
    log.stored([A], "disk")
    log.stored([B, C], "disk")
    assert log.take() == KVEventBatch("i", 0, (BlocksStored((A, B, C), "disk"), BlocksRemoved((A,), "disk")))
    log.removed([A], "disk")
    assert log.take() is None, "it was gone before"
    assert log.snapshot() == KVEventBatch("i", 2, (AllBlocksCleared(), BlocksStored((B, C), "disk")))


@given(
    st.lists(
        st.tuples(st.sampled_from(["toggle", "clear", "take", "snapshot"]), st.integers(0, 5), st.sampled_from(TIERS)),
        max_size=60,
    )
)
def test_a_reader_that_follows_knows_the_cache(actions: list[tuple[str, int, StorageTier]]) -> None:
    log = KVEventLog(Incarnation("i"), max_pending_blocks=4)
    truth: set[tuple[bytes, StorageTier]] = set()
    known: set[tuple[bytes, StorageTier]] = set()
    next_event = 0
    for action, which, tier in [*actions, ("take", 0, "device")]:
        block_hash = BlockHash(bytes([which]) * 16)
        batch = None
        if action == "toggle" and (block_hash, tier) in truth:
            truth.remove((block_hash, tier))
            log.removed([block_hash], tier)
        elif action == "toggle":
            truth.add((block_hash, tier))
            log.stored([block_hash], tier)
        elif action == "clear":
            truth = {each for each in truth if each[1] != "device"}
            log.cleared()
        else:
            batch = log.take() if action == "take" else log.snapshot()
        if batch is None:
            continue
        assert batch.first_event == next_event
        next_event += len(batch.events)
        for event in batch.events:
            match event:
                case AllBlocksCleared():
                    known.clear()
                case BlocksStored():
                    known |= {(each, event.tier) for each in event.block_hashes}
                case BlocksRemoved():
                    known -= {(each, event.tier) for each in event.block_hashes}
        assert known == truth
    assert known == truth
