"""Replays a trace of requests against the tiers of a store, on a virtual clock: what would which policy have kept?

trace            the file and its requests
reuse            what the trace itself says: gaps between wants, the most that any cache can hit
clairvoyant      the most that a cache of a given size can hit
one_tier         the production directory with one policy
two_tiers        a device's cache above a host tier
report           all of it, for a list of policies and sizes
"""
