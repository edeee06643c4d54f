"""What the disk tier decides without touching a file: books, eviction order, pauses, how to read and write."""

import errno

from hypothesis import given
from hypothesis import strategies as st

from kv_store.disk.books import DiskBooks, Run
from kv_store.disk.eviction import least_valuable
from kv_store.disk.io_choice import Rates, choose
from kv_store.disk.segment import Segment
from kv_store.disk.write_pause import FIRST_PAUSE_S, MAX_PAUSE_S, WritePause, cause_of
from kv_store.tiers import StoredBlock
from protocol.kv_blocks import CachedBlock, Tenant
from tests.support.disk_blocks import hashes, some_blocks


def _segment(number: int, blocks: list[CachedBlock], used_at: float = 0.0) -> Segment:
    return Segment(number, list(blocks), [number] * len(blocks), 1000, used_at)


def all_of(books: DiskBooks) -> list[StoredBlock]:
    return [stored for segment in books.segments.values() for stored in books.stored(segment)]


def test_neighbours_are_read_together() -> None:
    books = DiskBooks()
    first, second = _segment(0, some_blocks(6)), _segment(1, some_blocks(2, seed=1))
    books.add(first)
    books.add(second)
    wanted = hashes(some_blocks(6))
    order = [*wanted[:4], *hashes(some_blocks(2, seed=1)), wanted[5], wanted[4]]
    assert books.runs(order, 3) == [
        Run(first, 0, 3),
        Run(first, 3, 1),
        Run(second, 0, 2),
        Run(first, 5, 1),
        Run(first, 4, 1),
    ]
    assert books.runs([*wanted[:1], hashes(some_blocks(1, seed=9))[0], *wanted[1:]], 3) == [Run(first, 0, 1)]


@given(st.lists(st.tuples(st.sampled_from(["add", "forget", "remove"]), st.integers(0, 30)), max_size=60))
def test_every_block_is_counted_once(steps: list[tuple[str, int]]) -> None:
    books = DiskBooks()
    pool = some_blocks(40)
    live: dict[bytes, int] = {}
    number = 0
    gone = []
    for action, pick in steps:
        if action == "add":
            blocks = pool[pick : pick + 4]
            books.add(_segment(number, blocks))
            live |= {block.block_hash: number for block in blocks if block.block_hash not in live}
            number += 1
        elif action == "forget":
            books.forget(pool[pick].block_hash)
            live.pop(pool[pick].block_hash, None)
        elif books.segments:
            segment = list(books.segments.values())[pick % len(books.segments)]
            books.remove(segment)
            live = {block_hash: where for block_hash, where in live.items() if where != segment.number}
        gone += books.take_gone()
    assert books.num_blocks == len(live) == sum(segment.num_live for segment in books.segments.values())
    assert {stored.block.block_hash: stored.checksum for stored in all_of(books)} == live
    assert sum(books.tenants.values()) == len(live)
    assert books.used_bytes == 1000 * len(books.segments)
    assert all(stored.place // 256 == stored.checksum for stored in [*all_of(books), *gone])
    assert {segment.number for segment in books.take_stale()} <= set(books.segments)


def test_what_was_not_used_for_long_goes_first() -> None:
    old, new = _segment(0, some_blocks(4), used_at=0.0), _segment(1, some_blocks(4), used_at=500.0)
    assert least_valuable([new, old], 1000.0) == [old]
    assert least_valuable([], 1000.0) == []


def test_a_file_with_few_live_blocks_goes_before_one_of_the_same_age() -> None:
    full, thin = _segment(0, some_blocks(8), used_at=0.0), _segment(1, some_blocks(8), used_at=30.0)
    thin.blocks[1:] = [None] * 7
    thin.num_live = 1
    assert least_valuable([full, thin], 100.0) == [thin]


def test_of_one_chain_the_tail_goes_first() -> None:
    blocks = some_blocks(8)
    head, tail = _segment(0, blocks[:4]), _segment(1, blocks[4:])
    assert least_valuable([head, tail], 100.0, 5) == [tail, head]


def test_pauses_double_and_a_cause_is_told_once() -> None:
    pause = WritePause()
    now, expected = 0.0, FIRST_PAUSE_S
    for attempt in range(10):
        assert pause.may_write(now)
        assert pause.failed("full", now) == (attempt == 0)
        assert not pause.may_write(now)
        assert pause.remaining_s(now) == expected
        now += expected
        expected = min(MAX_PAUSE_S, 2 * expected)
    assert pause.failed("broken", now)
    pause.succeeded()
    assert pause.may_write(now)
    assert pause.failed("full", now)
    assert pause.remaining_s(now) == FIRST_PAUSE_S
    assert pause.failures == {"full": 11, "broken": 1}


def test_causes_have_names() -> None:
    assert cause_of(OSError(errno.ENOSPC, "whatever")) == "ENOSPC (No space left on device)"


def test_direct_unless_the_page_cache_is_much_faster() -> None:
    assert choose(Rates(1e9, 1e9), Rates(1.2e9, 1.2e9)).direct_reads
    choice = choose(Rates(write=1e9, read=1e9), Rates(write=0.2e9, read=5e9))
    assert (choice.direct_reads, choice.direct_writes) == (False, True)
    assert "5.00 otherwise" in str(choice)
    assert "refuses" in choose(None, Rates(1e9, 1e9)).why
    assert not choose(None, Rates(1e9, 1e9)).direct_writes


def test_tenants_are_counted_apart() -> None:
    books = DiskBooks()
    books.add(_segment(0, some_blocks(3, tenant=Tenant("a"))))
    books.add(_segment(1, some_blocks(2, seed=1)))
    assert books.tenants == {"a": 3, "none": 2}
    books.forget(some_blocks(1)[0].block_hash)
    books.remove(books.segments[1])
    assert books.tenants == {"a": 2}
