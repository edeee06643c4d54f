"""StoreSettings: how a store behaves, as a node tells it at start."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kv_store.admission import AdmissionMode
from kv_store.load_choice import LoadPolicy
from kv_store.quotas import Quotas


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`block_size`: tokens in a block. `write_through`: save blocks as soon as they are computed. `prefill_tokens_per_s`: how fast
    this node computes prompts, None while that is not known."""

    block_size: int
    write_through: bool = False
    admission: AdmissionMode = "auto"
    load: LoadPolicy = "auto"
    quotas: Quotas = field(default_factory=Quotas)
    prefill_tokens_per_s: Callable[[], float | None] = lambda: None
