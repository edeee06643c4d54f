"""Keeps KV blocks after the device has forgotten them.

tiers              the seams: what a tier keeps, how blocks come and go, who hears of it
"""
