"""What this process has mapped of KV arenas, its own and those of peers on this host."""

from pathlib import Path

INODE_FIELD = 4
"""Of a line of /proc/<pid>/maps."""


def arena_mappings() -> list[str]:
    """A line for each mapping; one arena has several where a peer in the same process has mapped it too."""
    with Path("/proc/self/maps").open() as maps:
        return [line for line in maps if "memfd:headrace-kv" in line]


def num_mapped_arenas() -> int:
    return len({line.split()[INODE_FIELD] for line in arena_mappings()})
