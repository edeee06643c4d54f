"""LlamaModel: the forward pass of the Llama family over the flattened tokens of one step.

Tokens of all sequences lie one after another; what ties them to their sequences is the AttentionBatch and the slots of
the KV cache. The numerics follow transformers: norms and rotary embedding in float32, the residual in the model's dtype.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from engine.model.config import ModelConfig
from engine.model.rope import rope_tables
from engine.model.weights import WeightSource
from kernels.attention_batch import AttentionBatch
from kernels.linear import PackedLinear
from kernels.paged_attention import paged_attention
from kernels.rms_norm import fused_add_rms_norm, rms_norm
from kernels.rotary import rope_and_write_kv
from kernels.silu_mul import silu_and_mul

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's tensors, on the model's device."""

    token_ids: torch.Tensor  # [num_tokens], int64
    positions: torch.Tensor  # [num_tokens], int64
    slots: torch.Tensor  # [num_tokens], int64: where each token's keys and values go
    sampling_rows: torch.Tensor  # [num_rows], int64: the tokens whose logits are wanted
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor  # [hidden]
    qkv: PackedLinear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    output: PackedLinear  # num_heads * head_dim -> hidden
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: PackedLinear  # hidden -> 2 * intermediate
    down: PackedLinear  # intermediate -> hidden
    sliding_window: int


class LlamaModel:
    """Weights and forward pass. Holds no state of any sequence."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: tuple[_Layer, ...],
        final_norm: torch.Tensor,
        lm_head: PackedLinear,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.config = config
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._cos, self._sin = tables
        self._scale = config.head_dim**-0.5

    @classmethod
    def load(cls, config: ModelConfig, source: WeightSource, max_model_len: int) -> Self:
        """Read all weights, packing layer by layer. Raises ConfigError where the checkpoint does not fit the config."""
        embedding = source.read(_EMBEDDING, config.vocab_size, config.hidden_size)
        layers = tuple(_load_layer(config, source, index) for index in range(config.num_layers))
        final_norm = source.read("model.norm.weight", config.hidden_size)
        if config.tied_embeddings:
            lm_head = PackedLinear(embedding, wide=True)
            source.finish(ignored=frozenset({_LM_HEAD}))  # some checkpoints store the tied matrix twice
        else:
            lm_head = PackedLinear(source.read(_LM_HEAD, config.vocab_size, config.hidden_size), wide=True)
            source.finish()
        tables = rope_tables(config.rope, config.head_dim, max_model_len, embedding.device)
        return cls(config, embedding, layers, final_norm, lm_head, tables)

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values into the cache; returns logits [num_rows, vocab_size] of the sampling rows, float32.

        kv_cache is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        eps = self.config.rms_norm_eps
        cos, sin = self._cos[inputs.positions], self._sin[inputs.positions]
        residual = F.embedding(inputs.token_ids, self._embedding)
        normed = rms_norm(residual, self._layers[0].input_norm, eps)
        following = [layer.input_norm for layer in self._layers[1:]] + [self._final_norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, following, strict=True)):
            attended = self._attend(index, layer, normed, (cos, sin), inputs, kv_cache)
            if index == len(self._layers) - 1:  # nothing attends to the rest of this layer: only sampling rows go on
                attended, residual = attended[inputs.sampling_rows], residual[inputs.sampling_rows]
            normed, residual = fused_add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            hidden = layer.down(silu_and_mul(layer.gate_up(normed)))
            normed, residual = fused_add_rms_norm(hidden, residual, next_norm, eps)
        return self._lm_head(normed)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        inputs: StepInputs,
        kv_cache: torch.Tensor,
    ) -> torch.Tensor:
        """[num_tokens, hidden] -> [num_tokens, num_heads * head_dim]"""
        config = self.config
        num_tokens = normed.shape[0]
        heads = layer.qkv(normed).view(num_tokens, -1, config.head_dim)
        keys_from, values_from = config.num_heads, config.num_heads + config.num_kv_heads
        query, key, value = heads[:, :keys_from], heads[:, keys_from:values_from], heads[:, values_from:]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, config.rms_norm_eps)
            key = rms_norm(key, layer.key_norm, config.rms_norm_eps)
        query = rope_and_write_kv(query, key, value, *rotation, kv_cache, index, inputs.slots)
        attended = paged_attention(query, kv_cache, index, inputs.batch, self._scale, layer.sliding_window)
        return attended.view(num_tokens, -1)


def _load_layer(config: ModelConfig, source: WeightSource, index: int) -> _Layer:
    prefix = f"model.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(columns: int, bias: bool, **parts: int) -> PackedLinear:
        """One matrix product for several of the checkpoint's, their rows stacked; `parts` are name=rows."""
        names = [(f"{prefix}.{name.replace('__', '.')}", rows) for name, rows in parts.items()]
        weight = torch.cat([source.read(f"{name}.weight", rows, columns) for name, rows in names])
        return PackedLinear(
            weight, torch.cat([source.read(f"{name}.bias", rows) for name, rows in names]) if bias else None
        )

    def norm(name: str, size: int) -> torch.Tensor:
        return source.read(f"{prefix}.{name}.weight", size)

    return _Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=linear(
            hidden,
            config.qkv_bias,
            self_attn__q_proj=query_size,
            self_attn__k_proj=kv_size,
            self_attn__v_proj=kv_size,
        ),
        query_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
        key_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        output=linear(query_size, config.output_bias, self_attn__o_proj=hidden),
        mlp_norm=norm("post_attention_layernorm", hidden),
        gate_up=linear(hidden, config.mlp_bias, mlp__gate_proj=inner, mlp__up_proj=inner),
        down=linear(inner, config.mlp_bias, mlp__down_proj=hidden),
        sliding_window=config.sliding_windows[index],
    )
