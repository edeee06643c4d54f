"""CudaRunner on the host's own Device: token for token what TorchRunner gives, for whatever a batch may hold.

The device runs late: nothing is computed before somebody waits for it, as on a GPU that lags behind. Its captured steps are
replayed from a tape of operations, without the code that recorded them.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_ops import HostAsked, TapeDevice, captured_operations, gpu_operations
from runner_driver import Driver, Sequence
from tiny_models import SHAPE, make_model, write_model
from transformers import LlamaConfig

from engine.config import EngineConfig, SpeculationConfig
from engine.core import EngineCore
from engine.cuda.build import trial_runner
from engine.cuda.device import Device, HostDevice
from engine.cuda.limits import BatchLimits
from engine.cuda.runner import CudaRunner
from engine.cuda.trial_plans import largest_plan
from engine.events import Failed, TokensSampled
from engine.kv_event_log import KVEventLog
from engine.model.llama import LlamaModel, StepInputs
from engine.model.options import RunnerOptions, plan_layout
from engine.request import EngineRequest
from engine.runner import PENDING, Runner, ScheduledChunk, StepPlan
from engine.torch_runner import TorchRunner, build_torch_runner
from protocol.errors import InternalError
from protocol.ids import Incarnation, RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.clock import ManualClock
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import resolve_model

MAX_MODEL_LEN = 256
OPTIONS = RunnerOptions(dtype="float32", device="cpu", num_blocks=40, max_model_len=MAX_MODEL_LEN)
LIMITS = BatchLimits(max_num_seqs=9, max_num_batched_tokens=128)
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}
VARIANTS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "min-p": {"temperature": 1.2, "min_p": 0.02, "seed": 6},
    "logprobs": {"logprobs": 3},
    "penalties": {**SAMPLED, "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    "bias": {**SAMPLED, "logit_bias": {7: 4.0, 9: -100.0}},
    "min-tokens": {"min_tokens": 6, "stop_token_ids": tuple(range(2, 200))},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return resolve_model(str(make_model("mistral", tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def model(files: ModelFiles) -> Iterator[LlamaModel]:
    with captured_operations():
        yield build_torch_runner(files, OPTIONS)._model


@pytest.fixture(scope="module")
def reference(files: ModelFiles) -> TorchRunner:
    return build_torch_runner(files, OPTIONS)


def make_runner(model: LlamaModel, files: ModelFiles, device: Device | None = None, capture: bool = True) -> CudaRunner:
    layout = plan_layout(files, OPTIONS)
    kv_cache = torch.zeros((OPTIONS.num_blocks, *layout.block_shape))
    runner = CudaRunner(model, layout, kv_cache, MAX_MODEL_LEN, LIMITS, device or TapeDevice(late=True))
    if capture:
        runner.warm_up(lambda _line: None)
    return runner


@pytest.fixture(scope="module")
def runner(model: LlamaModel, files: ModelFiles) -> CudaRunner:
    return make_runner(model, files)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 512) for _ in range(length)]


def same_tokens(tokens: list[SampledToken], expected: list[SampledToken]) -> None:
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
    for token, other in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert dict(token.top) == pytest.approx(dict(other.top), abs=1e-4)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_sequence_alone(variant: str, runner: CudaRunner, reference: TorchRunner) -> None:
    for length in (1, 16, 40):
        expected = Driver(reference).generate(prompt(length), 20, **VARIANTS[variant])
        same_tokens(Driver(runner).generate(prompt(length), 20, chunk=13, **VARIANTS[variant]).tokens, expected.tokens)


def run_traffic(runner: Runner, seed: int) -> list[list[SampledToken]]:
    """Requests of all kinds that come, compute their prompts in chunks beside others' decodes, and go."""
    rng, driver = random.Random(seed), Driver(runner)
    waiting = [
        Sequence(
            RequestId(f"{seed}-{place}"),
            prompt(rng.randrange(1, 40), place),
            SamplingParams(**{"max_tokens": 20, "seed": place, "temperature": 0.0, **settings}),
        )
        for place, settings in enumerate([*VARIANTS.values(), *VARIANTS.values()])
    ]
    everybody, running = list(waiting), list[Sequence]()
    while waiting or running:
        if waiting and len(running) < LIMITS.max_num_seqs:
            running.append(waiting.pop(0))
        scheduled = []
        for each in running:
            left = len(each.prompt) + len(each.tokens) - each.num_computed
            scheduled.append((each, min(left, 9)))
        driver.step(*scheduled)
        for each in [each for each in running if len(each.tokens) >= 4 + len(each.prompt) % 7]:
            running.remove(each)
            runner.forget(each.request_id)
            driver._free += each.block_ids
    return [each.tokens for each in everybody]


