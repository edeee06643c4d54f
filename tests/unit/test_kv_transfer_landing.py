"""The reader believes what the owner says only as far as the ticket allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.landing import Landing
from protocol.errors import ChecksumMismatch, TransferError
from protocol.transfer import BlocksReady


@given(st.integers(1, 40), st.data())
def test_every_block_lands_once_in_its_place(num_blocks: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, num_blocks))
    local = [1000 + index for index in range(num_blocks)]
    landing = Landing(local, cached)
    landed: dict[int, int] = {}
    while not landing.complete:
        if landing.num_announced < num_blocks and data.draw(st.booleans()):
            first = landing.num_announced
            count = data.draw(st.integers(0, num_blocks - first))
            ids = tuple(first + offset for offset in range(count))
            landing.announce(BlocksReady(first, ids, ids))
        batch = landing.next_batch(data.draw(st.integers(1, 8)))
        if batch is not None:
            landed |= dict(zip(batch.remote_ids, batch.local_ids, strict=True))
            landing.landed(batch, len(batch.local_ids))
        elif landing.num_announced < num_blocks:
            first = landing.num_announced
            landing.announce(BlocksReady(first, (first,), (first,)))
    assert landed == {index: 1000 + index for index in range(cached, num_blocks)}
    assert landing.next_batch(1) is None


@pytest.mark.parametrize(
    "message",
    [
        BlocksReady(0, (7,), (1,)),
        BlocksReady(2, (7,), (1,)),
        BlocksReady(1, (7, 8), (1,)),
        BlocksReady(1, (7, 8, 9, 10), (1, 2, 3, 4)),
    ],
    ids=["repeated", "gap", "fewer checksums", "too many"],
)
def test_announcements_that_cannot_be_true_are_refused(message: BlocksReady) -> None:
    landing = Landing([0, 1, 2, 3], 1)
    with pytest.raises(TransferError):
        landing.announce(message)
    assert landing.num_announced == 1


def test_blocks_before_a_damaged_one_count() -> None:
    landing = Landing([10, 11, 12, 13], 1)
    landing.announce(BlocksReady(1, (5, 6, 7), (50, 60, 70)))
    batch = landing.next_batch(8)
    assert batch is not None
    with pytest.raises(ChecksumMismatch, match="block 2 of 4"):
        landing.landed(batch, 1)
    assert landing.num_valid_blocks == 2
