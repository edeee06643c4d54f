"""Memory that is used again, or would be taken away, while a peer reads it, against real NIXL: bytes that are not what
was exported never count as such, and no address that a peer may still hold stops being mapped."""

import asyncio
import contextlib
import random
import signal

import pytest

from tests.support.failure_table import BASELINE_S, Case, pull_only
from tests.support.kv_commands import LARGE_BLOCKS, NodeSpec

ALL_BLOCKS = list(range(64))
BACKWARDS = ALL_BLOCKS[::-1]
REUSED = 0xEE
"""What kv_commands paints over blocks that are used again."""

NUM_STORMS = 12


@pull_only
@pytest.mark.failure("F5 mode 2 blocks used again before they are read")
async def test_blocks_used_again_are_noticed(case: Case) -> None:
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for num_good in (0, 3, 7):
            ticket = await owner.hand_off(f"reused-{num_good}", list(range(8)))
            await owner.ask("announced", ticket)
            await owner.ask("paint", [num_good], REUSED)
            outcome = await reader.fetch(ticket, list(range(8, 16)))
            case.saw(outcome)
            assert (outcome.error, outcome.num_valid) == ("checksum_mismatch", num_good)
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("F5 mode 2 blocks used again while they are read")
async def test_blocks_used_again_under_a_reader_are_noticed(case: Case) -> None:
    """An owner that breaks its word at any moment of a read: every block that counts as valid is right."""
    generator = random.Random(2)
    spec = NodeSpec("owner", layout=LARGE_BLOCKS)
    async with case.node(NodeSpec("reader", layout=LARGE_BLOCKS)) as reader, case.node(spec) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for number in range(NUM_STORMS):
            await owner.ask("paint", ALL_BLOCKS, number)
            expected = await owner.digests(ALL_BLOCKS)
            ticket = await owner.hand_off(f"storm-{number}", ALL_BLOCKS)
            await owner.ask("announced", ticket)
            fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
            await asyncio.sleep(generator.random() * 0.02)
            await owner.ask("paint", ALL_BLOCKS[::7], REUSED)
            outcome = await fetching
            case.saw(outcome)
            assert outcome.error in (None, "checksum_mismatch")
            arrived = BACKWARDS[: outcome.num_valid]
            assert await reader.digests(arrived) == expected[: outcome.num_valid]
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("mode 2 lease expires while the reader stands still in a read")
async def test_a_reader_that_slept_through_its_lease_gets_nothing_wrong(case: Case) -> None:
    owner_spec = NodeSpec("owner", layout=LARGE_BLOCKS, lease_s=0.5)
    async with case.node(NodeSpec("reader", layout=LARGE_BLOCKS)) as reader, case.node(owner_spec) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        expected = await owner.digests(ALL_BLOCKS)
        await owner.ask("reuse_released_blocks")
        ticket = await owner.hand_off("slept", ALL_BLOCKS)
        await reader.ask("strike", reader.pid, signal.SIGSTOP, BACKWARDS[1])
        fetching = asyncio.create_task(reader.fetch(ticket, BACKWARDS))
        with contextlib.suppress(TimeoutError):  # a push that has not ended keeps its blocks, lease or no lease
            async with asyncio.timeout(2 * owner.spec.lease_s):
                while "slept" not in await owner.ask("released"):
                    await asyncio.sleep(0.02)
        reader.thaw()
        outcome = await fetching
        case.saw(outcome)
        assert outcome.error in (None, "checksum_mismatch", "lease_expired", "transfer_timeout", "peer_lost")
        assert await reader.digests(BACKWARDS[: outcome.num_valid]) == expected[: outcome.num_valid]
        await reader.ask("settle", ticket.ticket_id)
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pull_only
@pytest.mark.failure("F6 mode 10 reads of memory that is no longer lent")
async def test_memory_that_was_lent_stays_mapped(case: Case) -> None:
    """A peer with an old address can read, but gets no hold on the owner: it lives, and its arena stays where it is."""
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner", lease_s=0.3)) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        mapping = await owner.ask("mapping")
        released = await owner.hand_off("released", [0, 1])
        await owner.ask("release", released.ticket_id, released.incarnation)
        await owner.hand_off("expired", [2, 3])
        await owner.ask("open", "failed", 2)
        await owner.ask("publish", "failed", 0, [4, 5])
        await owner.ask("fail", "failed")
        async with asyncio.timeout(BASELINE_S):
            while (await owner.ask("endings"))["expired"] == 0:
                await asyncio.sleep(0.02)
        assert await owner.ask("mapping") == mapping
        introduction = await owner.ask("introduction")
        await reader.ask("read_unasked", introduction, list(range(6)), list(range(10, 16)))
        assert await reader.digests(list(range(10, 16))) == await owner.digests(list(range(6)))
        case.saw("memory still mapped")
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)
