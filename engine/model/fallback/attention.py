"""How the attention of a transformers model reaches us: every call becomes an AttentionCall for the handler in charge.

There are two routes. Most models look their attention function up by name in the library's registry: we register ours
once for the process, and it has no state; it finds the handler in a context variable. A few older models call torch's
scaled_dot_product_attention themselves: a torch function mode takes those calls. Both hold for one forward pass of one
thread, so that engines in one process do not meet.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from protocol.errors import ConfigError

MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query position, key position) -> whether the query sees the key; all int64 and broadcast together."""

PAGED = "headrace_paged"
"""The name of our attention function. No mask function has it, so models build no mask."""
MASKED = "headrace_masked"
"""The same function under a name that has a mask function: each call brings the rule of its mask."""

_HARMLESS = frozenset(
    {
        "position_ids",  # rotary embedding has been applied
        "cache_position",
        "sliding_window",  # not every model that has one says so here: the rule of its mask does
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
    }
)
"""Keyword arguments that change nothing about attention. Any other that is given is a feature that we do not have."""

_FEATURES = {
    "softcap": "soft-capping of attention logits",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "bias on attention scores by position",
}


class Route(Enum):
    """How a model calls attention. The value is the `attn_implementation` under which the library runs it alone."""

    INTERFACE = "eager"
    TORCH = "sdpa"

    @property
    def ours(self) -> str:
        """The `attn_implementation` under which the calls reach us."""
        return PAGED if self is Route.INTERFACE else "sdpa"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """`mask` is what the model would have added or applied; None where it built none."""

    layer: int
    query: torch.Tensor  # [1, num_heads, num_tokens, head_dim], rotated
    key: torch.Tensor  # [1, num_kv_heads, num_tokens, head_dim], rotated
    value: torch.Tensor  # [1, num_kv_heads, num_tokens, head_dim]
    scale: float
    mask: torch.Tensor | None


class AttentionHandler(Protocol):
    def attend(self, call: AttentionCall) -> torch.Tensor:
        """[1, num_tokens, num_heads, head_dim of the values]"""
        ...


class RuledMask(torch.Tensor):
    """A mask without content that remembers the rule it would have been made by."""

    rule: MaskRule


_handler: ContextVar[AttentionHandler] = ContextVar("headrace_attention_handler")


@contextmanager
def attention_by(handler: AttentionHandler, route: Route) -> Iterator[None]:
    """Within, in this thread, attention of models of this route is computed by `handler`. The model must have been set
    to `route.ours`, or to MASKED."""
    token = _handler.set(handler)
    try:
        if route is Route.TORCH:
            with _TorchAttentionMode(handler):
                yield
        else:
            yield
    finally:
        _handler.reset(token)


def _interface_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **features: object,
) -> tuple[torch.Tensor, None]:
    """The signature that the registry asks for. Raises ConfigError on what paged attention does not do."""
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ConfigError("paged attention is causal, and its own is not")
    _refuse_features(dropout, features)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ConfigError(f"{type(module).__name__} does not say which layer it is")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(layer, query, key, value, scale, attention_mask)
    return _handler.get().attend(call), None


def _refuse_features(dropout: float, features: Mapping[str, object]) -> None:
    if dropout:
        raise ConfigError("paged attention has no dropout")
    for name, setting in features.items():
        if name not in _HARMLESS and setting is not None:
            raise ConfigError(f"paged attention has no {_FEATURES.get(name, repr(name))}")


def _rule_of_mask(
    *, q_length: int, kv_length: int, mask_function: MaskRule, device: torch.device, **_: object
) -> torch.Tensor:
    mask = torch.zeros(1, 1, q_length, kv_length, device=device).as_subclass(RuledMask)
    mask.rule = mask_function
    return mask


class _TorchAttentionMode(TorchFunctionMode):
    """Hands calls of torch's scaled_dot_product_attention to a handler. Layers are counted: one call each, in order."""

    def __init__(self, handler: AttentionHandler) -> None:
        super().__init__()
        self._handler = handler
        self._layer = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: object,
    ) -> torch.Tensor:
        """[1, num_heads, num_tokens, head_dim], as torch's own."""
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            raise ConfigError("paged attention has no bias on attention scores (ALiBi)")
        if attn_mask is None and not is_causal and query.shape[2] > 1:
            raise ConfigError("paged attention is causal, and its own is not")
        _refuse_features(dropout_p, {})
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(self._layer, query, key, value, scaling, attn_mask)
        self._layer += 1
        return self._handler.attend(call).transpose(1, 2)


for _name in (PAGED, MASKED):
    AttentionInterface.register(_name, _interface_attention)
AttentionMaskInterface.register(MASKED, _rule_of_mask)
