"""What crosses a process: messages, ids, KV layout, block hashes, errors and the wire version.

A map of the package, in reading order:

    ids            names of requests, workers, incarnations, tickets
    errors         the one error tree, and its wire form
    wire           wire version, encoding, size limits, two-phase compatibility check
    kv_layout      what the bytes of a KV block mean, and their fingerprint
    block_hash     content addresses of full KV blocks
    sampling       how a sequence is sampled
    requests       router -> node: PrefillRequest, DecodeRequest, CancelRequest
    tokens         node -> router: TokenFrame of one engine step
    phases         where the time of a request went
    transfer       decode node <-> prefill node: ticket and hand-off messages
    workers        node -> router: who a worker is and how loaded it is
    kv_events      node -> router: which blocks a worker's cache gained and lost

Nothing here does I/O or imports a tensor library.
"""
