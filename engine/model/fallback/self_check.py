"""SelfCheck: proof at load that a model computes the same over our paged cache as by the library alone.

Two short prompts go through the library, each by itself, and then through our path as a server would run them:
flattened into one batch, in two chunks. A model that mixes tokens outside of attention, keeps a state, ignores our
attention or its positions does not survive it. Which positions a token sees is beyond what a short prompt can show:
that is read off the rule that the library would have made each layer's mask by.
"""

from dataclasses import replace

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from engine.model.choice import Model
from engine.model.fallback.attention import MASKED, AttentionCall, MaskRule, Route, RuledMask, attention_by
from engine.model.fallback.probe import ModelShape
from engine.model.fallback.settings import LIBRARY_ERRORS, first_line, refusal
from engine.model.step_inputs import build_step_inputs
from engine.runner import ScheduledChunk
from protocol.errors import ConfigError
from protocol.ids import RequestId
from protocol.kv_layout import PageFormat
from protocol.sampling import SamplingParams

_CHUNKS = ((6, 4), (4, 2))
"""Tokens of each prompt in the first and in the second step."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Norm of the difference of two rows of logits, relative to the norm of the row, at most, in the median of a chunk.
Rounding stays far below; attention that sees the wrong tokens is beyond 0.5."""

_SPAN = 1 << 18
"""Positions that a mask's rule is asked for at once: the memory it takes does not grow with the model's length."""


