"""Moves KV blocks between processes, and proves that what arrived is what was sent.

    arena              the one region of memory that holds a process's KV blocks; allocated once, never freed
    checksum           xxh3 per block
    plan               which bytes go where: coalesced copies

    transport          the narrow seam: Transport, Link, and what a read guarantees
    factory            make_transport, from the configured kind
    nixl_transport     NIXL over UCX, between hosts; nixl_agent is its one thread, nixl_library finds the library
    shm_transport      peers on one host map the owner's arena
    tcp_transport      plain sockets: tcp_server is the owner's end, tcp_wire what the ends say
    ucx_transport      UCX by way of ucxx: ucx_helper holds the process that has it; ucx_process, ucx_worker, ucx_reader and
                       ucx_owner are in there; ucx_wire is what all say, ucx_library finds ucxx
    inproc_transport   the fake that ships, with faults to inject
    memory_copy, read_log    what transports share; telemetry carries their counts to the metrics

    exports            the owner's side: leases on blocks that others may read; export is one of them
    routes             the owner's control plane over HTTP
    imports            the reader's side: fetches contexts and tidies up after each
    fetch              one hand-off as its reader lives it; landing is its state, without I/O
    peers              whom a reader has met

    child_python       starts helper processes; bench is `headrace bench transfer`

An owner composes HostArena, ExportTable, make_transport and kv_routes; a reader HostArena, make_transport and Importer.
"""
