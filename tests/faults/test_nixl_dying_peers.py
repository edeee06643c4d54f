"""Nodes that die, leave or restart while KV moves, against real NIXL: the survivor lives, knows, and works on."""

import asyncio
import contextlib
import dataclasses
import signal

import pytest

from tests.support.failure_table import Case
from tests.support.kv_commands import LARGE_BLOCKS, SMALL_BLOCKS, NodeSpec
from tests.support.kv_process import NodeProcess

ALL_BLOCKS = list(range(64))
BACKWARDS = ALL_BLOCKS[::-1]
"""As the local blocks of a whole arena: no two neighbours merge, so 64 descriptors travel."""

OWNER = NodeSpec("owner", layout=LARGE_BLOCKS)
READER = NodeSpec("reader", layout=LARGE_BLOCKS)

NUM_KILLED_READERS = 25
READERS_AT_ONCE = 5


async def fetch_and_strike(reader: NodeProcess, owner: NodeProcess, strike_at: int, case: Case) -> None:
    """The owner is killed at the moment when its block `strike_at` begins to arrive."""
    ticket = await owner.hand_off("doomed", ALL_BLOCKS)
    unread = await owner.hand_off("unread", [0, 1])
    await reader.ask("strike", owner.pid, signal.SIGKILL, BACKWARDS[strike_at])
    outcome = await reader.fetch(ticket, BACKWARDS)
    await owner.died()
    case.saw(outcome)
    assert outcome.error == "peer_lost"
    await reader.ask("settle", ticket.ticket_id)
    assert (await reader.fetch(unread, [0, 1])).error == "peer_lost"
    assert await reader.ask("num_peers") == 0


@pytest.mark.failure("F1 F2 F3 owner killed while it is read, and restarted at its address")
async def test_an_owner_killed_in_a_read_is_lost_and_found_again(case: Case) -> None:
    async with case.node(READER) as reader:
        before = None
        port = 0
        for life, strike_at in enumerate((0, 20, 40)):
            async with case.node(dataclasses.replace(OWNER, port=port, seed=life)) as owner:
                port = owner.port
                await case.check_usable(reader, owner)
                before = before or await reader.resources()
                await case.check_nothing_leaked([(reader, before)])
                await fetch_and_strike(reader, owner, strike_at, case)
        await case.check_alive(reader)


@pytest.mark.failure("F3 tickets of an owner's earlier life")
async def test_tickets_of_an_earlier_life_are_void(case: Case) -> None:
    async with case.node(NodeSpec("reader")) as reader:
        async with case.node(NodeSpec("owner")) as owner:
            await case.check_usable(reader, owner)
            old = await owner.hand_off("old", [0, 1])
            await owner.kill()
        async with case.node(NodeSpec("owner", port=owner.port, seed=2)) as owner:
            before = await reader.resources()
            outcome = await reader.fetch(old, [0, 1])
            case.saw(outcome)
            assert outcome.error == "lease_expired"
            await case.check_usable(reader, owner)
            await case.check_nothing_leaked([(reader, before)])
            await case.check_alive(reader, owner)


@pytest.mark.failure("F3 the connection breaks, both nodes live")
async def test_a_broken_connection_is_made_anew(case: Case) -> None:
    async with case.node(READER) as reader, case.node(OWNER) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for victim in (reader, owner):
            assert await victim.ask("cut_sockets", [owner.port]) > 0
            outcome = await reader.fetch(await owner.hand_off("broken", ALL_BLOCKS), BACKWARDS)
            case.saw(outcome)
            assert outcome.error in (None, "peer_lost")
            await case.check_usable(reader, owner)
            await owner.ask("reap")
        await case.check_alive(reader, owner)
        await case.check_nothing_leaked(before)


