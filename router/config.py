"""RouterConfig: everything a router process can be told. Loaded by runtime.config from TOML and flags; frozen."""

from typing import Annotated, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`host`, `port`: the public OpenAI API. `control_host`, `control_port`: where nodes register. Port 0 takes a free one.

    `api_key` guards the public API, `cluster_key` the control plane. `model` names tokenizer and chat template (the same
    names as for nodes), `served_name` is what clients call it.

    `request_timeout_s`: a request's whole life. `worker_timeout_s`: silence after which a node is given up. `retries`: how
    often a sequence that lost its node is dispatched again. `worker_wait_s`: how long a running or new sequence waits for a
    node of the needed kind to come (back) before it fails; 0: not at all. `local_prefill_tokens`: a decode node that lacks at most
    this many tokens of a prompt computes them itself (None: one KV block, 0: never while there is a prefill node).
    `max_queued_tokens`: prompt tokens that may wait for their first output token. `drain_timeout_s`: how long SIGTERM
    waits for running streams.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    control_host: str = "127.0.0.1"
    control_port: Port = 8001
    cluster_key: str | None = None
    api_key: str | None = None
    model: str = "smollm2-135m-instruct"
    served_name: str | None = None
    request_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    heartbeat_interval_s: PositiveFloat = 1.0
    worker_timeout_s: PositiveFloat = 5.0
    retries: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    worker_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    local_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_queued_tokens: PositiveInt = 1_048_576
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_timeout_s: PositiveFloat = 30.0
