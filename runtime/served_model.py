"""ServedModel: what a loaded model turned out to be."""

from dataclasses import dataclass

from protocol.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`max_model_len` counts prompt and output tokens. `num_blocks` of `layout` are the node's KV cache."""

    name: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    layout: KVLayout
