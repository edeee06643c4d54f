"""BestLender: a node's answer to whoever wants to borrow, from its device or from its host tier, whichever holds more."""

from collections.abc import Callable, Sequence

from kv_transfer.exchange import KVExchange
from kv_transfer.lending.lender import NOTHING
from protocol.ids import BlockHash
from protocol.transfer import BorrowPrefix, PrefixLent, ReleaseLease


class BestLender:
    """`num_held(block_hashes)`: how many leading blocks the host tier may be able to lend, by a glance.

    The device is asked first: what it holds costs nothing to lend. The host tier's ticket names its own control URL, which
    readers follow. A reader that wants more than it was lent asks again for the rest, so that a prefix whose head is on
    the device, and whose tail is not, comes whole.
    """

    def __init__(
        self, device: KVExchange, host: KVExchange, block_size: int, num_held: Callable[[Sequence[BlockHash]], int]
    ) -> None:
        self._device = device
        self._host = host
        self._block_size = block_size
        self._num_held = num_held

    async def lend(self, message: BorrowPrefix) -> PrefixLent:
        lent = await self._device.lender.lend(message)
        other = NOTHING
        try:
            num_near = self._num_held([BlockHash(block_hash) for block_hash in message.block_hashes])
            if num_near * self._block_size > _num_tokens(lent):
                other = await self._host.lender.lend(message)
        except BaseException:  # a cancel is heard there too, and then nobody hears of either loan
            _give_back(self._device, lent)
            raise
        if _num_tokens(other) > _num_tokens(lent):
            _give_back(self._device, lent)
            return other
        _give_back(self._host, other)
        return lent


def _num_tokens(lent: PrefixLent) -> int:
    return 0 if lent.ticket is None else lent.ticket.num_tokens


def _give_back(owner: KVExchange, lent: PrefixLent) -> None:
    if lent.ticket is not None:
        owner.exports.release(ReleaseLease(lent.ticket.ticket_id, lent.ticket.incarnation))
