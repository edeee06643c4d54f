"""Burst load: a steady set of decode streams, and long prompts that fall into it at fixed instants.

A stream is one request after another, so that there are always as many. Long prompts come by the clock whatever the
engine does (open loop), and their TTFT counts from the instant at which they were due.
"""

import time
from dataclasses import asdict, dataclass, field

from benchmarks.engine_bench.measured_engine import MeasuredEngine
from engine.events import EngineEvent, Finished, TokensSampled
from protocol.ids import RequestId


@dataclass(frozen=True, slots=True)
class BurstLoad:
    """`num_bursts` prompts of `burst_tokens` tokens, every `interval_s` seconds, the first after half an interval."""

    num_streams: int
    prompt_tokens: int
    output_tokens: int
    burst_tokens: int
    interval_s: float
    num_bursts: int

    @property
    def duration_s(self) -> float:
        return self.num_bursts * self.interval_s


@dataclass(slots=True)
class BurstOutcome:
    """Seconds. `stream_gaps[i]` are the times between successive tokens of stream i, within each of its requests."""

    stream_gaps: list[list[float]]
    burst_ttfts: list[float] = field(default_factory=list)


class _BurstRun:
    def __init__(self, engine: MeasuredEngine, load: BurstLoad) -> None:
        self._engine = engine
        self._load = load
        self._streams: dict[RequestId, int] = {}
        self._last_token_at: dict[RequestId, float] = {}
        self._bursts: dict[RequestId, float] = {}
        self.outcome = BurstOutcome([[] for _ in range(load.num_streams)])

    def run(self) -> BurstOutcome:
        load = self._load
        for stream in range(load.num_streams):
            # The first requests end at different times, so that their successors' prompts do not coincide.
            self._start_stream(stream, load.output_tokens * (stream + 1) // load.num_streams)
        started_at = time.perf_counter()
        due_at = [started_at + (index + 0.5) * load.interval_s for index in range(load.num_bursts)]
        end_at = started_at + load.duration_s
        while (now := time.perf_counter()) < end_at or self._bursts:
            if due_at and now >= due_at[0]:
                prompt = self._engine.random_prompt(load.burst_tokens)
                self._bursts[self._engine.submit(prompt, max_tokens=1)] = due_at.pop(0)
                continue
            until = due_at[0] if due_at else max(end_at, now + load.interval_s if self._bursts else end_at)
            self._hear(*self._engine.next_events(until - now))
        self._drain()
        return self.outcome

    def _start_stream(self, stream: int, num_tokens: int) -> None:
        prompt = self._engine.random_prompt(self._load.prompt_tokens)
        self._streams[self._engine.submit(prompt, max(2, num_tokens))] = stream

    def _hear(self, at: float, events: list[EngineEvent], *, go_on: bool = True) -> None:
        for event in events:
            match event:
                case TokensSampled(request_id) if request_id in self._bursts:
                    self.outcome.burst_ttfts.append(at - self._bursts.pop(request_id))
                case TokensSampled(request_id) if request_id in self._streams:
                    last_at = self._last_token_at.get(request_id)
                    if last_at is not None and go_on:
                        self.outcome.stream_gaps[self._streams[request_id]].append(at - last_at)
                    self._last_token_at[request_id] = at
                case Finished(request_id) if request_id in self._streams:
                    stream = self._streams.pop(request_id)
                    if go_on:
                        self._start_stream(stream, self._load.output_tokens)

    def _drain(self) -> None:
        """What still runs ends, unmeasured."""
        while self._streams:
            self._hear(*self._engine.next_events(), go_on=False)


def run_burst_load(engine: MeasuredEngine, **load: float) -> dict[str, object]:
    """The load's fields in, the outcome's out."""
    return asdict(_BurstRun(engine, BurstLoad(**load)).run())  # type: ignore[arg-type]  # numbers from JSON
