"""Progress: what one request's log line and metrics say about it, gathered while it runs."""

import logging

from protocol.errors import HeadraceError
from router.generation import Generation
from router.text_choice import Delta
from runtime.clock import Clock
from runtime.metrics import RouterMetrics, observe_phases

log = logging.getLogger(__name__)


class Progress:
    def __init__(self, metrics: RouterMetrics, clock: Clock, endpoint: str, request_id: str, model: str) -> None:
        self._metrics = metrics
        self._clock = clock
        self._endpoint = endpoint
        self._request_id = request_id
        self._model = model
        self._arrived_at = clock.now()
        self._first_sent_s: float | None = None
        self._last_sent_at: dict[int, float] = {}
        self._finish_reasons: dict[int, str] = {}
        self._error: HeadraceError | None = None
        self.generation: Generation | None = None

    @property
    def arrived_at(self) -> float:
        return self._arrived_at

    def sent(self, delta: Delta) -> None:
        """This went out to the client just now."""
        now = self._clock.now()
        if delta.tokens:
            if self._first_sent_s is None:
                self._first_sent_s = now - self._arrived_at
                self._metrics.ttft_seconds.observe(self._first_sent_s)
            earlier = self._last_sent_at.get(delta.index)
            if earlier is not None:
                gap_s = (now - earlier) / len(delta.tokens)
                for _ in delta.tokens:
                    self._metrics.itl_seconds.observe(gap_s)
            self._last_sent_at[delta.index] = now
        if delta.finish is not None:
            self._finish_reasons[delta.index] = delta.finish.reason
            observe_phases(self._metrics.phases, delta.finish.phases)

    def failed(self, error: HeadraceError) -> None:
        self._error = error

    def close(self) -> None:
        """One line, whatever became of the request."""
        total_s = self._clock.now() - self._arrived_at
        status = 200 if self._error is None else self._error.status
        self._metrics.requests.labels(self._endpoint, str(status)).inc()
        generation = self.generation
        prompt_tokens = output_tokens = cached_tokens = 0
        if generation is not None:
            prompt_tokens = generation.num_prompt_tokens
            output_tokens, cached_tokens = generation.num_output_tokens, generation.num_cached_tokens
            self._count(generation, total_s)
        facts: dict[str, object] = {
            "request_id": self._request_id,
            "model": self._model,
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "output_tokens": output_tokens,
            "finish": self._outcome(),
            "ms": round(1000 * total_s, 1),
        }
        if self._first_sent_s is not None:
            facts["ttft_ms"] = round(1000 * self._first_sent_s, 1)
        log.info("request over", extra=facts)

    def _outcome(self) -> str:
        if self._error is not None:
            return self._error.code
        return ",".join(sorted(set(self._finish_reasons.values()))) or "-"

    def _count(self, generation: Generation, total_s: float) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(generation.num_prompt_tokens)
        metrics.prompt_length_tokens.observe(generation.num_prompt_tokens)
        metrics.completion_tokens.inc(generation.num_output_tokens)
        if self._error is None:
            metrics.e2e_seconds.observe(total_s)
        for run in generation.runs:
            run.count(metrics)
