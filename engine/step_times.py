"""StepTimes: where the engine's thread has spent its steps. Sums since the start, so that a share is a quotient of two of them.

    schedule   decide what a step computes
    prepare    turn the plan into the model's inputs
    compute    the rest of what the runner takes; while the device is ahead of the engine, waiting for it
    sample     draw tokens and read them back
    emit       turn results into events and hand them on

The engine sleeps outside of all of them.
"""

from dataclasses import dataclass, fields

from engine.runner import StepResult


@dataclass(slots=True)
class StepTimes:
    """Changed by the engine's thread; others get copies."""

    schedule_s: float = 0.0
    prepare_s: float = 0.0
    compute_s: float = 0.0
    sample_s: float = 0.0
    emit_s: float = 0.0

    def by_phase(self) -> dict[str, float]:
        """Seconds, in the order in which the phases of a step follow each other."""
        return {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self)}

    def waited(self, seconds: float, result: StepResult) -> None:
        """The results of a step have come after so much waiting. What they say was not computing may have been spent at its
        launch, which has been counted as computing."""
        self.prepare_s += result.prepare_s
        self.sample_s += result.sample_s
        self.compute_s += seconds - result.prepare_s - result.sample_s
