"""Keeps KV blocks after the device has forgotten them.

index/             the index in Redis: who holds what, for all to find
tiers              the seams: what a tier keeps, how blocks come and go, who hears of it
store              KVStore: what one process keeps, in host memory and on disk; everything below is how
host_tier          slots of host memory: directory (which block is where, pure), quotas, and who is told
policy/            who is evicted; replay/: what each policy would have kept of a trace
admission          which blocks are taken at all; load_choice: which are worth bringing back, by measured rates
mover              copies between the device and host slots; host_copier where both are host memory
disk/              files of blocks that outlive the process
demotion           from host slots to disk; promotion: back; disk_worker: the threads for both
receiving          puts from other nodes
observer, stats    what is measured and counted; readout puts it together
bench/             how fast blocks move here, beside memcpy and a plain file
sizing             "4GiB", "25%" or "auto" of what there is
"""