def test_a_changing_batch(runner: CudaRunner, reference: TorchRunner) -> None:
    """Every padded size, prefill chunks beside decodes, rows and blocks that go from one request to another."""
    for tokens, expected in zip(run_traffic(runner, 1), run_traffic(reference, 1), strict=True):
        same_tokens(tokens, expected)


@pytest.mark.parametrize("device", [HostDevice(), HostDevice(late=True), TapeDevice()], ids=["now", "late", "tape"])
def test_every_device_and_no_capture(
    device: Device, model: LlamaModel, files: ModelFiles, reference: TorchRunner
) -> None:
    expected = Driver(reference).generate(prompt(20), 8, **SAMPLED).output
    for capture in (True, False):
        assert Driver(make_runner(model, files, device, capture)).generate(prompt(20), 8, **SAMPLED).output == expected


def pending_chunk(driver: Driver, sequence: Sequence) -> ScheduledChunk:
    """The chunk behind the one in flight, whose token only the device knows."""
    sequence.tokens.append(SampledToken(PENDING))
    chunk = driver.chunk(sequence, 1)
    sequence.tokens.pop()
    return chunk


def run_ahead(driver: Driver, sequences: list[Sequence], num_tokens: int) -> None:
    """Decode with two steps in flight, each row's token unknown to the host."""
    driver.step(*((each, len(each.prompt)) for each in sequences))
    in_flight = [driver.runner.launch(StepPlan(tuple(driver.chunk(each, 1) for each in sequences)))]
    for ahead in range(1, num_tokens):
        plan = [pending_chunk(driver, each) for each in sequences if ahead < num_tokens - 1]
        if plan:
            in_flight.append(driver.runner.launch(StepPlan(tuple(plan))))
        for each, sampled in zip(sequences, in_flight.pop(0).result().sampled, strict=True):
            assert isinstance(sampled, tuple)
            each.tokens += sampled
    assert not in_flight


def test_two_steps_in_flight(runner: CudaRunner, reference: TorchRunner) -> None:
    """The first one's result is collected after the second has been launched, and is the first one's."""
    kinds = [VARIANTS[name] for name in ("greedy", "sampled", "min-p", "bias", "min-tokens")]
    sequences = [
        Sequence(
            RequestId(f"{i}"), prompt(20, i), SamplingParams(**{"max_tokens": 9, "seed": 0, "temperature": 0.0, **each})
        )
        for i, each in enumerate(kinds)
    ]
    run_ahead(Driver(runner), sequences, 12)
    for each, settings in zip(sequences, kinds, strict=True):
        assert each.output == Driver(reference).generate(each.prompt, 12, **settings).output


