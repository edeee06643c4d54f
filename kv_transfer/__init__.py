"""Moves KV blocks between processes, and proves that what arrived is what was sent.

transport     the narrow seam: Transport, Link, and what a transfer guarantees
transports    its implementations, and which of them a process runs
memory        where KV blocks lie, and how those of a device get to transports
meeting       whom a node has met, and which transport the two chose by measuring
handoff       exports under leases, and verified imports
lending       prefixes that one node computed and another needs

routes        an owner's control plane over HTTP
exchange      all of it put together: what a node, which owns and reads, composes
telemetry     brings the metrics up to date with what the parts have counted
bench         `headrace bench transfer`
"""
