"""A KV store as part of a cluster: beside an engine in prefill and decode nodes, or alone in a process, the store node.

build            from settings to a KVStore; served_store: lends its blocks to peers (store_owner, slot_staging)
beside_engine    what nodes with an engine do at their start; node_store: all that they keep beside their device
arrivals         what the store is told of each request
offers           what the engine forgets, saved; near_store: what it lacks, loaded; best_lender: from whichever holds more
membership       what a process says of itself in the index, and which stores it knows; tier_log: what routers hear
put_queue        copies on their way to a store node, chosen by placement; put_receiver: the store's side of it
main, node       the store node's process
"""