def test_a_pending_token_beside_a_prefill(runner: CudaRunner, reference: TorchRunner) -> None:
    driver = Driver(runner)
    first, second = Sequence(RequestId("first"), prompt(20)), Sequence(RequestId("second"), prompt(30, 1))
    driver.step((first, 20))
    decode = runner.launch(StepPlan((driver.chunk(first, 1),)))
    mixed = runner.launch(StepPlan((pending_chunk(driver, first), driver.chunk(second, 30))))
    for step in (decode, mixed):
        (token,) = step.result().sampled[0]
        first.tokens.append(token)
    assert first.output == Driver(reference).generate(first.prompt, 3).output


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_stand_while_they_are_right(
    settings: dict[str, object], runner: CudaRunner, reference: TorchRunner
) -> None:
    expected = Driver(reference).generate(prompt(20), 8, **settings).output
    wrong = (expected[3] + 1) % 512
    for drafts, standing in (([*expected[1:4]], 4), ([expected[1], wrong, expected[3]], 2), ([wrong], 1)):
        driver = Driver(runner)
        params = SamplingParams(**{"max_tokens": 8, "seed": 0, "temperature": 0.0, **settings})
        sequence = Sequence(RequestId("drafted"), prompt(20), params)
        driver.step((sequence, 20))
        chunk = driver.chunk(sequence, 1)
        chunk = replace(chunk, token_ids=[*chunk.token_ids, *drafts], num_drafts=len(drafts))
        (sampled,) = runner.launch(StepPlan((chunk,))).result().sampled
        assert [token.token_id for token in sampled] == expected[1 : 1 + standing]
        sequence.tokens += sampled
        sequence.num_computed += standing - 1
        driver.step((sequence, 1))
        assert sequence.output == expected[: 2 + standing]
        runner.forget(sequence.request_id)


def test_logits_that_are_not_finite_end_their_row_alone(model: LlamaModel, files: ModelFiles) -> None:
    runner = make_runner(model, files)
    driver = Driver(runner)
    good, bad = Sequence(RequestId("good"), prompt(16)), Sequence(RequestId("bad"), prompt(16, 1))
    driver.step((good, 16), (bad, 16))
    runner._kv_cache[bad.block_ids[0]] = torch.nan
    sampled = driver.step((good, 1), (bad, 1))
    assert isinstance(sampled[0], SampledToken)
    assert isinstance(sampled[1], InternalError)
    assert "not finite at output position 1" in sampled[1].message


def test_limits_are_refused_by_number(runner: CudaRunner) -> None:
    driver = Driver(runner)
    with pytest.raises(ValueError, match="129 tokens in a step of 128"):
        runner.launch(StepPlan((driver.chunk(Sequence(RequestId("long"), prompt(129)), 129),)))
    crowd = [Sequence(RequestId(f"{i}"), prompt(2, i)) for i in range(10)]
    with pytest.raises(ValueError, match="10 requests draw a token in a batch of 9 rows"):
        runner.launch(StepPlan(tuple(driver.chunk(each, 2) for each in crowd)))
    one = Sequence(RequestId("one"), prompt(3))
    with pytest.raises(ValueError, match="no step before this one drew any"):
        runner.launch(StepPlan((replace(driver.chunk(one, 3), token_ids=[PENDING]),)))
    one.num_computed = 0
    steps = [runner.launch(StepPlan((driver.chunk(one, 1),))) for _ in range(2)]
    with pytest.raises(ValueError, match="2 steps are in flight"):
        runner.launch(StepPlan((driver.chunk(one, 1),)))
    for step in steps:
        step.result()


