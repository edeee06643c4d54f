"""Identifiers, made once by their owner and compared as opaque strings by everybody else.

Ids that grant access (tickets) or that key server-side state (requests) are unguessable and made by the cluster, never
taken from a client: a client's own request id is only ever echoed.
"""

import secrets
from typing import Annotated, NewType

import msgspec

RequestId = NewType("RequestId", str)
"""One dispatch of one sequence to one or two nodes. A retry or a second choice (`n=2`) gets an id of its own."""

TraceId = NewType("TraceId", str)
"""The client's request, for logs. Several RequestIds share one TraceId."""

RouterId = NewType("RouterId", str)
"""One router process's life: the address of a token stream."""

WorkerId = NewType("WorkerId", str)
"""A node's configured name. Survives a restart."""

Incarnation = NewType("Incarnation", str)
"""One life of a worker process: new at every start, so that what an earlier life promised is void."""

TicketId = NewType("TicketId", str)
"""The capability to read one request's exported KV blocks."""

PinId = NewType("PinId", str)
"""One holding of cached blocks for somebody else to read, within one process."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: the content address of one full KV block (see block_hash)."""

ContextHash = NewType("ContextHash", bytes)
"""16 bytes: layout, tenant salt and every token of one request's context (see block_hash)."""

IdText = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
"""The wire type of every id: what ends up in logs and metric labels cannot carry anything odd."""


def new_request_id() -> RequestId:
    return RequestId(f"req-{secrets.token_hex(12)}")


def new_trace_id() -> TraceId:
    return TraceId(secrets.token_hex(16))


def new_router_id() -> RouterId:
    return RouterId(f"router-{secrets.token_hex(8)}")


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.token_hex(8))


def new_ticket_id() -> TicketId:
    return TicketId(secrets.token_urlsafe(24))
