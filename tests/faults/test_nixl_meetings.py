"""Meetings that go wrong, against real NIXL: damaged, truncated and foreign metadata, owners that answer nonsense or
another version. Each costs the one request, with a typed error, and spoils nothing: the same two nodes then meet."""

import asyncio
import dataclasses
from collections.abc import Callable

import msgspec
import pytest
import xxhash

from protocol.transfer import Introduction
from protocol.wire import WIRE_VERSION, Hello, decode, encode
from tests.support.control_proxy import Tamper, control_proxy
from tests.support.failure_table import Case, pull_only
from tests.support.kv_commands import NodeSpec
from tests.support.kv_owner import LAYOUT

HELLO, CONNECT = "/kv/hello", "/kv/connect"
REMOTE, LOCAL = [7, 3, 4, 5], [10, 11, 12, 13]

Edit = Callable[[bytes], bytes]


def flip(position: float) -> Edit:
    """One bit, this far into the message."""

    def edit(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(position * len(changed))] ^= 0x10
        return bytes(changed)

    return edit


def introduced(**changes: object) -> Edit:
    return lambda content: encode(msgspec.structs.replace(decode(content, Introduction), **changes))


def payload(change: Edit, *, checksum_fits: bool) -> Edit:
    """The transport's own metadata, changed inside a well-formed introduction."""

    def edit(content: bytes) -> bytes:
        peer = decode(content, Introduction)
        endpoints = []
        for endpoint in peer.endpoints:
            changed = change(endpoint.payload)
            checksum = xxhash.xxh3_64_intdigest(changed) if checksum_fits else endpoint.checksum
            endpoints.append(msgspec.structs.replace(endpoint, payload=changed, checksum=checksum))
        return encode(msgspec.structs.replace(peer, endpoints=tuple(endpoints)))

    return edit


def inner(change: Edit) -> Edit:
    """The library's part of the transport's metadata, changed where every checksum of ours fits: what a broken library
    at the other end would send."""

    def edit(content: bytes) -> bytes:
        fields = msgspec.msgpack.decode(content)
        fields["metadata"] = change(fields["metadata"])
        return msgspec.msgpack.encode(fields)

    return payload(edit, checksum_fits=True)


def first_bytes(number: int) -> Edit:
    return lambda content: content[:number]


def hello(**changes: object) -> Edit:
    return lambda content: encode(msgspec.structs.replace(decode(content, Hello), **changes))


DAMAGED: list[tuple[str, Edit]] = [
    *((f"bit flipped at {position}", flip(position)) for position in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)),
    ("message cut", lambda content: content[:-1]),
    ("message empty", lambda content: b""),
    ("metadata cut", payload(lambda content: content[:-3], checksum_fits=False)),
    ("metadata cut, checksum fits", payload(lambda content: content[:-3], checksum_fits=True)),
    ("metadata empty, checksum fits", payload(lambda content: b"", checksum_fits=True)),
    ("no endpoints", introduced(endpoints=())),
    ("no blocks", introduced(num_blocks=0)),
    ("another life", introduced(incarnation="another")),
    ("another layout", introduced(layout=msgspec.structs.replace(LAYOUT, num_layers=3))),
]

NONSENSE: list[tuple[str, Edit]] = [
    ("another wire version", hello(wire_version=WIRE_VERSION + 1)),
    ("another life", hello(incarnation="another")),
    ("another layout", hello(layout_fingerprint="0" * 32)),
    ("not a message", lambda content: b"<html>"),
    ("empty", lambda content: b""),
    ("huge", lambda content: bytes(9 << 20)),
]


@pull_only
@pytest.mark.failure("F4 mode 8 damaged and truncated metadata")
async def test_damaged_metadata_spoils_nothing(case: Case) -> None:
    """Each time the same two nodes, which have not met: what reaches the library must not spoil the owner's name."""
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for name, edit in DAMAGED:
            async with control_proxy(owner.port) as proxy:
                proxy.tamper(CONNECT, Tamper(edit=edit))
                ticket = await owner.hand_off(name, REMOTE)
                outcome = await reader.fetch(proxy.through(ticket), LOCAL)
                if outcome.error is not None or await reader.digests(LOCAL) != await owner.digests(REMOTE):
                    case.saw(outcome)
                    assert outcome.error is not None, name
                await owner.ask("fail", name)
                proxy.clear()
                later = await reader.fetch(proxy.through(await owner.hand_off(f"after {name}", REMOTE)), LOCAL)
                assert later.error is None, f"after {name}: {later}"
                await owner.ask("fail", f"after {name}")  # the release may not have passed the proxy yet
        await case.check_usable(reader, owner)
        await case.check_alive(reader, owner)
        await case.check_nothing_leaked(before, files=2 + 2 * len(DAMAGED))


