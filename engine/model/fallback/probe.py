"""ModelShape: what a model's attention shows of it, measured by one forward pass of a model that has no weights.

Field names in config.json differ from family to family; the tensors that arrive at attention do not lie.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from engine.model.fallback.attention import AttentionCall, Route, attention_by
from engine.model.fallback.settings import LIBRARY_ERRORS, bare_model, first_line, refusal
from protocol.errors import ConfigError

_NUM_TOKENS = 3


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The same KV heads and head dimension in all `num_layers` layers."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    route: Route


class _CallRecorder:
    """An AttentionHandler that keeps the calls and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.query.new_empty(1, call.query.shape[2], call.query.shape[1], call.value.shape[3])


def probe_shape(config: PretrainedConfig) -> ModelShape:
    """Takes about a second and next to no memory. Raises ConfigError, naming the model type and the reason, where paged
    attention cannot stand in for the model's own."""
    errors = []
    for route in Route:
        try:
            model = bare_model(config, route.ours)
        except ConfigError as error:
            errors.append(error)
            continue
        recorder = _CallRecorder()
        vocab_size = _run(model, config, route, recorder)
        if recorder.calls:
            return _shape(config, route, recorder.calls, vocab_size)
        errors.append(refusal(config, f"{type(model).__name__} calls no attention function that could be replaced"))
    raise errors[0]


def _run(model: PreTrainedModel, config: PretrainedConfig, route: Route, recorder: _CallRecorder) -> int:
    """One forward pass; returns the width of the logits."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the one that asks no tensor for its values
    tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode(), attention_by(recorder, route):
            output = model(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=tokens[0, :1])
    except ConfigError as error:
        raise refusal(config, error.message) from error
    except LIBRARY_ERRORS as error:
        raise refusal(config, f"its forward pass cannot be examined: {first_line(error)}") from error
    return int(output.logits.shape[-1])


def _shape(config: PretrainedConfig, route: Route, calls: list[AttentionCall], vocab_size: int) -> ModelShape:
    num_layers = int(config.num_hidden_layers)
    if [call.layer for call in calls] != list(range(num_layers)):
        raise refusal(config, f"{len(calls)} attention calls for {num_layers} layers: it must be one each, in order")
    if vocab_size != config.vocab_size:
        raise refusal(config, f"its logits are of {vocab_size} tokens, its vocabulary of {config.vocab_size}")
    shapes = {(call.key.shape[1], call.key.shape[3], call.value.shape[1], call.value.shape[3]) for call in calls}
    if len(shapes) > 1:
        raise refusal(config, "its layers differ in KV heads or head dimension")
    num_kv_heads, head_dim, num_value_heads, value_dim = shapes.pop()
    if (num_kv_heads, head_dim) != (num_value_heads, value_dim):
        raise refusal(config, f"keys of {head_dim} and values of {value_dim} dimensions do not fit one cache")
    if any(call.query.shape[1] % num_kv_heads or call.query.shape[3] != head_dim for call in calls):
        raise refusal(config, "its query heads are no multiple of its KV heads")
    if route is Route.TORCH and getattr(config, "sliding_window", None):
        raise refusal(config, "it calls torch's attention itself, which is not told of the sliding window")
    return ModelShape(vocab_size, num_layers, num_kv_heads, head_dim, route)
