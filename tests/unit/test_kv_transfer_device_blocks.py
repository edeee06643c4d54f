"""How a node's KV gets to its transports: in place where they reach it, else through bounded host memory."""

import gc
from collections.abc import AsyncIterator

import pytest

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.device_arena import Arena, DeviceArena
from kv_transfer.memory.device_blocks import num_staging_blocks, open_staging
from kv_transfer.memory.device_staging import DeviceStaging
from kv_transfer.memory.staging import HostStaging, InPlaceStaging
from kv_transfer.transport import Transport
from kv_transfer.transports.factory import make_transport
from protocol.errors import ConfigError
from protocol.ids import new_incarnation
from protocol.transfer import TransportKind
from runtime.node_config import TransferOptions
from tests.support.fake_device import FakeDeviceBlocks

BLOCK_BYTES = 512


class Opener:
    """Opens real transports of one kind over whatever it is given."""

    def __init__(self, kind: TransportKind) -> None:
        self.kind = kind
        self.opened: list[Transport] = []

    def __call__(self, arena: Arena) -> Transport:
        transport = make_transport(self.kind, arena, incarnation=new_incarnation(), host="127.0.0.1")
        self.opened.append(transport)
        return transport


@pytest.fixture(params=["nixl", "shm", "tcp"])
async def opener(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    made = Opener(request.param)
    yield made
    for transport in made.opened:
        await transport.close()


async def test_a_host_arena_is_served_as_it_is(opener: Opener) -> None:
    with HostArena(4, BLOCK_BYTES) as arena:
        staging, transport = open_staging(arena, TransferOptions(), opener)
        assert isinstance(staging, HostStaging)
        assert staging.arena is arena
        await transport.close()
        await staging.close()


@pytest.mark.parametrize("wanted", ["auto", "staged"])
async def test_what_does_not_reach_the_device_gets_staging_memory(opener: Opener, wanted: str) -> None:
    """NIXL's own library says that this is no GPU's memory; the others know without asking."""
    options = TransferOptions(device_memory=wanted, staging_memory="16KiB")  # type: ignore[arg-type]
    staging, transport = open_staging(FakeDeviceBlocks(100, 2, BLOCK_BYTES), options, opener)
    assert isinstance(staging, DeviceStaging)
    assert (staging.arena.num_blocks, staging.arena.block_bytes) == (32, BLOCK_BYTES)
    assert staging.arena.num_scratch_blocks >= 2
    assert opener.opened == [transport]
    await transport.close()
    await staging.close()
    staging.arena.close()


async def test_direct_or_nothing(opener: Opener) -> None:
    options = TransferOptions(device_memory="direct")
    with pytest.raises(ConfigError, match="GPU") as refused:
        open_staging(FakeDeviceBlocks(8, 2, BLOCK_BYTES), options, opener)
    assert refused.value.param == "transfer.device_memory"
    assert opener.opened == []
    del refused
    gc.collect()  # the error's traceback holds the agent that was refused the memory


async def test_what_reaches_the_device_works_on_its_memory() -> None:
    blocks = FakeDeviceBlocks(8, 2, BLOCK_BYTES)
    blocks.memory[3] = 7
    staging, arena = open_staging(blocks, TransferOptions(), lambda arena: arena)
    assert isinstance(arena, DeviceArena)
    assert isinstance(staging, InPlaceStaging)
    assert (arena.address, arena.size_bytes) == (blocks.memory.data_ptr(), 10 * BLOCK_BYTES)
    assert (arena.memory_kind, arena.num_blocks, arena.num_wire_blocks) == ("cuda", 8, 10)
    assert (await staging.stage([3, 0])).checksums == blocks.sums([3, 0])
    assert await staging.land([3, 0], [3, 0], [*blocks.sums([3]), 1]) == 1
    await staging.close()


def test_memory_that_cannot_be_pinned_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="no more memory may be locked") as refused:
        open_staging(
            FakeDeviceBlocks(8, 2, BLOCK_BYTES, pins=False),
            TransferOptions(device_memory="staged"),
            lambda arena: arena,
        )
    assert refused.value.param == "transfer.staging_memory"


@pytest.mark.parametrize(
    ("setting", "block_bytes", "expected"),
    [
        ("auto", 1 << 20, 64),
        ("auto", 8 << 20, 32),
        ("auto", 200 << 20, 4),
        ("1GiB", 8 << 20, 128),
        ("32MiB", 8 << 20, 4),
    ],
)
def test_how_much_staging_memory(setting: str, block_bytes: int, expected: int) -> None:
    assert num_staging_blocks(setting, block_bytes) == expected


@pytest.mark.parametrize("setting", ["31MiB", "1KiB"])
def test_too_little_staging_memory_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="need 4 at least") as refused:
        num_staging_blocks(setting, 8 << 20)
    assert refused.value.param == "transfer.staging_memory"
