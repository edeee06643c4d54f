"""Keeps KV blocks after the device has forgotten them.

index/             the index in Redis: who holds what, for all to find
tiers              the seams: what a tier keeps, how blocks come and go, who hears of it
"""
