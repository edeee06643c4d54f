"""DeviceStep: a launched step, from the host's side. It knows what was asked for, and waits for nothing but its own end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.cuda.device import Completion
from engine.cuda.outputs import OutputRecords
from engine.runner import ScheduledChunk, StepPlan, StepResult, standing
from protocol.errors import HeadraceError
from protocol.ids import RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken


@dataclass(frozen=True, slots=True)
class Draws:
    """What is kept of one chunk of the plan, whose own views end with the launch."""

    request_id: RequestId
    num_rows: int
    drafts: tuple[int, ...]
    sampling: SamplingParams
    output_position: int

    @classmethod
    def of(cls, chunk: ScheduledChunk) -> "Draws":
        drafts = tuple(chunk.drafts)
        return cls(chunk.request_id, chunk.num_rows, drafts, chunk.sampling, chunk.output_position)


class DeviceStep:
    """Implements engine.runner.LaunchedStep. `on_end` is told which requests failed, all or none, when `records` is free
    for another step."""

    def __init__(
        self,
        plan: StepPlan,
        records: OutputRecords,
        completion: Completion,
        on_end: Callable[[Sequence[RequestId]], None],
        launch_s: float,
    ) -> None:
        self._draws = [Draws.of(chunk) for chunk in plan.chunks]
        self._records = records
        self._completion = completion
        self._on_end = on_end
        self._launch_s = launch_s

    def result(self) -> StepResult:
        failed: list[RequestId] = [draws.request_id for draws in self._draws]
        try:
            self._completion.wait()
            ended_at = time.perf_counter()
            sampled = self._sampled()
            failed = []
        finally:
            self._on_end(failed)
        return StepResult(sampled, prepare_s=self._launch_s, sample_s=time.perf_counter() - ended_at)

    def _sampled(self) -> tuple[tuple[SampledToken, ...] | HeadraceError, ...]:
        params = [draws.sampling for draws in self._draws for _ in range(draws.num_rows)]
        positions = [draws.output_position + row for draws in self._draws for row in range(draws.num_rows)]
        drawn = iter(self._records.read(params, positions))
        return tuple(
            standing([next(drawn) for _ in range(draws.num_rows)], draws.drafts) if draws.num_rows else ()
            for draws in self._draws
        )
