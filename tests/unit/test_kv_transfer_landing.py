"""The reader believes what the owner says only as far as the ticket allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.landing import Landing, Piece
from protocol.errors import ChecksumMismatch, TransferError
from protocol.transfer import BlocksReady


@given(st.integers(1, 40), st.data())
def test_every_block_lands_once_in_its_place_in_any_order(num_blocks: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, num_blocks))
    local = [1000 + index for index in range(num_blocks)]
    landing = Landing(local, cached)
    landed: dict[int, int] = {}
    moving: list[Piece] = []
    while not landing.complete:
        can = {
            "announce": landing.num_announced < num_blocks,
            "take": landing.num_taken < landing.num_announced,
            "prove": bool(moving),
        }
        match data.draw(st.sampled_from([action for action, possible in can.items() if possible])):
            case "announce":
                first = landing.num_announced
                ids = tuple(range(first, first + data.draw(st.integers(1, num_blocks - first))))
                landing.announce(BlocksReady(first, ids, ids))
            case "take":
                moving.append(landing.take(data.draw(st.integers(1, 8))))
            case "prove":
                piece = moving.pop(data.draw(st.integers(0, len(moving) - 1)))
                landed |= dict(zip(piece.remote_ids, piece.local_ids, strict=True))
                landing.prove(piece, piece.num_blocks)
        assert all(index in landed for index in range(cached, landing.num_valid_blocks))
    assert landed == {index: 1000 + index for index in range(cached, num_blocks)}
    assert landing.num_taken == num_blocks


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
    first, rest = landing.take(1), landing.take(8)
    assert (rest.first_block, rest.remote_ids, rest.local_ids) == (2, (6, 7), (12, 13))
    with pytest.raises(ChecksumMismatch, match="block 3 of 4"):
        landing.prove(rest, 1)
    assert landing.num_valid_blocks == 1, "the one in between is not proven yet"
    landing.prove(first, 1)
    assert landing.num_valid_blocks == 3
