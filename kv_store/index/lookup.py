"""choose_sources: who holds how much of a chain, from the index's entries of it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kv_store.index import places
from kv_store.index.members import Member
from protocol.ids import WorkerId
from protocol.transfer import KVSource

MAX_SOURCES = 8


@dataclass(frozen=True, slots=True)
class Found:
    """`sources`: the best first. `num_garbage`: entries that could not be read. `strangers`: places are of lives that are
    not known, or not any more."""

    sources: tuple[KVSource, ...]
    num_garbage: int
    strangers: bool


def choose_sources(
    values: Sequence[bytes],
    members: Mapping[int, Member],
    chunk_blocks: int,
    fingerprint: str,
    myself: WorkerId,
) -> Found:
    """`values[i]` is the entry of the chain's chunk i, b"" where there is none. A member counts with the chunks that it holds
    from the first one on without a gap. Other layouts and this worker itself are left out."""
    reach: dict[int, int] = {}
    slowest: dict[int, int] = {}
    num_garbage = 0
    for index, value in enumerate(values):
        held = places.lives(value) if value else ()
        if held is None:
            num_garbage += 1
            break
        extended = False
        for life, kind in held:
            if reach.get(life, 0) == index:
                reach[life] = index + 1
                slowest[life] = max(kind, slowest.get(life, 0))
                extended = True
        if not extended:
            break
    usable = [
        (member, reach[life], slowest[life])
        for life in reach
        if (member := members.get(life)) is not None
        and member.fingerprint == fingerprint
        and member.worker_id != myself
    ]
    usable.sort(key=lambda found: (-found[1], found[2], found[0].worker_id))
    sources = tuple(
        KVSource(
            worker=member.worker_id,
            incarnation=member.incarnation,
            control_url=member.control_url,
            num_blocks=num_chunks * chunk_blocks,
        )
        for member, num_chunks, _ in usable[:MAX_SOURCES]
    )
    return Found(sources, num_garbage, any(life not in members for life in reach))
