"""KVEventLog: numbered without gaps, bounded, and a reader that follows it always ends up with the whole truth."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv_event_log import KVEventLog
from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import AllBlocksCleared, BlocksRemoved, BlocksStored, KVEventBatch

A, B, C = (BlockHash(bytes([i]) * 16) for i in range(3))


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


@given(st.lists(st.tuples(st.sampled_from(["toggle", "clear", "take", "snapshot"]), st.integers(0, 5)), max_size=60))
def test_a_reader_that_follows_knows_the_cache(actions: list[tuple[str, int]]) -> None:
    log = KVEventLog(Incarnation("i"), max_pending_blocks=4)
    truth: set[bytes] = set()
    known: set[bytes] = set()
    next_event = 0
    for action, which in [*actions, ("take", 0)]:
        block_hash = BlockHash(bytes([which]) * 16)
        batch = None
        if action == "toggle" and block_hash in truth:
            truth.remove(block_hash)
            log.removed([block_hash])
        elif action == "toggle":
            truth.add(block_hash)
            log.stored([block_hash])
        elif action == "clear":
            truth.clear()
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
                    known |= set(event.block_hashes)
                case BlocksRemoved():
                    known -= set(event.block_hashes)
        assert known == truth
    assert known == truth
