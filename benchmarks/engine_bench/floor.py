"""The floor: what the machine allows, from its memory bandwidth and matrix rate as measured in the same run.

Linear layers and attention run one after the other, so a step takes at least the sum of their floors, and each of them
at least the longer of reading its bytes once and computing its products:

    step >= max(weight bytes / bandwidth, linear flops / rate) + max(KV bytes / bandwidth, attention flops / rate)

torch multiplies int8 matrices on CPUs below the machine's rate, so int8's rate is not measured but taken from bf16's: one
VNNI instruction does twice the multiplications of one for bf16.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_bench.case import Case, Precision
from engine.model.config import ModelConfig, read_model_config

WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 1}
KV_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 2}
INT8_RATE_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """One precision's: `bandwidth` in bytes a second, `rate` in operations a second (a multiplication and an addition count 2)."""

    bandwidth: float
    rate: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a token costs: `layer_weights` of all linear layers but the head, `head_weights`, KV elements a token,
    and the multiplications of attention for each pair of a query and a key."""

    layer_weights: int
    head_weights: int
    kv_elements: int
    attention_width: int

    @classmethod
    def of(cls, config_path: Path) -> "ModelCost":
        config: ModelConfig = read_model_config(config_path)
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = config.hidden_size * (query + 2 * kv) + query * config.hidden_size
        mlp = 3 * config.hidden_size * config.intermediate_size
        return cls(
            layer_weights=config.num_layers * (attention + mlp),
            head_weights=config.vocab_size * config.hidden_size,
            kv_elements=config.num_layers * 2 * kv,
            attention_width=config.num_layers * 2 * query,
        )

    def floor_tokens_per_s(self, case: Case, precision: Precision, limits: Limits) -> float:
        """No engine is faster here that reads every weight once a step and runs linear layers and attention in turn."""
        weights_read = (self.layer_weights + self.head_weights) * WEIGHT_BYTES[precision]
        if case.kind == "prefill":
            linear_flops = 2 * (case.context * self.layer_weights + self.head_weights)  # only the last row has logits
            pairs = case.context * (case.context + 1) // 2
            tokens, kv_tokens = case.context, case.context
        else:
            linear_flops = 2 * case.streams * (self.layer_weights + self.head_weights)
            kv_tokens = case.streams * (case.context + case.steps // 2)  # the mean over the steps
            pairs, tokens = kv_tokens, case.streams
        linear_s = max(weights_read / limits.bandwidth, linear_flops / limits.rate)
        kv_read = kv_tokens * self.kv_elements * KV_BYTES[precision]
        attention_s = max(kv_read / limits.bandwidth, 2 * pairs * self.attention_width / limits.rate)
        return tokens / (linear_s + attention_s)