def test_after_a_failure_nothing_old_is_believed(
    runner: CudaRunner, reference: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that raises on its way; the same chunk again, alone, as the engine does."""
    settings = VARIANTS["penalties"]
    expected = Driver(reference).generate(prompt(20), 6, **settings).output
    driver = Driver(runner)
    params = SamplingParams(**{"max_tokens": 6, **settings})
    sequence = Sequence(RequestId("unlucky"), prompt(20), params)
    driver.step((sequence, 20))
    driver.step((sequence, 1))
    chunk = driver.chunk(sequence, 1)
    with monkeypatch.context() as patch:
        patch.setattr(runner._batch.columns, "copy_from", lambda _source: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.launch(StepPlan((chunk,))).result()
    (sampled,) = runner.launch(StepPlan((chunk,))).result().sampled
    sequence.tokens += sampled
    while len(sequence.tokens) < 6:
        driver.step((sequence, 1))
    assert sequence.output == expected


def test_a_capture_refuses_to_tell_the_host_a_value() -> None:
    values = torch.ones(3)
    with pytest.raises(HostAsked):
        TapeDevice().capture(lambda: values.sum().item())


def run_engine(runner: Runner, config: EngineConfig) -> dict[RequestId, list[int]]:
    """A whole engine over it: chunked prefill, prefix cache, preemption for want of blocks, drafts."""
    core = EngineCore(runner, config, ManualClock(), KVEventLog(Incarnation("0" * 16)))
    outputs: dict[RequestId, list[int]] = {}
    for i in range(12):
        settings = {"max_tokens": 72, "seed": i, "temperature": 0.0, **list(VARIANTS.values())[i % len(VARIANTS)]}
        tokens = tuple(prompt(16, i % 2) + prompt(1 + i, i))
        core.submit(EngineRequest(RequestId(f"{i}"), tokens, SamplingParams(**settings)), 0.0)
        outputs[RequestId(f"{i}")] = []
    while (schedule := core.schedule()) is not None or core.in_flight:
        core.run(schedule)
        for event in core.take_events():
            assert not isinstance(event, Failed)
            if isinstance(event, TokensSampled):
                outputs[event.request_id] += [token.token_id for token in event.tokens]
        for request_id in core.take_departed():
            runner.forget(request_id)
    assert core.load().preemptions > 0
    return outputs


@pytest.mark.parametrize("speculation", [None, SpeculationConfig()], ids=["plain", "drafts"])
def test_an_engine_that_runs_ahead(
    speculation: SpeculationConfig | None, model: LlamaModel, files: ModelFiles, reference: TorchRunner
) -> None:
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=9)
    ahead = EngineConfig(max_num_batched_tokens=64, max_num_seqs=9, async_scheduling="on", speculation=speculation)
    assert run_engine(make_runner(model, files), ahead) == run_engine(reference, config)


def test_over_the_kernels_of_a_gpu(tmp_path: Path) -> None:
    """Triton's, in its interpreter: padding rows, whole block tables and all. Three requests in a batch of four."""
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "vocab_size": 100})
    files = resolve_model(str(write_model(config, tmp_path / "model")))
    requests = list(zip([prompt(18), prompt(5, 1), prompt(3, 2)], [{}, SAMPLED, {"logprobs": 2}], strict=True))
    requests = [([token_id % 100 for token_id in tokens], settings) for tokens, settings in requests]
    with gpu_operations():
        runner = make_runner(build_torch_runner(files, OPTIONS)._model, files, HostDevice(late=True), capture=False)
        driver = Driver(runner)
        sequences = [
            Sequence(
                RequestId(f"{i}"), tokens, SamplingParams(**{"max_tokens": 3, "seed": 0, "temperature": 0.0, **each})
            )
            for i, (tokens, each) in enumerate(requests)
        ]
        driver.step(*((each, len(each.prompt)) for each in sequences))
        for _ in range(2):
            driver.step(*((each, 1) for each in sequences))
    reference = Driver(build_torch_runner(files, OPTIONS))
    for each, (tokens, settings) in zip(sequences, requests, strict=True):
        same_tokens(each.tokens, reference.generate(tokens, 3, **settings).tokens)


def test_a_trial_s_captured_step_has_room_for_the_longest_sequence(
    files: ModelFiles, model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its cache holds no more than the trial: what a captured step takes grows with its block tables."""
    layout, steps, forward = plan_layout(files, OPTIONS), list[StepInputs](), LlamaModel.forward

    def watched(self: LlamaModel, inputs: StepInputs, kv_cache: torch.Tensor) -> torch.Tensor:
        steps.append(inputs)
        return forward(self, inputs, kv_cache)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    plan = largest_plan(layout, model.config.vocab_size, MAX_MODEL_LEN, LIMITS)
    trial = trial_runner(model, layout, plan, MAX_MODEL_LEN, LIMITS, HostDevice())
    trial.try_out(plan)
    trial.capture(lambda _line: None, largest_only=True)
    captured = steps[-1].batch
    assert trial.num_blocks < layout.num_blocks_for(MAX_MODEL_LEN)
    assert captured.block_tables.shape == (LIMITS.max_rows, layout.num_blocks_for(MAX_MODEL_LEN))
    assert captured.max_context_len == MAX_MODEL_LEN
