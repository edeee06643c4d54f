"""The batch that attention works on: made once per engine step, shared by all its layers, then dropped."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Sequences of one step, flattened: query tokens of sequence s are rows query_starts[s] to query_starts[s + 1].

    Query token i of a sequence with `query_len` query tokens stands at position `context_len - query_len + i` and sees
    the positions up to and including its own. Position p lies in block `block_tables[s, p // block_size]`, at offset
    `p % block_size`. Entries of a block table beyond the context are never read.

    All tensors are int32, contiguous and on the device of the cache. Raises ValueError where they are not, or where
    their shapes disagree.
    """

    query_starts: torch.Tensor  # [num_seqs + 1], prefix sums, the first is 0
    context_lens: torch.Tensor  # [num_seqs], KV tokens visible to the last query token: cached plus this step's
    block_tables: torch.Tensor  # [num_seqs, max_blocks], block ids
    max_query_len: int
    max_context_len: int

    def __post_init__(self) -> None:
        for name in ("query_starts", "context_lens", "block_tables"):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(f"{name} must be a contiguous int32 tensor, got {tensor.dtype} {tuple(tensor.shape)}")
        num_seqs = self.context_lens.numel()
        if self.context_lens.dim() != 1 or tuple(self.query_starts.shape) != (num_seqs + 1,):
            raise ValueError("query_starts must have one entry more than context_lens, both of one dimension")
        if self.block_tables.dim() != 2 or self.block_tables.shape[0] != num_seqs:
            raise ValueError("block_tables must have one row for each sequence")

    @property
    def num_seqs(self) -> int:
        return self.context_lens.numel()
