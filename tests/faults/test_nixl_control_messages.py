"""Control messages that get lost, repeated, reordered, cut short or never answered, and endings that race each other,
against real NIXL: the right bytes or a typed error in time; every export ends once, and every block is free again."""

import asyncio
import itertools
import random
import signal

import msgspec
import pytest

from protocol.transfer import BlocksReady, HandoffMessage, PrefillDone, TransferTicket
from protocol.wire import decode, encode
from tests.support.control_proxy import ControlProxy, Cut, EditFrame, Tamper, control_proxy
from tests.support.failure_table import BASELINE_S, Case, pull_only
from tests.support.kv_commands import LARGE_BLOCKS, NodeSpec, Outcome
from tests.support.kv_process import NodeProcess

HANDOFF, HELLO, CONNECT = "/kv/handoff", "/kv/hello", "/kv/connect"
RENEW, RELEASE = "/kv/renew", "/kv/release"
REMOTE, LOCAL = [7, 3, 4, 5, 60, 61], [10, 11, 12, 13, 1, 2]
NUM_RACES = 40


def parsed(frame: bytes) -> HandoffMessage:
    message: HandoffMessage = decode(frame, HandoffMessage)
    return message


def announces(frame: bytes) -> bool:
    message = parsed(frame)
    return isinstance(message, BlocksReady) and bool(message.block_ids)


def swap_announcements() -> EditFrame:
    """Every announcement waits for the one after it."""
    held: list[bytes] = []

    def edit(index: int, frame: bytes) -> list[bytes]:
        if not announces(frame):
            return [frame]
        held.append(frame)
        return [held.pop(), held.pop()] if len(held) == 2 else []

    return edit


def lose_first_announcement() -> EditFrame:
    lost: list[bytes] = []

    def edit(index: int, frame: bytes) -> list[bytes]:
        if announces(frame) and not lost:
            lost.append(frame)
            return []
        return [frame]

    return edit


def repeat_announcements(index: int, frame: bytes) -> list[bytes]:
    return [frame, frame] if announces(frame) else [frame]


def lose_last_word(index: int, frame: bytes) -> list[bytes]:
    return [] if isinstance(parsed(frame), PrefillDone) else [frame]


def cut_before_last_word(index: int, frame: bytes) -> list[bytes]:
    if isinstance(parsed(frame), PrefillDone):
        raise Cut
    return [frame]


def announce(**changes: object) -> EditFrame:
    """The first announcement, changed."""

    def edit(index: int, frame: bytes) -> list[bytes]:
        return [encode(msgspec.structs.replace(parsed(frame), **changes))] if announces(frame) else [frame]

    return edit


FAILED = {"transfer_failed"}
LOST = {"peer_lost"}
NO_HARM: set[str | None] = {None}


def handoff_tampers() -> list[tuple[EditFrame, set[str]]]:
    """Anew for every use: some remember what they have seen. With what a fetch then ends."""
    return [
        (repeat_announcements, FAILED),
        (lose_first_announcement(), FAILED),
        (swap_announcements(), FAILED),
        (lose_last_word, LOST),
        (cut_before_last_word, LOST),
        (announce(block_ids=(1, 2, 1000)), FAILED),
        (announce(block_ids=(1 << 23, 1, 2)), FAILED),
        (announce(block_ids=(1, 1, 1)), {"checksum_mismatch"}),
        (announce(block_ids=(1, 2)), FAILED),
        (announce(block_ids=tuple(range(40)), checksums=tuple(range(40))), FAILED),
        (announce(block_ids=(-1, 1, 2)), FAILED),
        (announce(checksums=(1, 2, 3)), {"checksum_mismatch"}),
        (announce(checksums=(-1, 2, 3)), FAILED),
        (announce(first_block=1), FAILED),
        (lambda index, frame: [b"\xc1garbage"], FAILED),
        (lambda index, frame: [frame[:-1]], FAILED),
    ]


CALL_TAMPERS: list[tuple[str, Tamper, set[str | None]]] = [
    (RELEASE, Tamper(repeat=3), NO_HARM),
    (RELEASE, Tamper(lose_reply=True, times=1), NO_HARM),
    (RELEASE, Tamper(lose_request=True, times=2), NO_HARM),
    (RENEW, Tamper(lose_request=True), NO_HARM),
    (RENEW, Tamper(lose_reply=True), NO_HARM),
    (RENEW, Tamper(repeat=5), NO_HARM),
]


async def slow_hand_off(owner: NodeProcess, request_id: str) -> TransferTicket:
    """In two announcements."""
    ticket: TransferTicket = await owner.ask("open", request_id, len(REMOTE))
    await owner.ask("publish", request_id, 0, REMOTE[:3])
    await owner.ask("publish", request_id, 3, REMOTE[3:])
    return ticket


