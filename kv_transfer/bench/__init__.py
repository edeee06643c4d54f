"""`headrace bench transfer`: how fast every transport moves blocks here, beside what the machine can do without us.

options       what to measure, as the user chose
shapes        the block lists that are moved: how many, contiguous or scattered. Pure
contestant    what is compared: transports through the seam
baselines     ... and what they are compared with: memcpy, raw sockets;  raw_nixl: NIXL called directly
messages      what the benchmark says to its processes
station       one of those processes: it holds an arena, and every contestant's end
pair          two stations on loopback, and their ends
run           the measurement: all contestants in turn, again and again, so that noise hits all alike
report        results, ratios, the table
"""
