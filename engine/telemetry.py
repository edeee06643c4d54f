"""EngineTelemetry: what a process tells others about its engine: metrics, load, and whether it is stuck."""

import math

from engine.engine import Engine
from engine.step_times import StepTimes
from protocol.workers import WorkerLoad
from runtime.metric_feeds import Total
from runtime.metrics import EngineMetrics

STUCK_AFTER_S = 60.0
"""A step takes milliseconds to seconds. Work pending and no step ended for this long means that the loop hangs."""


class EngineTelemetry:
    def __init__(self, engine: Engine, metrics: EngineMetrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._steps = Total(metrics.steps)
        self._computed = Total(metrics.computed_prompt_tokens)
        self._cached = Total(metrics.cached_prompt_tokens)
        self._imported = Total(metrics.imported_prompt_tokens)
        self._loaded = Total(metrics.loaded_prompt_tokens)
        self._lost = Total(metrics.lost_blocks)
        self._sampled = Total(metrics.generated_tokens)
        self._preemptions = Total(metrics.preemptions)
        self._phases = {phase: Total(metrics.step_seconds.labels(phase)) for phase in StepTimes().by_phase()}
        self._drafts = Total(metrics.draft_tokens)
        self._accepted = Total(metrics.accepted_tokens)

    def update(self) -> None:
        """Bring the metrics up to date with the engine's last finished step."""
        load = self._engine.load()
        self._metrics.running.set(load.running)
        self._metrics.waiting.set(load.waiting)
        self._metrics.waiting_tokens.set(load.waiting_tokens)
        self._metrics.free_blocks.set(load.free_blocks)
        self._metrics.total_blocks.set(load.total_blocks)
        self._steps.set(load.steps)
        self._computed.set(load.computed_prompt_tokens)
        self._cached.set(load.cached_prompt_tokens)
        self._imported.set(load.imported_prompt_tokens)
        self._loaded.set(load.loaded_prompt_tokens)
        self._lost.set(load.lost_blocks)
        self._metrics.offered_blocks.set(load.num_offered_blocks)
        self._sampled.set(load.sampled_tokens)
        self._preemptions.set(load.preemptions)
        for phase, seconds in load.times.by_phase().items():
            self._phases[phase].set(seconds)
        self._drafts.set(load.draft_tokens)
        self._accepted.set(sum(number * count for number, count in enumerate(load.accepted_drafts)))
        self._metrics.accepted_length.set(load.accepted_drafts)

    def worker_load(self, draining: bool) -> WorkerLoad:
        load = self._engine.load()
        return WorkerLoad(
            running=load.running + load.num_importing,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            steps=load.steps,
            draining=draining,
        )

    def idle(self) -> bool:
        """Nothing admitted, imported, or held for a reader or the store."""
        load = self._engine.load()
        busy = load.running + load.waiting + load.num_importing
        return busy + load.num_held + load.num_pins + load.num_offered_blocks == 0

    def stuck(self) -> str | None:
        """Why the node should be restarted, None if there is no reason."""
        silent_s = self._engine.last_progress_s()
        if math.isinf(silent_s):
            return "the engine's loop has died; see the log"
        if silent_s < STUCK_AFTER_S:
            return None
        return f"no engine step has ended for {silent_s:.0f} s"