async def fetch_through(proxy: ControlProxy, reader: NodeProcess, owner: NodeProcess, request_id: str) -> Outcome:
    """A hand-off of two announcements, the second of which the reader awaits."""
    ticket: TransferTicket = await owner.ask("open", request_id, len(REMOTE))
    await owner.ask("publish", request_id, 0, REMOTE[:3])
    fetching = asyncio.create_task(reader.fetch(proxy.through(ticket), LOCAL))
    await asyncio.sleep(0.05)
    await owner.ask("publish", request_id, 3, REMOTE[3:])
    await owner.ask("finish", request_id)
    outcome = await fetching
    if outcome.error is None:
        assert await reader.digests(LOCAL) == await owner.digests(REMOTE)
    await reader.ask("settle", ticket.ticket_id)
    return outcome


async def all_exports_ended(owner: NodeProcess, request_ids: list[str]) -> dict[str, int]:
    """Waits until each is the owner's again; each exactly once."""
    async with asyncio.timeout(BASELINE_S):
        while (endings := await owner.ask("endings"))["open"]:
            await asyncio.sleep(0.02)
    released = await owner.ask("released")
    assert sorted(name for name in released if name in request_ids) == sorted(request_ids)
    found: dict[str, int] = endings
    return found


@pytest.mark.failure("mode 11 mode 15 announcements lost, repeated, reordered, cut, forged")
async def test_a_tampered_hand_off_is_refused(case: Case) -> None:
    async with (
        case.node(NodeSpec("reader")) as reader,
        case.node(NodeSpec("owner")) as owner,
        control_proxy(owner.port) as proxy,
    ):
        await fetch_through(proxy, reader, owner, "first")
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        tampers = handoff_tampers()
        for number, (edit, expected) in enumerate(tampers):
            proxy.tamper(HANDOFF, Tamper(edit_frame=edit))
            outcome = await fetch_through(proxy, reader, owner, f"tampered-{number}")
            case.saw(outcome)
            may_be_right = {None} if case.direction == "push" else set()  # which needs no block ids of the owner's
            assert outcome.error in expected | may_be_right, f"{number}: {outcome}"
            proxy.clear()
            assert (await fetch_through(proxy, reader, owner, f"after-{number}")).error is None
        names = [f"{what}-{number}" for what in ("tampered", "after") for number in range(len(tampers))]
        await all_exports_ended(owner, names)
        await case.check_nothing_leaked(before, files=6)
        await case.check_alive(reader, owner)


@pull_only
@pytest.mark.failure("mode 11 releases and renewals lost and repeated")
async def test_lost_and_repeated_calls_do_no_harm(case: Case) -> None:
    async with (
        case.node(NodeSpec("reader")) as reader,
        case.node(NodeSpec("owner", lease_s=0.3)) as owner,
        control_proxy(owner.port) as proxy,
    ):
        await case.check_usable(reader, owner)
        await fetch_through(proxy, reader, owner, "first")
        before = [(node, await node.resources()) for node in (reader, owner)]
        for number, (path, tamper, expected) in enumerate(CALL_TAMPERS):
            proxy.tamper(path, tamper)
            outcome = await fetch_through(proxy, reader, owner, f"tampered-{number}")
            case.saw(outcome)
            assert outcome.error in expected, f"{number}: {outcome}"
            proxy.clear()
        ended = await all_exports_ended(owner, [f"tampered-{number}" for number in range(len(CALL_TAMPERS))])
        assert ended["expired"] == 0
        proxy.tamper(RELEASE, Tamper(lose_request=True))
        case.saw(await fetch_through(proxy, reader, owner, "never-released"))
        assert (await all_exports_ended(owner, ["never-released"]))["expired"] == 1
        proxy.clear()
        await case.check_usable(reader, owner, "usable")
        await case.check_nothing_leaked(before, files=6)
        await case.check_alive(reader, owner)


@pull_only
@pytest.mark.failure("mode 3 nobody comes for the blocks, or the reader dies before they are there")
async def test_blocks_that_nobody_fetches_are_the_owners_again(case: Case) -> None:
    async with case.node(NodeSpec("owner", lease_s=0.4)) as owner, case.node(NodeSpec("reader")) as reader:
        await case.check_usable(reader, owner)
        before = await owner.resources()
        await owner.hand_off("forgotten", [0, 1])
        refused = await owner.hand_off("refused", [2, 3])
        assert await owner.ask("release", refused.ticket_id, refused.incarnation)
        assert not await owner.ask("release", refused.ticket_id, refused.incarnation)
        async with case.node(NodeSpec("reader")) as doomed:
            ticket = await owner.ask("open", "orphaned", 4)
            await owner.ask("publish", "orphaned", 0, [4, 5])
            fetching = asyncio.create_task(doomed.fetch(ticket, [0, 1, 2, 3]))
            await asyncio.sleep(0.1)
            await doomed.kill()
            with pytest.raises(EOFError):
                await fetching
        await owner.ask("publish", "orphaned", 2, [6, 7])
        await owner.ask("finish", "orphaned")
        ended = await all_exports_ended(owner, ["forgotten", "refused", "orphaned"])
        case.saw(f"{ended['expired']} leases expired")
        assert ended["expired"] == 2
        await case.check_usable(reader, owner, "usable")
        await case.check_nothing_leaked([(owner, before)])
        await case.check_alive(owner, reader)


