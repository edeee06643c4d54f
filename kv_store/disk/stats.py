"""DiskStats: what a disk tier tells of itself. Counts are since the process started, and only grow."""

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.kv_blocks import Tenant


@dataclass(frozen=True, slots=True)
class DiskScan:
    """What was found at start. `num_refused`: files with our name that were no whole segment of ours, deleted;
    `num_unfinished`: of writers that were killed, deleted."""

    num_files: int = 0
    num_blocks: int = 0
    num_refused: int = 0
    num_unfinished: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class DiskCounts:
    """What DiskTier counts as it goes."""

    blocks_written: int = 0
    bytes_written: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    blocks_evicted: int = 0
    files_evicted: int = 0
    checksum_failures: int = 0
    blocks_refused: int = 0
    """Offered, and not written: the disk failed or was resting, or a tenant may not have so many."""


@dataclass(frozen=True, slots=True)
class DiskStats:
    """`used_bytes` counts whole files, `stranger_bytes` of it those of layouts that are not served, `dead_blocks` what
    was forgotten in files that live on. `tenants`: blocks of each. `failures`: by cause. `paused_s`: how long until
    the tier writes again; 0 if it does. `io`: how it reads and writes, and why."""

    capacity_bytes: int
    used_bytes: int
    stranger_bytes: int
    num_files: int
    num_blocks: int
    dead_blocks: int
    tenants: Mapping[Tenant, int]
    counts: DiskCounts
    read_failures: Mapping[str, int]
    write_failures: Mapping[str, int]
    paused_s: float
    scan: DiskScan
    io: str
