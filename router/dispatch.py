"""SequenceRun: the life of one sequence, from its prompt to its last token, over as many attempts as it takes.

There is one way to recover, whatever broke: dispatch prompt, emitted tokens and sampling parameters again, elsewhere, under a
new request id. Randomness depends on seed and position alone, so the answer goes on token for token. Attempts are bounded
by the configured retries, by the nodes that are left or come (back) within the configured wait, and by the request's
deadline.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from protocol.errors import NodeLost, NoWorker, Overloaded
from protocol.ids import Incarnation, TraceId
from protocol.phases import PhaseLedger
from protocol.sampling import SamplingParams
from protocol.tokens import FinishReason, SampledToken
from router.attempt import Attempt, AttemptFailed
from router.cluster import Cluster, Route
from router.ledger import Ledger
from runtime.clock import Clock, Deadline
from runtime.metrics import RouterMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SequenceJob:
    """What to run. `arrived_at` is when the client's request came, on the router's clock."""

    trace_id: TraceId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str | None
    deadline: Deadline
    arrived_at: float


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    reason: FinishReason
    stop_token_id: int | None


class SequenceRun:
    """`tokens()` once; then `end` says how it ended (None if the caller stopped early). `num_cached_tokens`: of the prompt, when
    the answer began; full blocks."""

    def __init__(self, cluster: Cluster, job: SequenceJob, retries: int, clock: Clock) -> None:
        self._cluster = cluster
        self._job = job
        self._retries = retries
        self._emitted: list[int] = []
        self._avoid: set[Incarnation] = set()
        self._lost: set[Incarnation] = set()
        self._overloaded: Overloaded | None = None
        self._prefill_overloaded = False
        self._decisions: list[str] = []
        self._failures: list[str] = []
        self._ledger = Ledger(clock, job.arrived_at)
        self.end: SequenceEnd | None = None
        self.num_cached_tokens = 0
        self._expected_cached_tokens = 0

    @property
    def first_token_s(self) -> float | None:
        return self._ledger.first_token_s

    def phases(self) -> PhaseLedger:
        return self._ledger.close()

    def count(self, metrics: RouterMetrics) -> None:
        """What became of the decisions made for this sequence. Cached tokens that lag behind expected ones say that the
        index is wrong about the nodes."""
        for decision in self._decisions:
            metrics.decisions.labels(decision).inc()
        for code in self._failures:
            metrics.retries.labels(code).inc()
        metrics.cached_tokens.inc(self.num_cached_tokens)
        metrics.expected_cached_tokens.inc(self._expected_cached_tokens)

    async def tokens(self) -> AsyncGenerator[list[SampledToken]]:
        """Output tokens in order, each once. Raises the HeadraceError that ended the sequence. Closing the iterator
        cancels it on every node."""
        failures = 0
        while (end := self._end_already()) is None:
            self._job.deadline.check("running the request")
            route = await self._route()
            begins = not self._emitted
            attempt = self._start(route)
            try:
                async with aclosing(attempt.run()) as batches:
                    async for batch in batches:
                        yield batch
                finished = attempt.finished
                assert finished is not None, "an attempt ends by finishing or by raising"
                end = SequenceEnd(finished.reason, finished.stop_token_id)
                break
            except AttemptFailed as failed:
                failures += 0 if failed.refused else 1
                self._note_failure(failed, route)
                if failures > self._retries:
                    raise failed.error from failed
            finally:
                if begins:  # the others find what the earlier ones computed, of the answer as well
                    self.num_cached_tokens = attempt.num_cached_tokens
        self.end = end

    def _end_already(self) -> SequenceEnd | None:
        """A node may be lost between the last token and the word that it was the last."""
        if not self._emitted:
            return None
        sampling, last = self._job.sampling, self._emitted[-1]
        if last in sampling.stop_token_ids and len(self._emitted) > sampling.min_tokens:
            return SequenceEnd("stop", last)
        return SequenceEnd("length", None) if len(self._emitted) >= sampling.max_tokens else None

    async def _route(self) -> Route:
        """Wait for a node if there is none. Raises NoWorker (or the Overloaded of those there are) when none has come."""
        patience_s = min(self._cluster.worker_wait_s, self._job.deadline.remaining_s)
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        return self._route_now()
                    except NoWorker:
                        if self._overloaded is not None and not self._emitted:
                            raise self._overloaded from None  # the client can wait as well as we can
                        await self._cluster.changed()
        except TimeoutError:
            self._job.deadline.check("waiting for a node")
        try:
            return self._route_now()
        except NoWorker as error:
            raise (self._overloaded or error) from error

    def _route_now(self) -> Route:
        try:
            route = self._decide()
        except NoWorker:
            back = {node for node in self._lost if self._cluster.is_reachable(node)}
            if not back:
                raise
            self._lost -= back
            self._avoid -= back
            route = self._decide()
        if route.prefill is None and self._prefill_overloaded and self._overloaded is not None:
            raise self._overloaded  # what prefill nodes have no room for is not to slow the decode nodes down
        return route

    def _decide(self) -> Route:
        job = self._job
        return self._cluster.route(
            [*job.prompt_token_ids, *self._emitted],
            job.cache_salt,
            tokens_left=job.sampling.max_tokens - len(self._emitted),
            avoid=self._avoid,
        )

    def _start(self, route: Route) -> Attempt:
        job = self._job
        if not self._decisions:
            self._expected_cached_tokens = route.cached_tokens
        self._decisions.append("local" if route.prefill is None else "remote")
        return Attempt(
            self._cluster,
            route,
            trace_id=job.trace_id,
            prompt_token_ids=job.prompt_token_ids,
            emitted=self._emitted,
            sampling=job.sampling,
            cache_salt=job.cache_salt,
            deadline=job.deadline,
            ledger=self._ledger,
        )

    def _note_failure(self, failed: AttemptFailed, route: Route) -> None:
        self._avoid.add(failed.avoid)
        if isinstance(failed.error, NodeLost):
            self._lost.add(failed.avoid)
        self._failures.append(failed.error.code)
        if failed.refused and isinstance(failed.error, Overloaded):
            self._overloaded = failed.error
            self._prefill_overloaded |= route.prefill is not None and route.prefill.incarnation == failed.avoid
        log.warning(
            "request %s: attempt %d failed after %d tokens, trying elsewhere: %s",
            self._job.trace_id,
            len(self._decisions),
            len(self._emitted),
            failed.error.message,
        )
