"""Where KV blocks lie.

arena             the one region of host memory that holds a process's KV blocks; allocated once, never freed
device_arena      what arena is, of memory on a device
device_blocks     open_staging: which way a node's KV gets to its transports
staging           between a node's KV blocks and the wire blocks that transports move, where these are others
device_staging    a device's blocks copied to pinned host memory and back; staging_pool is the room for it
checksum          xxh3 per block
"""
