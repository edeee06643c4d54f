"""An engine over a real model: the same tokens whether steps run ahead or not, and whether tokens are guessed or not."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import make_model

from engine.config import EngineConfig, SpeculationConfig, Switch
from engine.core import EngineCore
from engine.events import Finished, TokensSampled
from engine.kv_event_log import KVEventLog
from engine.request import EngineRequest
from engine.speculation import Drafter
from engine.torch_runner import RunnerOptions, build_torch_runner
from protocol.ids import Incarnation, RequestId
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.clock import ManualClock
from runtime.models.resolve import resolve_model

NUM_TOKENS = 40
OPTIONS = RunnerOptions(dtype="float32", device="cpu", block_size=16, num_blocks=24, seed=0)
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "seeded": {"temperature": 0.6, "top_p": 0.9},
    "nearly greedy": {"temperature": 0.05, "min_tokens": 20, "stop_token_ids": tuple(range(0, 512, 3))},
    "stopping": {"temperature": 0.3, "stop_token_ids": tuple(range(0, 512, 40))},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "biased": {"temperature": 0.0, "logit_bias": {7: 3.0}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


Streams = dict[str, list[SampledToken]]


class Recorded:
    """Guesses what another run has drawn, all of it right or with something wrong in it, in turns."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def begin_step(self) -> None:
        """It keeps to no budget."""

    def propose(self, request_id: RequestId, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        first = len(token_ids) - len(PROMPT) - 1
        guesses = [token.token_id for token in self._streams[request_id][first : first + max_drafts]]
        if guesses and first % 3 == 0:
            guesses[first % len(guesses)] ^= 1
        return guesses

    def forget(self, request_id: RequestId) -> None:
        """The record stays."""


def serve(folder: Path, async_scheduling: Switch, guess: Drafter | None = None) -> tuple[Streams, EngineCore]:
    """Serve one request of each kind, one after another joining the batch, which is short of blocks."""
    runner = build_torch_runner(resolve_model(str(folder)), OPTIONS)
    speculation = SpeculationConfig(num_draft_tokens=5) if guess else None
    config = EngineConfig(max_num_batched_tokens=48, async_scheduling=async_scheduling, speculation=speculation)
    core = EngineCore(runner, config, ManualClock(), KVEventLog(Incarnation("i")), guess)
    tokens: Streams = {name: [] for name in SAMPLINGS}
    finished: set[str] = set()
    late = list(SAMPLINGS.items())
    while len(finished) < len(SAMPLINGS):
        if late:
            name, settings = late.pop(0)
            sampling = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": len(name), **settings})
            core.submit(EngineRequest(RequestId(name), (len(name), *PROMPT), sampling), 0.0)
        core.run(core.schedule())
        for event in core.take_events():
            if isinstance(event, TokensSampled):
                tokens[event.request_id] += event.tokens
            elif isinstance(event, Finished):
                finished.add(event.request_id)
    load = core.load()
    assert load.free_blocks == load.total_blocks
    return tokens, core


@pytest.mark.parametrize(("async_scheduling", "guess"), [("on", False), ("off", True), ("on", True)])
def test_streams_do_not_tell_how_they_were_scheduled(llama: Path, async_scheduling: Switch, guess: bool) -> None:
    plain, _ = serve(llama, "off")
    tokens, core = serve(llama, async_scheduling, Recorded(plain) if guess else None)
    for name, expected in plain.items():
        assert [token.token_id for token in tokens[name]] == [token.token_id for token in expected]
        for ours, theirs in zip(tokens[name], expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
    assert (sum(core.load().accepted_drafts[1:]) > 10) == guess


def test_prompt_lookup_guesses_a_repetitive_answer_and_changes_nothing(llama: Path) -> None:
    """A bias makes the model say the same over and over."""
    streams = []
    for speculation in (None, SpeculationConfig(num_draft_tokens=4)):
        runner = build_torch_runner(resolve_model(str(llama)), OPTIONS)
        core = EngineCore(runner, EngineConfig(speculation=speculation), ManualClock(), KVEventLog(Incarnation("i")))
        sampling = SamplingParams(max_tokens=60, seed=3, temperature=0.5, logit_bias={5: 40.0, 6: 40.0})
        core.submit(EngineRequest(RequestId("r"), tuple(PROMPT), sampling), 0.0)
        while (schedule := core.schedule()) is not None:
            core.run(schedule)
        events = core.take_events()
        streams.append([token for event in events if isinstance(event, TokensSampled) for token in event.tokens])
    assert streams[0] == streams[1]
    assert core.load().steps < 60