class _MaskRecorder:
    """An AttentionHandler that keeps each layer's mask and lets no token see another."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.masks.append(call.mask)
        return torch.zeros_like(call.query).transpose(1, 2)


class SelfCheck:
    """Used once, in this order: run_reference, windows, compare."""

    def __init__(
        self,
        settings: PretrainedConfig,
        shape: ModelShape,
        block_size: int,
        device: torch.device,
        page_format: PageFormat = "plain",
    ) -> None:
        self._settings = settings
        self._shape = shape
        self._block_size = block_size
        self._page_format: PageFormat = page_format
        self._device = device
        generator = torch.Generator().manual_seed(0)
        lengths = [sum(chunks) for chunks in _CHUNKS]
        self._prompts = [torch.randint(shape.vocab_size, (length,), generator=generator) for length in lengths]
        self._expected: list[torch.Tensor] = []
        self.largest_error = 0.0

    @property
    def num_blocks(self) -> int:
        """What `compare` needs of a cache."""
        return sum(-(-len(prompt) // self._block_size) for prompt in self._prompts)

    def run_reference(self, model: PreTrainedModel) -> None:
        """The library's own logits. `model` as it was loaded, for `route.value`. Raises ConfigError where they are not
        finite: weights are damaged, or too large for the dtype."""
        with torch.inference_mode():
            for prompt in self._prompts:
                logits = self._plain_forward(model, prompt)
                self._require_finite(logits, "")
                self._expected.append(logits)

    def windows(self, model: PreTrainedModel, max_model_len: int) -> tuple[int, ...]:
        """Each layer's sliding window, 0 for none. Leaves `model` set to another attention function. Raises ConfigError
        where a layer sees anything else than its past, or a last part of it."""
        try:
            windows = self._windows(model, max_model_len)
        except LIBRARY_ERRORS as error:
            raise refusal(self._settings, f"its attention masks cannot be examined: {first_line(error)}") from error
        self._check_cache(windows, max_model_len)
        return windows

    def compare(self, model: Model, kv_cache: torch.Tensor) -> None:
        """Raises ConfigError unless the model's logits are those of the library."""
        starts = [0] * len(self._prompts)
        for step in range(len(_CHUNKS[0])):
            chunks = [self._chunk(row, starts[row], _CHUNKS[row][step]) for row in range(len(self._prompts))]
            inputs = build_step_inputs(chunks, self._block_size, self._device)
            inputs = replace(inputs, sampling_rows=torch.arange(len(inputs.token_ids), device=self._device))
            try:
                with torch.inference_mode():
                    logits = model.forward(inputs, kv_cache, self._page_format)
            except ConfigError as error:
                raise refusal(self._settings, error.message) from error
            except LIBRARY_ERRORS as error:
                raise refusal(self._settings, f"it fails over a paged cache: {first_line(error)}") from error
            first = 0
            for row, chunk in enumerate(chunks):
                end = chunk.start + len(chunk.token_ids)
                self._compare(logits[first : first + end - chunk.start], self._expected[row][chunk.start : end])
                first, starts[row] = first + end - chunk.start, end

    def _windows(self, model: PreTrainedModel, max_model_len: int) -> tuple[int, ...]:
        recorder, route = _MaskRecorder(), self._shape.route
        if route is Route.INTERFACE:
            model.set_attn_implementation(MASKED)
        with torch.inference_mode(), attention_by(recorder, route):
            self._plain_forward(model, self._prompts[0])
        known: dict[int, int] = {}  # by the mask's identity: layers share masks
        for mask in recorder.masks:
            if id(mask) not in known:
                known[id(mask)] = self._window(mask, max_model_len)
        return tuple(known[id(mask)] for mask in recorder.masks)

    def _plain_forward(self, model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens of one prompt, [num_tokens, vocab_size], in the dtype of the model."""
        tokens = prompt.unsqueeze(0).to(self._device)
        positions = torch.arange(len(prompt), device=self._device).unsqueeze(0)
        try:
            output = model(input_ids=tokens, position_ids=positions, use_cache=False)
        except ConfigError as error:
            raise refusal(self._settings, error.message) from error
        except LIBRARY_ERRORS as error:
            raise refusal(self._settings, f"its forward pass fails: {first_line(error)}") from error
        logits: torch.Tensor = output.logits[0]
        return logits

    def _chunk(self, row: int, start: int, num_tokens: int) -> ScheduledChunk:
        blocks_before = sum(-(-len(prompt) // self._block_size) for prompt in self._prompts[:row])
        num_blocks = -(-(start + num_tokens) // self._block_size)
        return ScheduledChunk(
            request_id=RequestId(f"self-check-{row}"),
            token_ids=self._prompts[row][start : start + num_tokens].tolist(),
            start=start,
            block_ids=range(blocks_before, blocks_before + num_blocks),
            samples=True,
            output_position=0,
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
            prompt_token_ids=(),
            output_token_ids=(),
        )

    def _compare(self, logits: torch.Tensor, expected: torch.Tensor) -> None:
        self._require_finite(logits, "over a paged cache ")
        errors = (logits - expected).norm(dim=1) / expected.float().norm(dim=1)
        error = float(errors.median())
        if not error <= _TOLERANCE[expected.dtype]:
            raise refusal(
                self._settings,
                f"over a paged cache its logits are off by {error:.0%}: it does more than attend to tokens",
            )
        self.largest_error = max(self.largest_error, error)

    def _require_finite(self, logits: torch.Tensor, where: str) -> None:
        if not bool(logits.isfinite().all()):
            raise refusal(self._settings, f"{where}its logits are not finite in {logits.dtype}")

    def _check_cache(self, windows: tuple[int, ...], max_model_len: int) -> None:
        """A few models have masks that see all and leave it to the library's cache to forget: there the library itself
        gives one answer with a cache and another without."""
        try:
            layers = DynamicCache(config=self._settings).layers
        except LIBRARY_ERRORS as error:
            raise refusal(self._settings, f"the library has no cache for it: {first_line(error)}") from error
        kept = [getattr(layer, "sliding_window", None) or max_model_len for layer in layers]
        seen = [window or max_model_len for window in windows]
        if len(kept) != len(seen) or any(kept < needed for kept, needed in zip(kept, seen, strict=True)):
            raise refusal(self._settings, "the library's cache forgets tokens that its attention mask sees")

    def _window(self, mask: torch.Tensor | None, max_model_len: int) -> int:
        if self._shape.route is Route.TORCH:
            tokens = torch.arange(len(self._prompts[0]))
            causal = tokens[:, None] >= tokens[None, :]
            if mask is not None and not bool((mask.cpu() == causal).all()):
                raise refusal(self._settings, "its attention mask is not the causal one")
            return 0
        rule = getattr(mask, "rule", None) if isinstance(mask, RuledMask) else None
        if rule is None:
            raise refusal(self._settings, "it makes attention masks of its own")
        window = window_of(rule, max_model_len)
        if window is None:
            raise refusal(self._settings, "its attention mask is neither causal nor a sliding window (chunks, say)")
        return window


def window_of(rule: MaskRule, num_positions: int) -> int | None:
    """The sliding window that a mask's rule is equal to, 0 for plain causality; None where it is neither.

    The window is what the last position sees. The rule is compared at the edges of windows and around powers of two.
    """
    last = torch.tensor([num_positions - 1])
    spans = (torch.arange(start, min(start + _SPAN, num_positions)) for start in range(0, num_positions, _SPAN))
    seen = sum(int(_visible(rule, last, span).sum()) for span in spans)
    window = 0 if seen == num_positions else seen
    edges = {edge for power in range(num_positions.bit_length()) for edge in _around(1 << power)}
    edges |= {edge for multiple in (1, 2, 3) for edge in _around(multiple * window)} | {num_positions - 1}
    positions = torch.tensor(sorted(edge for edge in edges if 0 <= edge < num_positions))
    distance = positions[:, None] - positions[None, :]
    expected = (distance >= 0) & (distance < (window or num_positions))
    return window if torch.equal(_visible(rule, positions, positions), expected) else None


def _around(position: int) -> tuple[int, int, int]:
    return position - 1, position, position + 1


def _visible(rule: MaskRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[len(queries), len(keys)], bool"""
    zero = torch.zeros((), dtype=torch.int64)
    visible = rule(zero, zero, queries[:, None], keys[None, :])
    return visible.expand(len(queries), len(keys))
