"""A whole step of a Llama-family model as one call of C++: token ids in, logits out, keys and values into the cache.

`LlamaWeights` is what a model of the family consists of, whoever computes with it. `LlamaStep` describes it once to
native/llama_step.h and is then called for each step; between the steps it keeps the memory of the activations. It exists
where every weight is packed for C++; elsewhere the model goes operation by operation, with the same roundings.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Self

import torch

from kernels import native_library
from kernels.attention_batch import AttentionBatch
from kernels.kv_cache import CacheView, PageFormat, check_cache, layer_pointer, native_view
from kernels.linear import LinearWeight, PackedLinear


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    input_norm: torch.Tensor  # [hidden]
    qkv: PackedLinear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    output: PackedLinear  # num_heads * head_dim -> hidden
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: PackedLinear  # gated, hidden -> intermediate
    down: PackedLinear  # intermediate -> hidden
    sliding_window: int  # tokens, a query's own included; 0: none

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """Norms and embedding have the model's dtype; the tables of the rotary embedding are float32."""

    embedding: torch.Tensor  # [vocab_size, hidden]
    layers: tuple[LlamaLayer, ...]
    final_norm: torch.Tensor  # [hidden]
    lm_head: PackedLinear  # wide, hidden -> vocab_size
    cos: torch.Tensor  # [num_positions, head_dim / 2]
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's tensors, on the model's device."""

    token_ids: torch.Tensor  # [num_tokens], int64
    positions: torch.Tensor  # [num_tokens], int64
    slots: torch.Tensor  # [num_tokens], int64: where each token's keys and values go
    sampling_rows: torch.Tensor  # [num_rows], int64: the tokens whose logits are wanted
    batch: AttentionBatch


class _Layer(ctypes.Structure):
    """LlamaLayer of native/llama_step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, LinearWeight) for name in ("qkv", "output", "gate_up", "down")),
        ("sliding_window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    """LlamaModel of native/llama_step.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "final_norm", "cos", "sin")),
        ("lm_head", LinearWeight),
        *((name, ctypes.c_int64) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("hidden_size", "intermediate_size", "vocab_size", "num_positions")),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class _Inputs(ctypes.Structure):
    """LlamaInputs of native/llama_step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "sampling_rows")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("cache", "scratch", "logits")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "num_sequences", "max_blocks", "layer_stride")),
        ("view", CacheView),
    )


class LlamaStep:
    """Not thread-safe: one step at a time."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Of weights that `supporting` takes."""
        self._weights = weights  # keeps alive what the descriptions point at
        self._step = native_library.function("llama_step", weights.embedding)
        self._scratch_size = native_library.function("llama_scratch", weights.embedding)
        self._layers = (_Layer * len(weights.layers))(*(_describe_layer(layer) for layer in weights.layers))
        self._model = _describe(weights, self._layers)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def supporting(cls, weights: LlamaWeights) -> Self | None:
        """None where something of these weights is not packed for C++, or not of one dtype."""
        linears = [weights.lm_head, *(linear for layer in weights.layers for linear in layer.linears)]
        norms = [
            norm
            for layer in weights.layers
            for norm in (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
            if norm is not None
        ]
        tensors = [weights.embedding, weights.final_norm, *norms]
        packed = all(linear.packed and linear.dtype == weights.embedding.dtype for linear in linears)
        uniform = all(tensor.dtype == weights.embedding.dtype and tensor.is_contiguous() for tensor in tensors)
        tables = all(table.dtype == torch.float32 and table.is_contiguous() for table in (weights.cos, weights.sin))
        if packed and uniform and tables and weights.cos.shape[1] * 2 == weights.head_dim:
            return cls(weights)
        return None

    def __call__(self, inputs: StepInputs, kv_cache: torch.Tensor, page_format: PageFormat) -> torch.Tensor:
        """Returns logits [num_rows, vocab_size], float32. kv_cache is [num_blocks, num_layers, 2, num_kv_heads,
        block_size, head_dim], of the weights' dtype.

        Raises ValueError where the cache or the lengths of the batch do not fit, IndexError for a token, position,
        slot, row or block that does not exist.
        """
        weights, batch = self._weights, inputs.batch
        check_cache(kv_cache, len(weights.layers) - 1, page_format)
        if kv_cache.dtype != weights.embedding.dtype or kv_cache.shape[3::2] != (
            weights.num_kv_heads,
            weights.head_dim,
        ):
            raise ValueError(f"kv_cache {kv_cache.dtype} {tuple(kv_cache.shape)} does not fit the model")
        num_tokens, num_rows = inputs.token_ids.numel(), inputs.sampling_rows.numel()
        logits = torch.empty((num_rows, self._model.vocab_size))
        step_inputs = _Inputs(
            *(inputs.token_ids.data_ptr(), inputs.positions.data_ptr(), inputs.slots.data_ptr()),
            inputs.sampling_rows.data_ptr(),
            *(batch.query_starts.data_ptr(), batch.context_lens.data_ptr(), batch.block_tables.data_ptr()),
            *(layer_pointer(kv_cache, 0), self._scratch_for(num_tokens, num_rows), logits.data_ptr()),
            *(num_tokens, num_rows, batch.num_seqs, batch.block_tables.shape[1], kv_cache.stride(1)),
            native_view(kv_cache, page_format),
        )
        assert self._step is not None, "supporting() has checked"
        status = self._step(ctypes.byref(self._model), ctypes.byref(step_inputs), torch.get_num_threads())
        native_library.raise_for_status(status)
        return logits

    def _scratch_for(self, num_tokens: int, num_rows: int) -> int:
        """Address of enough memory for the activations; grows to the largest step that was seen."""
        assert self._scratch_size is not None, "supporting() has checked"
        needed = ctypes.c_int64()
        self._scratch_size(ctypes.byref(self._model), num_tokens, num_rows, ctypes.byref(needed))
        if needed.value > self._scratch.numel():
            self._scratch = torch.empty(needed.value, dtype=torch.uint8)
        return self._scratch.data_ptr()


def _describe_layer(layer: LlamaLayer) -> _Layer:
    norms = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
    return _Layer(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(linear.description for linear in layer.linears),
        layer.sliding_window,
    )


def _describe(weights: LlamaWeights, layers: Any) -> _Model:  # ctypes has no public name for the type of its arrays
    vocab_size, hidden_size = weights.embedding.shape
    return _Model(
        layers,
        *(weights.embedding.data_ptr(), weights.final_norm.data_ptr(), weights.cos.data_ptr(), weights.sin.data_ptr()),
        weights.lm_head.description,
        *(len(layers), weights.num_heads, weights.num_kv_heads, weights.head_dim),
        *(hidden_size, weights.layers[0].gate_up.out_features, vocab_size, weights.cos.shape[0]),
        *(weights.norm_eps, weights.head_dim**-0.5),
    )
