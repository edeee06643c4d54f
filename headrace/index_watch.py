"""`headrace cache watch --events`: what every owner tells the index, as it tells it."""

import argparse
import asyncio
import os
import time
from collections.abc import Callable

import msgspec

from kv_store.index.follower import Change, Follower
from kv_store.index.server import UNREACHABLE
from kv_store.index.settings import IndexSettings
from protocol.errors import NodeLost

SHOWN_ADDRESSES = 3
RETRY_S = 1.0


def run(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Until interrupted, or for `options.count` changes. Raises ConfigError for a URL that is none, NodeLost where the server
    does not answer at first; later outages are told and waited for."""
    settings = IndexSettings(
        url=options.redis, namespace=options.namespace, cluster_key=os.environ.get("HEADRACE_CLUSTER_KEY")
    )
    return asyncio.run(_follow(settings, options, say))


async def _follow(settings: IndexSettings, options: argparse.Namespace, say: Callable[[str], None]) -> int:
    shown = 0
    answered = False
    async with Follower(settings, options.interval) as follower:
        while True:
            try:
                async for change in follower.changes():
                    answered = True
                    say(_as_json(change) if options.json else describe(change, time.strftime("%H:%M:%S")))
                    shown += 1
                    if shown == options.count:
                        return 0
            except UNREACHABLE as error:
                if not answered:
                    raise NodeLost(f"no answer from the index at {settings.shown_url}: {error}") from error
                say(f"the index at {settings.shown_url} does not answer: {error}; trying again")
                await asyncio.sleep(RETRY_S)


def describe(change: Change, at: str) -> str:
    """One line. Chunks are named by the beginning of the address of their last block."""
    member = change.member
    used = f"{member.used_blocks} of {member.capacity_blocks} blocks"
    parts = [f"{at} {member.worker_id} ({member.role}) {change.kind}"]
    if change.kind == "joined":
        parts.append(f"{member.control_url}, {used}")
    for what, addresses in (("stored", change.stored), ("removed", change.removed)):
        if addresses:
            names = " ".join(address.hex()[:12] for address in addresses[:SHOWN_ADDRESSES])
            more = " ..." if len(addresses) > SHOWN_ADDRESSES else ""
            parts.append(f"{what} {len(addresses)} chunks: {names}{more}")
    return "; ".join(parts)


def _as_json(change: Change) -> str:
    told = {
        "worker": change.member.worker_id,
        "incarnation": change.member.incarnation,
        "kind": change.kind,
        "stored": [address.hex() for address in change.stored],
        "removed": [address.hex() for address in change.removed],
    }
    return msgspec.json.encode(told).decode()
