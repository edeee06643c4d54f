"""Moves KV blocks between processes, and proves that what arrived is what was sent.

    arena              the one region of memory that holds a process's KV blocks; allocated once, never freed
    plan               which bytes go where: coalesced copies
    transport          the narrow seam; nixl_transport, shm_transport, tcp_transport, inproc_transport
    exports            the owner's side: leases on blocks that others may read
    imports            the reader's side: follow a hand-off, read, verify
    checksum           xxh3 per block
"""