@pytest.mark.failure("mode 4 mode 13 owner accepts and never answers")
async def test_an_owner_that_never_answers_is_given_up(case: Case) -> None:
    async with (
        case.node(NodeSpec("reader")) as reader,
        case.node(NodeSpec("owner")) as owner,
        control_proxy(owner.port) as proxy,
    ):
        await case.check_usable(reader, owner)
        await fetch_through(proxy, reader, owner, "first")
        before = await reader.resources()
        for cancelled, path in itertools.product((False, True), (HANDOFF, HELLO, CONNECT)):
            async with control_proxy(owner.port) as silent:  # at an address that the reader has not met
                silent.tamper(path, Tamper(hang=True))
                ticket = await owner.hand_off(f"silent-{path}-{cancelled}", REMOTE)
                fetching = asyncio.create_task(reader.fetch(silent.through(ticket), LOCAL))
                if cancelled:
                    await asyncio.sleep(0.1)
                    await reader.ask("cancel", ticket.ticket_id)
                outcome = await fetching
                case.saw(outcome)
                assert outcome.error in ({"cancelled"} if cancelled else {"transfer_timeout", "peer_lost"}), outcome
                await reader.ask("settle", ticket.ticket_id)
                await reader.ask("paint", LOCAL, 0x5A)
                await owner.ask("release", ticket.ticket_id, ticket.incarnation)
        await case.check_usable(reader, owner, "usable")
        assert await reader.ask("painted", LOCAL, 0x5A)
        await case.check_nothing_leaked([(reader, before)], files=6)
        await case.check_alive(reader, owner)


@pytest.mark.failure("mode 12 finish, fail, release, expire and cancel in any order")
async def test_endings_may_race(case: Case) -> None:
    generator = random.Random(12)
    async with (
        case.node(NodeSpec("reader")) as reader,
        case.node(NodeSpec("owner", lease_s=0.5)) as owner,
    ):
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        expected = await owner.digests(REMOTE)
        for number in range(NUM_RACES):
            request_id = f"race-{number}"
            ticket = await slow_hand_off(owner, request_id)
            key = (ticket.ticket_id, ticket.incarnation)
            fetching = asyncio.create_task(reader.fetch(ticket, LOCAL))
            await asyncio.sleep(generator.choice((0.0, 0.002, 0.01, 0.03)))
            acts = [
                owner.ask("finish", request_id),
                owner.ask("fail", request_id),
                owner.ask("release", *key),
                owner.ask("renew", *key),
                owner.ask("reap"),
                reader.ask("cancel", ticket.ticket_id),
                asyncio.sleep(0.6 if number % 8 == 0 else 0.0),  # past the end of the lease
            ]
            chosen = generator.sample(range(len(acts)), generator.randrange(2, len(acts) + 1))
            for index, act in enumerate(acts):
                if index not in chosen:
                    act.close()
            await asyncio.gather(*(acts[index] for index in chosen))
            await owner.ask("fail", request_id)
            outcome = await fetching
            case.saw(outcome)
            if outcome.error is None:
                assert await reader.digests(LOCAL) == expected
            await reader.ask("settle", ticket.ticket_id)
        await all_exports_ended(owner, [f"race-{number}" for number in range(NUM_RACES)])
        await case.check_usable(reader, owner, "usable")
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pytest.mark.failure("mode 14 several owners, one of them killed")
async def test_one_of_several_owners_fails_alone(case: Case) -> None:
    specs = [NodeSpec("owner", seed=seed, layout=LARGE_BLOCKS) for seed in (1, 2)]
    blocks = list(range(32))
    odd, even = list(range(1, 64, 2)), list(range(0, 64, 2))
    async with (
        case.node(NodeSpec("reader", layout=LARGE_BLOCKS)) as reader,
        case.node(specs[0]) as doomed,
        case.node(specs[1]) as healthy,
    ):
        await case.check_usable(reader, doomed)
        before = await reader.resources()
        await case.check_usable(reader, healthy)
        expected = await healthy.digests(blocks)
        unfinished = await doomed.ask("open", "shared", len(blocks))  # so that it is not over before the blow falls
        await doomed.ask("publish", "shared", 0, blocks[:-1])
        finished = await healthy.hand_off("shared", blocks)
        await reader.ask("strike", doomed.pid, signal.SIGKILL, odd[5])
        failed, arrived = await asyncio.gather(reader.fetch(unfinished, odd), reader.fetch(finished, even))
        case.saw(failed)
        case.saw(arrived)
        assert failed.error == "peer_lost"
        assert arrived.error is None
        await reader.ask("settle", unfinished.ticket_id)
        await reader.ask("paint", odd, 0x5A)
        await asyncio.sleep(0.1)
        assert await reader.digests(even) == expected
        assert await reader.ask("painted", odd, 0x5A)
        await case.check_usable(reader, healthy, "usable")
        await case.check_nothing_leaked([(reader, before)])
        await case.check_alive(reader, healthy)
