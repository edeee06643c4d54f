"""LlamaModel: the forward pass of the Llama family over the flattened tokens of one step.

Tokens of all sequences lie one after another; what ties them to their sequences is the AttentionBatch and the slots of
the KV cache. The numerics follow transformers: norms and rotary embedding in float32, the residual in the model's dtype.

On a CPU with the native library a step is one call (kernels/llama_step.py); elsewhere it is made of the operations of
kernels/, one after another, with the same roundings.
"""

from typing import Self

import torch
import torch.nn.functional as F

from engine.model.config import ModelConfig
from engine.model.rope import rope_tables
from engine.model.weights import WeightSource
from kernels.kv_cache import PageFormat
from kernels.linear import PackedLinear, Quantization
from kernels.llama_step import LlamaLayer, LlamaStep, LlamaWeights, StepInputs
from kernels.paged_attention import paged_attention
from kernels.rms_norm import fused_add_rms_norm, rms_norm
from kernels.rotary import rope_and_write_kv

__all__ = ["LlamaModel", "StepInputs"]

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LlamaModel:
    """Weights and forward pass. Holds no state of any sequence."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self._weights = weights
        self._whole_step = LlamaStep.supporting(weights)

    @classmethod
    def load(
        cls, config: ModelConfig, source: WeightSource, max_model_len: int, quantization: Quantization = "none"
    ) -> Self:
        """Read all weights, packing layer by layer. Raises ConfigError where the checkpoint does not fit the config."""
        embedding = source.read(_EMBEDDING, config.vocab_size, config.hidden_size)
        layers = tuple(_load_layer(config, source, index, quantization) for index in range(config.num_layers))
        final_norm = source.read("model.norm.weight", config.hidden_size)
        if config.tied_embeddings:
            lm_head = PackedLinear(embedding, wide=True, quantization=quantization)
            source.finish(ignored=frozenset({_LM_HEAD}))  # some checkpoints store the tied matrix twice
        else:
            head = source.read(_LM_HEAD, config.vocab_size, config.hidden_size)
            lm_head = PackedLinear(head, wide=True, quantization=quantization)
            source.finish()
        cos, sin = rope_tables(config.rope, config.head_dim, max_model_len, embedding.device)
        weights = LlamaWeights(
            *(embedding, layers, final_norm, lm_head, cos, sin),
            *(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps),
        )
        return cls(config, weights)

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor, page_format: PageFormat = "plain") -> torch.Tensor:
        """Write the step's keys and values into the cache; returns logits [num_rows, vocab_size] of the sampling rows, float32.

        kv_cache is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        if self._whole_step is not None:
            return self._whole_step(inputs, kv_cache, page_format)
        weights, eps = self._weights, self._weights.norm_eps
        cos, sin = weights.cos[inputs.positions], weights.sin[inputs.positions]
        residual = F.embedding(inputs.token_ids, weights.embedding)
        normed = rms_norm(residual, weights.layers[0].input_norm, eps)
        following = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, following, strict=True)):
            attended = self._attend(index, normed, (cos, sin), inputs, kv_cache, page_format)
            if index == len(weights.layers) - 1:  # nothing attends to the rest of this layer: only sampling rows go on
                attended, residual = attended[inputs.sampling_rows], residual[inputs.sampling_rows]
            normed, residual = fused_add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            normed, residual = fused_add_rms_norm(layer.down(layer.gate_up(normed)), residual, next_norm, eps)
        return weights.lm_head(normed)

    def _attend(
        self,
        index: int,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        inputs: StepInputs,
        kv_cache: torch.Tensor,
        page_format: PageFormat,
    ) -> torch.Tensor:
        """[num_tokens, hidden] -> [num_tokens, num_heads * head_dim]"""
        weights, layer = self._weights, self._weights.layers[index]
        num_tokens, eps = normed.shape[0], weights.norm_eps
        heads = layer.qkv(normed).view(num_tokens, -1, weights.head_dim)
        keys_from, values_from = weights.num_heads, weights.num_heads + weights.num_kv_heads
        query, key, value = heads[:, :keys_from], heads[:, keys_from:values_from], heads[:, values_from:]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, eps)
            key = rms_norm(key, layer.key_norm, eps)
        query = rope_and_write_kv(query, key, value, *rotation, kv_cache, index, inputs.slots, page_format)
        scale, window = weights.head_dim**-0.5, layer.sliding_window
        attended = paged_attention(query, kv_cache, index, inputs.batch, scale, window, page_format)
        return attended.view(num_tokens, -1)


def _load_layer(config: ModelConfig, source: WeightSource, index: int, quantization: Quantization) -> LlamaLayer:
    prefix = f"model.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(columns: int, bias: bool, gated: bool = False, **parts: int) -> PackedLinear:
        """One matrix product for several of the checkpoint's, their rows stacked; `parts` are name=rows."""
        names = [(f"{prefix}.{name.replace('__', '.')}", rows) for name, rows in parts.items()]
        weight = torch.cat([source.read(f"{name}.weight", rows, columns) for name, rows in names])
        biases = torch.cat([source.read(f"{name}.bias", rows) for name, rows in names]) if bias else None
        return PackedLinear(weight, biases, gated=gated, quantization=quantization)

    def norm(name: str, size: int) -> torch.Tensor:
        return source.read(f"{prefix}.{name}.weight", size)

    return LlamaLayer(
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
        gate_up=linear(hidden, config.mlp_bias, gated=True, mlp__gate_proj=inner, mlp__up_proj=inner),
        down=linear(inner, config.mlp_bias, mlp__down_proj=hidden),
        sliding_window=config.sliding_windows[index],
    )
