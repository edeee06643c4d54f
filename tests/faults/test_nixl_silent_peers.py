"""Nodes that stand still or cannot be reached, and transfers that are given up, against real NIXL: nobody waits beyond
the deadline, no byte lands late in a block that is used again, and everything goes on when the silence ends."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from tests.support.failure_table import Case
from tests.support.kv_commands import LARGE_BLOCKS, NodeSpec
from tests.support.kv_process import NodeProcess
from tests.support.network import PrivateNetwork, private_network, why_no_private_network

ALL_BLOCKS = list(range(64))
BACKWARDS = ALL_BLOCKS[::-1]
OWNER = NodeSpec("owner", layout=LARGE_BLOCKS)
READER = NodeSpec("reader", layout=LARGE_BLOCKS)
LATE_S = 0.3
"""How long bytes get to land late."""


async def stopped_while_read(reader: NodeProcess, owner: NodeProcess, case: Case, request_id: str = "stopped") -> str:
    """The owner stops at the moment when its block 10 begins to arrive. The ticket id of the fetch, which has ended."""
    ticket = await owner.hand_off(request_id, ALL_BLOCKS)
    await reader.ask("strike", owner.pid, signal.SIGSTOP, BACKWARDS[10])
    outcome = await reader.fetch(ticket, BACKWARDS)
    case.saw(outcome)
    assert outcome.error in (None, "transfer_timeout")  # with CMA the kernel may have read on without the owner
    return str(ticket.ticket_id)


async def assert_nothing_lands_late(reader: NodeProcess, blocks: list[int]) -> None:
    await reader.ask("paint", blocks, 0x5A)
    await asyncio.sleep(LATE_S)
    assert await reader.ask("painted", blocks, 0x5A), "bytes landed in blocks that were used again"


@pytest.mark.failure("F7 mode 6 owner stopped while it is read")
async def test_a_stopped_owner_is_given_up_in_time_and_works_on_when_it_wakes(case: Case) -> None:
    async with case.node(READER) as reader, case.node(OWNER) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        ticket_id = await stopped_while_read(reader, owner, case)
        owner.thaw()
        await reader.ask("settle", ticket_id)
        await owner.ask("fail", "stopped")
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F9 mode 1 local blocks used again after a read was given up")
async def test_no_byte_lands_in_blocks_that_settled(case: Case) -> None:
    async with case.node(READER) as reader, case.node(OWNER) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        ticket_id = await stopped_while_read(reader, owner, case)
        quarantined = not await reader.ask("is_settled", ticket_id)
        assert quarantined == ((await reader.resources()).quarantined > 0)
        owner.thaw()
        await reader.ask("settle", ticket_id)
        await assert_nothing_lands_late(reader, ALL_BLOCKS)
        await owner.ask("fail", "stopped")
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F9 mode 1 fetch cancelled while its owner stands still")
async def test_a_cancelled_fetch_keeps_its_blocks_until_they_are_safe(case: Case) -> None:
    async with case.node(READER) as reader, case.node(OWNER) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        ticket = await owner.hand_off("cancelled", ALL_BLOCKS)
        await reader.ask("strike", owner.pid, signal.SIGSTOP, BACKWARDS[10])
        fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
        await asyncio.sleep(0.2)
        await reader.ask("cancel", ticket.ticket_id)
        case.saw(await fetching)
        owner.thaw()
        await reader.ask("settle", ticket.ticket_id)
        await assert_nothing_lands_late(reader, ALL_BLOCKS)
        await owner.ask("fail", "cancelled")
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F9 mode 1 fetches cancelled at many moments")
async def test_fetches_cancelled_at_any_moment_leave_no_late_bytes(case: Case) -> None:
    async with case.node(READER) as reader, case.node(OWNER) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for index in range(8):
            ticket = await owner.hand_off(f"cancelled-{index}", ALL_BLOCKS)
            fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
            await asyncio.sleep(index * 0.003)
            await reader.ask("cancel", ticket.ticket_id)
            case.saw(await fetching)
            await reader.ask("settle", ticket.ticket_id)
            await assert_nothing_lands_late(reader, [0, 20, 53, 63])
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F7 mode 6 one of two owners stopped")
async def test_a_stopped_owner_delays_nobody_else(case: Case) -> None:
    async with (
        case.node(READER) as reader,
        case.node(OWNER) as stopped,
        case.node(NodeSpec("owner", seed=2, layout=LARGE_BLOCKS)) as healthy,
    ):
        await case.check_usable(reader, stopped)
        await case.check_usable(reader, healthy)
        before = await reader.resources()
        ticket = await stopped.hand_off("stopped", ALL_BLOCKS[:32])
        await reader.ask("strike", stopped.pid, signal.SIGSTOP, 5)
        stuck = asyncio.create_task(reader.fetch(ticket, ALL_BLOCKS[:32]))
        await asyncio.sleep(0.1)
        for index in range(3):
            await case.check_usable(reader, healthy, f"beside-{index}")
        case.saw(await stuck)
        stopped.thaw()
        await reader.ask("settle", ticket.ticket_id)
        await case.check_usable(reader, stopped)
        await case.check_nothing_leaked([(reader, before)])
        await case.check_alive(reader, stopped, healthy)


@pytest.fixture
def network() -> Iterator[PrivateNetwork]:
    reason = why_no_private_network()
    if reason is not None:
        pytest.skip(reason)
    with private_network() as made:
        yield made


def over(network: PrivateNetwork, spec: NodeSpec, side: int) -> NodeSpec:
    end = network.ends[side]
    return NodeSpec(
        spec.role,
        layout=spec.layout,
        host=end.address,
        network_namespace=end.namespace,
        environment={"UCX_NET_DEVICES": end.device},
    )


@pytest.mark.failure("F8 mode 6 network cut while it is read, then mended")
async def test_a_partition_is_given_up_in_time_and_heals(case: Case, network: PrivateNetwork) -> None:
    async with (
        case.node(over(network, READER, 0)) as reader,
        case.node(over(network, OWNER, 1)) as owner,
    ):
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for attempt in range(2):
            ticket = await owner.hand_off(f"cut-{attempt}", ALL_BLOCKS)
            fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
            await asyncio.sleep(0.004)
            network.cut()
            outcome = await fetching
            case.saw(outcome)
            assert outcome.error in (None, "transfer_timeout", "peer_lost")
            network.mend()
            await reader.ask("settle", ticket.ticket_id)
            await owner.ask("fail", f"cut-{attempt}")
            await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F8 mode 6 reader ends while the network is cut")
async def test_processes_end_while_the_network_is_cut(case: Case, network: PrivateNetwork) -> None:
    case.leave_out_reads_over_tcp()
    async with case.node(over(network, OWNER, 1)) as owner:
        async with case.node(over(network, READER, 0)) as reader:
            await case.check_usable(reader, owner)
            ticket = await owner.hand_off("cut", ALL_BLOCKS)
            fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
            await asyncio.sleep(0.004)
            network.cut()
            case.saw(await fetching)
            assert await reader.leave() == 0
        network.mend()
        await owner.ask("fail", "cut")
        async with case.node(over(network, READER, 0)) as reader:
            await case.check_usable(reader, owner)
            before = await owner.resources()
            await case.check_usable(reader, owner, "again")
            await case.check_nothing_leaked([(owner, before)])
            await case.check_alive(owner)
