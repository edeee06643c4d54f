"""The ways to move blocks. Each states what it can do (kv_transfer.transport.Capabilities).

nixl       NIXL over UCX: between hosts, between GPUs, and on one host
ucx        UCX by way of ucxx, in a process of its own
shm        peers on one host map the owner's arena
tcp        plain sockets, no native dependency
inproc     within one process: the fake that ships, with faults to inject

factory, transport_set        from the configuration to the transports that this process runs
plan                          which bytes go where: coalesced copies
read_log, memory_copy         what transports share
network_devices               the network interfaces that UCX may use
"""
