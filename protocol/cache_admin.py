"""Operator -> router: the caches of all nodes as one. One message, one reply, under /internal/v1/cache on the control port.

Prompts come as the request that a client would send, and are rendered, tokenized and hashed as that would be. A node that did
not answer is named in the reply, beside what the others said: a partial answer never looks like a whole one.
"""

from typing import Annotated, Literal

import msgspec

from protocol.errors import ErrorInfo
from protocol.ids import IdText
from protocol.kv_blocks import TenantText
from protocol.kv_events import StorageTier
from protocol.store_admin import MAX_TTL_S, StoreReport
from protocol.workers import Count, Role

MAX_NODES = 4096
MAX_PROMPTS = 128

Endpoint = Literal["chat", "completions"]


class NodeSilent(msgspec.Struct, frozen=True):
    """A node that did not do what was asked, or of which nobody knows whether it did."""

    worker: IdText
    error: ErrorInfo


Silent = Annotated[tuple[NodeSilent, ...], msgspec.Meta(max_length=MAX_NODES)]


class PromptOf(msgspec.Struct, frozen=True):
    """The prompts of one client request: `body` is the JSON that would be sent to that endpoint, cache_salt included."""

    endpoint: Endpoint
    body: bytes


class GetCacheStats(msgspec.Struct, frozen=True):
    """Of all nodes."""


class CacheStats(msgspec.Struct, frozen=True):
    nodes: Annotated[tuple[StoreReport, ...], msgspec.Meta(max_length=MAX_NODES)]
    silent: Silent = ()


class FindPrompt(msgspec.Struct, frozen=True):
    prompt: PromptOf


class NodeHolds(msgspec.Struct, frozen=True, kw_only=True):
    """`leading`: how many of a prompt's first blocks this node has, in whichever tier; of those, so many are in each tier, some
    in several, and pinned. `known`: False where only the router's index could be asked, which trails by a heartbeat."""

    worker: IdText
    role: Role
    leading: Count
    device: Count = 0
    host: Count = 0
    disk: Count = 0
    pinned: Count = 0
    known: bool = True


class PromptFound(msgspec.Struct, frozen=True, kw_only=True):
    """`num_blocks` full blocks of `block_size` tokens. `expected_tokens`: as many as a request for it, sent now, need not
    compute, as far as the router knows."""

    num_tokens: Count
    block_size: Count
    num_blocks: Count
    tenant: TenantText
    expected_tokens: Count
    nodes: Annotated[tuple[NodeHolds, ...], msgspec.Meta(max_length=MAX_NODES)]


class PromptsFound(msgspec.Struct, frozen=True):
    """One for each prompt of the request, in order."""

    prompts: Annotated[tuple[PromptFound, ...], msgspec.Meta(max_length=MAX_PROMPTS)]
    silent: Silent = ()


class PinPrompt(msgspec.Struct, frozen=True):
    prompt: PromptOf
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_S)]


class UnpinPrompt(msgspec.Struct, frozen=True):
    """None: every pin on every node."""

    prompt: PromptOf | None = None


class ClearCache(msgspec.Struct, frozen=True):
    tier: StorageTier | None = None
    tenant: TenantText | None = None


class NodeChanged(msgspec.Struct, frozen=True):
    worker: IdText
    num_blocks: Count


class CacheChanged(msgspec.Struct, frozen=True):
    """The answer to PinPrompt, UnpinPrompt and ClearCache. `num_blocks`: of the prompts that were named, if any."""

    nodes: Annotated[tuple[NodeChanged, ...], msgspec.Meta(max_length=MAX_NODES)]
    silent: Silent = ()
    num_blocks: Count = 0