@pytest.mark.failure("F12 reader killed while it reads, 25 times")
async def test_an_owner_survives_readers_that_die_reading(case: Case) -> None:
    """Over TCP the library of the one who is read sends the bytes, and UCX 1.23 crashes if the reader dies while more of
    them wait than the socket takes. So there a reader asks for half a megabyte, not for 32; pushes are safe at any size."""
    layout = SMALL_BLOCKS if (case.transports, case.direction) == ("tcp", "pull") else LARGE_BLOCKS
    spec = NodeSpec("reader", layout=layout, stall_s=5.0)
    async with case.node(NodeSpec("owner", layout=layout)) as owner, case.node(spec) as other:
        await case.check_usable(other, owner)
        before = await owner.resources()

        async def doomed(index: int) -> None:
            async with case.node(spec) as reader:
                ticket = await owner.hand_off(f"doomed-{index}", ALL_BLOCKS)
                await reader.ask("strike", reader.pid, signal.SIGKILL, BACKWARDS[(7 * index) % 60])
                with contextlib.suppress(EOFError):
                    case.saw(await reader.fetch(ticket, BACKWARDS))
                await reader.died()
                await owner.ask("release", ticket.ticket_id, ticket.incarnation)  # as the end of its lease would

        for start in range(0, NUM_KILLED_READERS, READERS_AT_ONCE):
            await asyncio.gather(*(doomed(index) for index in range(start, start + READERS_AT_ONCE)))
        await case.check_alive(owner, other)
        case.saw(await case.check_usable(other, owner))
        await case.check_nothing_leaked([(owner, before)], files=8)  # of 25 dead readers


@pytest.mark.failure("F11 reader gives up its agent while a stopped owner owes it bytes")
async def test_an_owner_survives_a_reader_that_left_while_it_stood_still(case: Case) -> None:
    case.leave_out_reads_over_tcp()
    async with case.node(OWNER) as owner, case.node(READER) as other:
        await case.check_usable(other, owner)
        before = await owner.resources()
        async with case.node(READER) as leaver:
            ticket = await owner.hand_off("left", ALL_BLOCKS)
            await leaver.ask("strike", owner.pid, signal.SIGSTOP, BACKWARDS[10])
            outcome = await leaver.fetch(ticket, BACKWARDS)
            case.saw(outcome)
            assert await leaver.leave() == 0
        owner.thaw()
        await owner.ask("release", ticket.ticket_id, ticket.incarnation)
        await case.check_usable(other, owner)
        await case.check_alive(owner, other)
        await case.check_nothing_leaked([(owner, before)])


@pytest.mark.failure("F13 stopped owner is fenced: killed while it owes bytes")
async def test_a_fenced_owner_frees_the_blocks_that_it_held(case: Case) -> None:
    async with case.node(READER) as reader:
        async with case.node(OWNER) as owner:
            await case.check_usable(reader, owner)
            before = await reader.resources()
            ticket = await owner.hand_off("fenced", ALL_BLOCKS)
            await reader.ask("strike", owner.pid, signal.SIGSTOP, BACKWARDS[10])
            outcome = await reader.fetch(ticket, BACKWARDS)
            case.saw(outcome)
            await owner.kill()
            await reader.ask("settle", ticket.ticket_id)
            await reader.ask("paint", ALL_BLOCKS, 0x5A)
            await asyncio.sleep(0.2)
            assert await reader.ask("painted", ALL_BLOCKS, 0x5A), "bytes of a dead node landed late"
        async with case.node(dataclasses.replace(OWNER, port=owner.port)) as owner:
            await case.check_usable(reader, owner)
            await case.check_nothing_leaked([(reader, before)])
        await case.check_alive(reader)


@pytest.mark.failure("F6 owner leaves in an orderly way while it is read")
async def test_an_owner_that_leaves_takes_no_memory_from_under_its_readers(case: Case) -> None:
    async with case.node(READER) as reader:
        async with case.node(OWNER) as owner:
            await case.check_usable(reader, owner)
            before = await reader.resources()
            ticket = await owner.hand_off("leaving", ALL_BLOCKS)
            await reader.ask("strike", owner.pid, signal.SIGTERM, BACKWARDS[10])
            outcome = await reader.fetch(ticket, BACKWARDS)
            case.saw(outcome)
            assert outcome.error in (None, "peer_lost")
            assert await owner.died() == 0
            await reader.ask("settle", ticket.ticket_id)
        async with case.node(dataclasses.replace(OWNER, port=owner.port)) as owner:
            await case.check_usable(reader, owner)
            await case.check_nothing_leaked([(reader, before)])
        await case.check_alive(reader)
