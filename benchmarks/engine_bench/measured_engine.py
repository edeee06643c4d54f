"""MeasuredEngine: the engine of a node, built as a node builds it, and driven through its commands and events.

Everything that a step costs is inside the figures: scheduling, preparing tensors, the model, sampling, events. Long
contexts need no prefill before decode is measured: IMPORT requests reserve blocks, whose memory holds random numbers.
"""

import queue
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from engine.build import build_engine, plan_engine
from engine.events import EngineEvent, Failed, Finished, Reserved, TokensSampled
from engine.load import EngineLoad
from engine.model.options import TORCH_DTYPES
from engine.request import EngineRequest, Mode
from protocol.ids import Incarnation, RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.config import load_config
from runtime.node_config import NodeConfig

DECODE_SLACK = 32  # steps beyond those wanted, so that the last to join still leaves enough full ones
STOP_TIMEOUT_S = 30.0
EVENT_TIMEOUT_S = 600.0
_NOISE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """Steps in which every stream got a token, and nothing else ran. `phases`: seconds of a mean step by phase, as the
    engine itself accounts for them (engine.step_times)."""

    tokens_per_s: float
    phases: dict[str, float]


class MeasuredEngine:
    """`settings` are dotted keys of a node's configuration; the KV cache holds `tokens_held` tokens and a little more.

    Started by the constructor; `close` ends its thread. Raises ConfigError for a setting that this engine does not have.
    """

    def __init__(self, settings: Mapping[str, object], tokens_held: int) -> None:
        block_size = load_config(NodeConfig, None, settings, {}).cache.block_size
        num_blocks = tokens_held // block_size + 256
        config = load_config(NodeConfig, None, {**settings, "cache.num_blocks": num_blocks}, {})
        plan = plan_engine(config)
        memory = torch.empty(plan.num_blocks * plan.layout.block_bytes, dtype=torch.uint8)
        _fill_with_noise(memory.view(TORCH_DTYPES[plan.layout.dtype]))
        built = build_engine(config, plan, Incarnation("bench"), memory)
        self.vocab_size = built.model.vocab_size
        self._engine = built.engine
        self._events: queue.SimpleQueue[tuple[float, list[EngineEvent]]] = queue.SimpleQueue()
        self._numbers = count()
        self._random = random.Random(0)
        self._engine.start(lambda events: self._events.put((time.perf_counter(), events)))

    def close(self) -> None:
        self._engine.stop(STOP_TIMEOUT_S)

    def submit(
        self, prompt: Sequence[int], max_tokens: int, mode: Mode = Mode.GENERATE, temperature: float = 0.0
    ) -> RequestId:
        """Neither stop tokens nor a prefix shared with another request, unless the prompt brings one."""
        request_id = RequestId(f"bench-{next(self._numbers)}")
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=temperature)
        self._engine.submit(EngineRequest(request_id, tuple(prompt), sampling, mode))
        return request_id

    def random_prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(100, self.vocab_size) for _ in range(num_tokens)]

    def next_events(self, timeout_s: float = EVENT_TIMEOUT_S) -> tuple[float, list[EngineEvent]]:
        """What happened, and when the engine said so. Nothing, now, after the timeout. Raises what a request failed with."""
        try:
            at, events = self._events.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return time.perf_counter(), []
        for event in events:
            if isinstance(event, Failed):
                raise event.error
        return at, events

    def load(self) -> EngineLoad:
        return self._engine.load()

    def clear_prefix_cache(self) -> None:
        self._engine.clear_prefix_cache()

    def prefill(self, tokens: int, repeats: int) -> float:
        """Prompt tokens a second, from `submit` to the first token: the best of some fresh prompts, one after the other."""
        best_s = float("inf")
        for _ in range(repeats):
            prompt = self.random_prompt(tokens)
            sent_at = time.perf_counter()
            self.submit(prompt, max_tokens=1)
            first_at, _ = next(self._until_finished(1))
            best_s = min(best_s, first_at - sent_at)
        return tokens / best_s

    def decode(self, context: int, streams: int, steps: int) -> float:
        """Output tokens a second of all streams together."""
        return self.decode_window(context, streams, steps).tokens_per_s

    def decode_window(self, context: int, streams: int, steps: int) -> DecodeWindow:
        max_tokens = steps + DECODE_SLACK
        request_ids = [self.submit(self.random_prompt(context), max_tokens, Mode.IMPORT) for _ in range(streams)]
        num_reserved = 0
        while num_reserved < streams:
            num_reserved += sum(isinstance(event, Reserved) for event in self.next_events()[1])
        for request_id in request_ids:
            self._engine.activate(request_id, SampledToken(100), None)
        full: list[tuple[float, EngineLoad]] = []
        for at, events in self._until_finished(streams):
            if _num_decoded(events) == streams:
                full.append((at, self._engine.load()))
        num_steps = len(full) - 1
        assert num_steps >= steps, f"{num_steps} full steps"
        (started_at, before), (ended_at, after) = full[0], full[-1]
        spent, spent_before = after.times.by_phase(), before.times.by_phase()
        return DecodeWindow(
            tokens_per_s=num_steps * streams / (ended_at - started_at),
            phases={phase: (spent[phase] - spent_before[phase]) / num_steps for phase in spent},
        )

    def step_phases(self, context: int, streams: int, steps: int) -> dict[str, float]:
        """Seconds of a mean decode step by phase."""
        return self.decode_window(context, streams, steps).phases

    def generate(self, prompt: Sequence[int], max_tokens: int, temperature: float = 0.0) -> tuple[list[int], float]:
        """One sequence alone: its tokens, and the seconds from the first of them to the last."""
        self.submit(prompt, max_tokens, temperature=temperature)
        tokens: list[int] = []
        arrivals: list[float] = []
        for at, events in self._until_finished(1):
            new = [token.token_id for event in events if isinstance(event, TokensSampled) for token in event.tokens]
            tokens += new
            arrivals += [at] * bool(new)
        return tokens, arrivals[-1] - arrivals[0]

    def _until_finished(self, num_requests: int) -> Iterator[tuple[float, list[EngineEvent]]]:
        num_finished = 0
        while num_finished < num_requests:
            at, events = self.next_events()
            num_finished += sum(isinstance(event, Finished) for event in events)
            yield at, events


def _num_decoded(events: list[EngineEvent]) -> int:
    """Tokens that a step drew: the first of an imported sequence was drawn elsewhere."""
    return sum(len(event.tokens) for event in events if isinstance(event, TokensSampled) and event.index > 0)


def _fill_with_noise(cache: torch.Tensor) -> None:
    """Touches all of it, with finite numbers of ordinary size."""
    noise = torch.randn(_NOISE_ELEMENTS).to(cache.dtype)
    for start in range(0, cache.numel(), _NOISE_ELEMENTS):
        part = cache[start : start + _NOISE_ELEMENTS]
        part.copy_(noise[: part.numel()])