@pull_only
@pytest.mark.failure("F4 mode 8 the library's own metadata truncated")
async def test_a_spoilt_owner_is_one_owner(case: Case) -> None:
    """The one thing that does lasting harm: then the reader does without this owner, and others are not touched."""
    async with (
        case.node(NodeSpec("reader")) as reader,
        case.node(NodeSpec("owner")) as owner,
        case.node(NodeSpec("owner", seed=2)) as spoilt,
    ):
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for keep in (0, 10, 100, 200):
            async with control_proxy(spoilt.port) as proxy:
                proxy.tamper(CONNECT, Tamper(edit=inner(first_bytes(keep))))
                outcome = await reader.fetch(proxy.through(await spoilt.hand_off(f"cut-{keep}", REMOTE)), LOCAL)
                case.saw(outcome)
                assert outcome.error is not None
        await case.check_usable(reader, owner)
        async with case.node(dataclasses.replace(spoilt.spec, seed=3)) as successor:
            await case.check_usable(reader, successor)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner, spoilt)


@pull_only
@pytest.mark.failure("mode 13 owner answers nonsense, or another version")
async def test_nonsense_is_a_typed_error(case: Case) -> None:
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        for name, edit in NONSENSE:
            async with control_proxy(owner.port) as proxy:
                proxy.tamper(HELLO, Tamper(edit=edit))
                outcome = await reader.fetch(proxy.through(await owner.hand_off(name, REMOTE)), LOCAL)
                case.saw(outcome)
                assert outcome.error in ("transfer_failed", "lease_expired", "layout_mismatch", "peer_lost"), outcome
                await owner.ask("fail", name)
                proxy.clear()
                later = await reader.fetch(proxy.through(await owner.hand_off(f"after {name}", REMOTE)), LOCAL)
                assert later.error is None, f"after {name}: {later}"
                await owner.ask("fail", f"after {name}")  # the release may not have passed the proxy yet
        await case.check_usable(reader, owner)
        await case.check_alive(reader, owner)
        await case.check_nothing_leaked(before, files=2 + 2 * len(NONSENSE))


@pull_only
@pytest.mark.failure("mode 13 nodes of another layout, or that no longer listen")
async def test_nodes_that_do_not_fit_are_refused(case: Case) -> None:
    other = msgspec.structs.replace(LAYOUT, rope="theta=10000")
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        async with case.node(NodeSpec("owner", layout=other)) as stranger:
            plain = await stranger.hand_off("foreign", REMOTE)
            disguised = await stranger.hand_off("disguised", REMOTE)
            for ticket in (plain, msgspec.structs.replace(disguised, layout_fingerprint=LAYOUT.fingerprint)):
                outcome = await reader.fetch(ticket, LOCAL)
                case.saw(outcome)
                assert outcome.error == "layout_mismatch"
            unread = await stranger.hand_off("unread", REMOTE)
        outcome = await reader.fetch(msgspec.structs.replace(unread, layout_fingerprint=LAYOUT.fingerprint), LOCAL)
        case.saw(outcome)
        assert outcome.error == "peer_lost"
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pull_only
@pytest.mark.failure("mode 15 tickets forged, replayed, changed")
async def test_tickets_that_are_not_true_bring_nothing(case: Case) -> None:
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        await case.check_usable(reader, owner)
        before = [(node, await node.resources()) for node in (reader, owner)]
        used = await owner.hand_off("used", REMOTE)
        assert (await reader.fetch(used, LOCAL)).error is None
        true = await owner.hand_off("true", REMOTE)
        change = msgspec.structs.replace
        for ticket in (
            used,
            change(true, ticket_id="forged"),
            change(true, incarnation="another"),
            change(true, num_tokens=true.num_tokens + 16),
            change(true, control_url="http://127.0.0.1:9"),
        ):
            outcome = await reader.fetch(ticket, LOCAL)
            case.saw(outcome)
            assert outcome.error in ("lease_expired", "transfer_failed", "peer_lost"), outcome
        await owner.ask("fail", "true")  # some of these tickets released it, as is their holder's right
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)


@pull_only
@pytest.mark.failure("mode 13 many readers meet an owner that has just started")
async def test_meetings_at_once_are_one(case: Case) -> None:
    async with case.node(NodeSpec("reader")) as reader, case.node(NodeSpec("owner")) as owner:
        tickets = [await owner.hand_off(f"at-once-{i}", [2 * i, 2 * i + 1]) for i in range(16)]
        outcomes = await asyncio.gather(*(reader.fetch(ticket, [2 * i, 2 * i + 1]) for i, ticket in enumerate(tickets)))
        for outcome in outcomes:
            case.saw(outcome)
            assert outcome.error is None
        assert await reader.digests(list(range(32))) == await owner.digests(list(range(32)))
        assert await reader.ask("num_peers") == 1
        before = [(node, await node.resources()) for node in (reader, owner)]
        await case.check_usable(reader, owner)
        await case.check_nothing_leaked(before)
        await case.check_alive(reader, owner)
