"""Node -> router: who a worker is (once per incarnation) and how loaded it is (every heartbeat)."""

from typing import Annotated, Literal

import msgspec

from protocol.ids import IdText
from protocol.kv_events import KVEventBatch
from protocol.kv_layout import KVLayout
from protocol.transfer import TransportKind, Url

Role = Literal["prefill", "decode", "store"]
"""A store computes nothing: it keeps KV blocks, and lends them."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Constant for one incarnation. `served_model` is the name clients use; `max_model_len` counts prompt and output
    tokens; `num_blocks` is the size of the KV cache, of a store that of its memory. `transports` are those it runs, the preferred first."""

    worker_id: IdText
    incarnation: IdText
    wire_version: int
    role: Role
    control_url: Url
    served_model: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    vocab_size: Count
    max_model_len: Count
    num_blocks: Count
    layout: KVLayout
    transports: Annotated[tuple[TransportKind, ...], msgspec.Meta(min_length=1, max_length=8)]


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a worker. `waiting_tokens` are prompt tokens not yet computed of all admitted requests; `steps`
    counts engine steps, so that a standing number with work pending shows a stuck engine."""

    running: Count
    waiting: Count
    waiting_tokens: Count
    free_blocks: Count
    steps: Count
    draining: bool


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: IdText
    incarnation: IdText
    load: WorkerLoad
    kv_events: KVEventBatch | None = None


class HeartbeatReply(msgspec.Struct, frozen=True):
    """`known` False: the router has restarted or given the worker up; register again. `resync`: it missed KV events;
    send a snapshot with the next heartbeat."""

    known: bool
    resync: bool = False


class Registered(msgspec.Struct, frozen=True):
    """Answer to WorkerInfo: how often the router wants to hear from the worker."""

    heartbeat_interval_s: float


class Leave(msgspec.Struct, frozen=True):
    """The worker drains: send it nothing new. What runs there goes on."""

    worker_id: IdText
    incarnation: IdText
