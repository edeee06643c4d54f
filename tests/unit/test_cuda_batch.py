"""Rows, block tables and padded sizes: what the host keeps of the tensors that persist on a device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cuda.batch import BlockTableRows, PersistentBatch
from engine.cuda.decode_graphs import padded_sizes
from engine.cuda.device import HostDevice
from engine.cuda.rows import RowTable
from engine.runner import ScheduledChunk
from protocol.ids import RequestId
from protocol.sampling import SamplingParams

NUM_ROWS = 4


def ids(*names: object) -> list[RequestId]:
    return [RequestId(str(name)) for name in names]


def test_a_request_keeps_its_row_until_it_is_forgotten() -> None:
    table = RowTable(NUM_ROWS)
    first = table.place(ids("a", "b"))
    again = table.place(ids("b", "c", "a"))
    assert again.rows[2] == first.rows[0]
    assert again.rows[0] == first.rows[1]
    assert again.new == (1,)
    assert table.forget(RequestId("b")) == first.rows[1]
    assert table.forget(RequestId("b")) is None
    assert table.place(ids("d")).rows == (first.rows[1],)


def test_whoever_was_longest_without_a_step_gives_way() -> None:
    table = RowTable(2)
    table.place(ids("old", "young"))
    table.place(ids("young"))
    assert table.place(ids("new", "young")).new == (0,)
    assert table.place(ids("old", "young")).new == (0,)
    with pytest.raises(ValueError, match="3 requests draw a token in a batch of 2 rows"):
        table.place(ids("a", "b", "c"))


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 9), max_size=NUM_ROWS)), max_size=30))
def test_rows_are_never_shared(operations: list[tuple[bool, set[int]]]) -> None:
    table, rows = RowTable(NUM_ROWS), dict[RequestId, int]()
    for forgets, numbers in operations:
        requests = ids(*numbers)
        if forgets:
            for request_id in requests:
                table.forget(request_id)
                rows.pop(request_id, None)
            continue
        placement = table.place(requests)
        assert len(set(placement.rows)) == len(requests)
        assert set(placement.rows) <= set(range(NUM_ROWS))
        for place, (request_id, row) in enumerate(zip(requests, placement.rows, strict=True)):
            assert place in placement.new or rows[request_id] == row
            rows = {other: taken for other, taken in rows.items() if taken != row}
            rows[request_id] = row


def test_sizes_reach_the_largest_batch_in_steps_of_eight() -> None:
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert padded_sizes(13) == (1, 2, 4, 8, 13)
    assert padded_sizes(3) == (1, 2, 3)
    assert padded_sizes(1) == (1,)


def decode(block_ids: list[int]) -> ScheduledChunk:
    params = SamplingParams(max_tokens=1, seed=0)
    return ScheduledChunk(RequestId("r"), [1], 0, block_ids, True, 0, params, (), ())


def test_only_what_is_new_in_a_table_is_sent() -> None:
    tables = BlockTableRows(NUM_ROWS, max_blocks=8)
    whole = tables.update([decode([5, 6])], [1])
    assert whole is not None
    assert (whole.places.tolist(), whole.block_ids.tolist()) == ([8, 9], [5, 6])
    assert tables.update([decode([5, 6])], [1]) is None
    grown = tables.update([decode([5, 6, 7])], [1])
    assert grown is not None
    assert (grown.places.tolist(), grown.block_ids.tolist()) == ([10], [7])
    moved = tables.update([decode([5, 2, 7])], [1])
    assert moved is not None
    assert moved.block_ids.tolist() == [5, 2, 7]
    tables.forget(1)
    unsure = tables.update([decode([5, 2, 7])], [1])
    assert unsure is not None
    assert unsure.block_ids.tolist() == [5, 2, 7]


tables_of_rows = st.lists(
    st.dictionaries(st.integers(0, NUM_ROWS - 1), st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1),
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(tables_of_rows)
def test_the_devices_tables_are_the_hosts(steps: list[dict[int, list[int]]]) -> None:
    device, known = HostDevice(), BlockTableRows(NUM_ROWS, max_blocks=6)
    batch = PersistentBatch(NUM_ROWS, 6, torch.device("cpu"))
    for step in steps:
        changes = known.update([decode(block_ids) for block_ids in step.values()], list(step))
        if changes is not None:
            batch.write_tables(changes, device)
        for row, block_ids in step.items():
            assert batch.block_tables[row, : len(block_ids)].tolist() == block_ids
