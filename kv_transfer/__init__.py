"""Moves KV blocks between processes, and proves that what arrived is what was sent.

    arena              the one region of memory that holds a process's KV blocks; allocated once, never freed
    checksum           xxh3 per block
    plan               which bytes go where: coalesced copies

    transport          the narrow seam: Transport, Link, and what a read guarantees
    factory            start_transports, from the configuration; make_transport, of one kind
    transport_set      the transports that this process runs
    nixl_transport     NIXL over UCX, between hosts; nixl_agent is its one thread, nixl_library finds the library
    shm_transport      peers on one host map the owner's arena
    tcp_transport      plain sockets: tcp_server is the owner's end, tcp_wire what the ends say
    ucx_transport      UCX by way of ucxx: ucx_helper holds the process that has it; ucx_process, ucx_worker, ucx_reader and
                       ucx_owner are in there; ucx_wire is what all say, ucx_library finds ucxx
    inproc_transport   the fake that ships, with faults to inject
    memory_copy, read_log    what transports share; telemetry carries their counts to the metrics

    staging            between a node's KV blocks and the wire blocks that transports move, where these are others
    device_staging     a device's blocks copied to pinned host memory and back; staging_pool is the room for it
    device_arena       what arena is, of memory on a device
    device_blocks      open_staging: which way a node's KV gets to its transports

    exports            the owner's side: leases on blocks that others may read
    export             one of them; export_stream is what its reader hears
    routes             the owner's control plane over HTTP
    imports            the reader's side: fetches contexts and tidies up after each
    fetch              one hand-off as its reader lives it; landing is its state, without I/O
    peers              whom a reader has met
    meeting            how the two choose their transport: link_probe measures over scratch blocks, link_choice decides,
                       local_limits knows what would be possible
    pushers            the readers that an owner knows, and its links into their memory

    child_python       starts helper processes; bench is `headrace bench transfer`

An owner composes HostArena, start_transports, Pushers, ExportTable and kv_routes; a reader HostArena, start_transports and
Importer.
"""
