"""Two processes on one GPU hand KV to each other over NIXL: read where it lies (CUDA IPC), and through pinned host memory.

A stand-in for the GPU proves the same two processes everywhere; what needs a real one is skipped without.
"""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Literal

import pytest
import torch

from engine.cuda.cuda_device import CudaDevice
from engine.cuda.device import Device, HostDevice
from engine.cuda.device_blocks import DeviceBlocks
from kv_transfer.memory.device_blocks import open_staging
from kv_transfer.memory.staging import Staging
from protocol.transfer import TransferTicket
from runtime.node_config import TransferOptions
from tests.support.kv_owner import LAYOUT, running_owner
from tests.support.kv_reader import ReaderNode, running_reader

NUM_BLOCKS, NUM_SCRATCH_BLOCKS = 256, 2
NUM_MOVED = 200
REPLY_TIMEOUT_S = 60.0

Way = Literal["direct", "staged"]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="two processes share a GPU, and there is none here"
)
CASES = [
    pytest.param("cpu", "staged", id="stand-in, staged"),
    pytest.param("cuda", "staged", id="GPU, staged", marks=needs_gpu),
    pytest.param("cuda", "direct", id="GPU, direct", marks=needs_gpu),
]


def device_blocks(kind: str, seed: int) -> DeviceBlocks:
    """Filled with noise that only the seed decides."""
    device: Device = CudaDevice() if kind == "cuda" else HostDevice(late=True)
    noise = torch.randint(0, 256, (NUM_BLOCKS + NUM_SCRATCH_BLOCKS, LAYOUT.block_bytes), generator=generator(seed))
    return DeviceBlocks(noise.to(torch.uint8).to(device.torch_device), NUM_SCRATCH_BLOCKS, device)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def staging_of(blocks: DeviceBlocks, way: Way) -> Staging:
    options = TransferOptions(device_memory=way, staging_memory=f"{16 * LAYOUT.block_bytes}")
    staging, _ = open_staging(blocks, options, lambda arena: arena)
    return staging


def owner_process(pipe: Connection, kind: str, way: Way) -> None:
    """Exports the blocks that it is asked for, until it is told to end."""

    async def serve() -> None:
        async with running_owner("nixl", staging=staging_of(device_blocks(kind, 1), way)) as owner:
            pipe.send(owner.hand_off("req-1", NUM_MOVED * LAYOUT.block_size, list(range(NUM_MOVED))))
            await asyncio.to_thread(pipe.recv)
            pipe.send(owner.exports.stats().num_released)

    asyncio.run(serve())


@pytest.fixture
async def owner(kind: str, way: Way) -> AsyncIterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=owner_process, args=(theirs, kind, way), daemon=True)
    process.start()
    theirs.close()
    yield ours
    await asyncio.to_thread(process.join, REPLY_TIMEOUT_S)
    ours.close()
    assert process.exitcode == 0


async def reply(pipe: Connection) -> object:
    assert await asyncio.to_thread(pipe.poll, REPLY_TIMEOUT_S), "the owner does not answer"
    return pipe.recv()


async def fetch(reader: ReaderNode, ticket: TransferTicket) -> None:
    await reader.importer.fetch(ticket, list(range(NUM_BLOCKS - NUM_MOVED, NUM_BLOCKS)), 0, 30.0)


@pytest.mark.parametrize(("kind", "way"), CASES)
async def test_blocks_arrive_on_the_other_process_s_side_of_the_gpu(kind: str, way: Way, owner: Connection) -> None:
    taken, expected = device_blocks(kind, 2), device_blocks(kind, 1).memory.cpu()[:NUM_MOVED]
    before = taken.memory.cpu()[: NUM_BLOCKS - NUM_MOVED]
    ticket = await reply(owner)
    assert isinstance(ticket, TransferTicket)
    async with running_reader("nixl", staging=staging_of(taken, way)) as reader:
        await fetch(reader, ticket)
        assert torch.equal(taken.memory.cpu()[NUM_BLOCKS - NUM_MOVED : NUM_BLOCKS], expected)
        assert torch.equal(taken.memory.cpu()[: NUM_BLOCKS - NUM_MOVED], before)
    owner.send("end")
    assert await reply(owner) == 1
