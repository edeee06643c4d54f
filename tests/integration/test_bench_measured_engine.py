"""What the engine benchmarks drive: the engine behind its commands and events, in this process and in one of its own."""

import sys
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, greedy_reference, load_reference, make_model

from benchmarks.engine_bench.burst_load import run_burst_load
from benchmarks.engine_bench.child import Child, ChildFailed
from benchmarks.engine_bench.measured_engine import MeasuredEngine

CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from child_loop import serve
print("for the log")
serve(lambda: {"double": lambda number: 2 * number, "fail": lambda: 1 / 0})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(model: Path):
    settings = {"model.model": str(model), "model.dtype": "float32", "model.threads": 1}
    engine = MeasuredEngine({**settings, "scheduler.max_num_batched_tokens": 64}, tokens_held=2000)
    yield engine
    engine.close()


class TestMeasuredEngine:
    def test_rates_are_positive(self, engine: MeasuredEngine) -> None:
        assert engine.prefill(tokens=100, repeats=2) > 0
        assert engine.decode(context=50, streams=3, steps=5) > 0

    def test_phases_of_a_step_are_seconds(self, engine: MeasuredEngine) -> None:
        phases = engine.step_phases(context=50, streams=3, steps=5)
        assert {"schedule", "prepare", "compute", "sample", "emit"} <= set(phases)
        assert 0 < sum(phases.values()) < 1

    def test_generate_gives_the_models_own_tokens(self, engine: MeasuredEngine, model: Path) -> None:
        prompt = engine.random_prompt(30)
        tokens, seconds = engine.generate(prompt, 12)
        assert tokens == greedy_reference(load_reference(model), prompt, 12)
        assert seconds > 0

    def test_every_burst_and_every_stream_is_accounted_for(self, engine: MeasuredEngine) -> None:
        outcome = run_burst_load(
            engine,
            num_streams=2,
            prompt_tokens=10,
            output_tokens=20,
            burst_tokens=150,
            interval_s=0.3,
            num_bursts=2,
        )
        ttfts, gaps = outcome["burst_ttfts"], outcome["stream_gaps"]
        assert isinstance(ttfts, list)
        assert isinstance(gaps, list)
        assert len(ttfts) == 2
        assert [len(stream) > 0 for stream in gaps] == [True, True]
        assert engine.load().running == 0

    def test_random_prompts_are_in_the_vocabulary(self, engine: MeasuredEngine) -> None:
        assert max(engine.random_prompt(1000)) < VOCAB_SIZE


class TestChild:
    def test_answers_and_ends(self, tmp_path: Path) -> None:
        with self.start(tmp_path) as child:
            child.wait_ready()
            assert child.ask("double", number=4) == 8
            assert child.cpu_s() >= 0

    def test_says_why_it_ended(self, tmp_path: Path) -> None:
        with self.start(tmp_path) as child:
            child.wait_ready()
            with pytest.raises(ChildFailed, match="ZeroDivisionError"):
                child.ask("fail")

    def start(self, folder: Path) -> Child:
        loop = Path(__file__).parents[2] / "benchmarks" / "engine_bench"
        return Child("child", [sys.executable, "-c", CHILD, str(loop)], {}, folder)
