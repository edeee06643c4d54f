"""What each step computes: budget, order, chunks, admission, preemption. Driven through EngineCore, step by step."""

import pytest
from engine_bench import BLOCK_SIZE, Bench, continuation, request

from engine.config import EngineConfig
from engine.request import Mode
from protocol.errors import ConfigError, PeerLost


def shape(bench: Bench, step: int = -1) -> list[tuple[str, int, int]]:
    """(request, start, tokens) of one step's chunks."""
    return [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in bench.runner.plans[step]]


@pytest.fixture(autouse=True, params=["off", "on"])
def with_and_without_running_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is true of requests is true either way. Tests of single steps ask for one at a time."""
    monkeypatch.setitem(Bench.DEFAULTS, "async_scheduling", request.param)


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    bench = Bench(max_num_batched_tokens=8)
    prompt = range(19)
    assert bench.generate(request("a", prompt, max_tokens=3)).tokens == continuation(prompt, 3)
    assert [shape(bench, step) for step in range(5)] == [
        [("a", 0, 8)],
        [("a", 8, 8)],
        [("a", 16, 3)],
        [("a", 19, 1)],
        [("a", 20, 1)],
    ]
    assert [chunk.samples for plan in bench.runner.plans for chunk in plan] == [False, False, True, True, True]


def test_chunks_are_cut_to_their_own_limit_so_that_others_fit_beside() -> None:
    bench = Bench(max_num_batched_tokens=10, max_prefill_chunk=4, async_scheduling="off")
    for name in "abc":
        bench.submit(request(name, range(10)))
    bench.step()
    assert shape(bench) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]


def test_decodes_come_first_and_prefill_gets_the_rest() -> None:
    bench = Bench(max_num_batched_tokens=8, async_scheduling="off")
    bench.submit(request("a", range(3)))
    bench.submit(request("b", range(100, 104)))
    bench.step()
    bench.submit(request("c", range(20)))
    bench.step()
    assert shape(bench) == [("a", 3, 1), ("b", 4, 1), ("c", 0, 6)]


def test_rows_never_take_the_whole_budget_from_prefill() -> None:
    bench = Bench(max_num_batched_tokens=3, max_num_seqs=64)
    bench.submit(request("long", range(30), max_tokens=2))
    for number in range(6):
        bench.submit(request(f"i{number}", [number + 1], Mode.IMPORT, max_tokens=100))
    bench.step()
    for name, heard in bench.heard.items():
        if heard.reserved is not None:
            bench.activate(name, 1)
    while not bench.heard["long"].over:
        bench.step()
        assert "long" in [name for name, _, _ in shape(bench)]


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    bench = Bench(num_blocks=6, async_scheduling="off")
    bench.submit(request("running", range(8), max_tokens=8))
    bench.step()
    bench.submit(request("large", range(100, 116), max_tokens=1))
    bench.submit(request("small", range(200, 202), max_tokens=1))
    bench.step()
    assert shape(bench) == [("running", 8, 1)]
    bench.run()
    finishing = [str(name) for plan in bench.runner.plans for name in dict.fromkeys(chunk.request_id for chunk in plan)]
    assert finishing.index("large") < finishing.index("small")


def test_an_import_passes_prompts_that_wait_for_compute_but_not_one_that_waits_for_room() -> None:
    bench = Bench(num_blocks=16, max_num_batched_tokens=8)
    bench.submit(request("a", range(40), max_tokens=1))
    bench.submit(request("b", range(100, 120), max_tokens=1))
    bench.submit(request("i", range(200, 204), Mode.IMPORT))
    bench.step()
    assert bench.heard["i"].reserved is not None
    bench.submit(request("j", range(300, 303), Mode.IMPORT))
    for _ in range(4):
        bench.step()
    assert bench.heard["j"].reserved is not None, "10 of 16 blocks are a's, b has not had its turn"
    bench.submit(request("k", range(400, 457), Mode.IMPORT))
    bench.submit(request("l", range(500, 503), Mode.IMPORT))
    bench.run()
    assert bench.heard["b"].finished is not None
    assert bench.heard["k"].reserved is None, "15 of 16 blocks do not fit beside two imports"
    assert bench.heard["l"].reserved is None, "it came after k"
    bench.abandon("i", 0, PeerLost("gone"))
    bench.run()
    assert bench.heard["k"].reserved is not None


def test_watermark_leaves_room_for_what_runs_but_lets_a_lone_request_in() -> None:
    bench = Bench(num_blocks=10, watermark=0.2, async_scheduling="off")
    bench.submit(request("a", range(12), max_tokens=3))
    bench.step()
    bench.submit(request("b", range(100, 124), max_tokens=1))
    bench.step()
    assert shape(bench) == [("a", 12, 1)], "b would leave one block of ten"
    bench.run()
    assert bench.heard["b"].finished is not None
    assert bench.generate(request("whole", range(300, 339), max_tokens=1)).finished is not None


def test_the_youngest_is_preempted_and_goes_on_as_if_nothing_had_happened() -> None:
    bench = Bench(num_blocks=6)
    old, young = list(range(10)), list(range(100, 110))
    bench.submit(request("old", old, max_tokens=12))
    bench.submit(request("young", young, max_tokens=12))
    bench.run()
    assert bench.core.load().preemptions > 0
    assert bench.heard["old"].tokens == continuation(old, 12)
    assert bench.heard["young"].tokens == continuation(young, 12)
    assert bench.busy_blocks == 0
    starts = [chunk.start for plan in bench.runner.plans for chunk in plan if chunk.request_id == "old"]
    assert starts == sorted(set(starts)), "the older one never computes anything twice"


def test_recomputation_finds_its_own_blocks_in_the_prefix_cache() -> None:
    bench = Bench(num_blocks=8)
    bench.submit(request("old", range(14), max_tokens=10))
    bench.submit(request("young", range(100, 114), max_tokens=10))
    bench.run()
    load = bench.core.load()
    assert load.preemptions == 1
    assert load.cached_prompt_tokens > 0
    assert load.computed_prompt_tokens < 14 + 14 + 16


def test_a_sequence_alone_ends_for_length_when_the_pool_is_full() -> None:
    bench = Bench(num_blocks=4)
    heard = bench.generate(request("a", range(10), max_tokens=1000))
    assert heard.finished is not None
    assert heard.finished.reason == "length"
    assert heard.tokens == continuation(range(10), 4 * BLOCK_SIZE - 10)
    assert bench.busy_blocks == 0


def test_imports_and_exports_are_never_preempted() -> None:
    bench = Bench(num_blocks=8)
    bench.submit(request("growing", range(7), max_tokens=20))
    bench.submit(request("export", range(100, 108), Mode.PREFILL_ONLY))
    bench.submit(request("import", range(200, 216), Mode.IMPORT))
    bench.run()
    export, landing = bench.heard["export"], bench.heard["import"]
    assert export.prefill is not None
    assert landing.reserved is not None
    growing = bench.heard["growing"]
    assert not growing.over, "it waits for blocks that only others can give back"
    assert bench.core.load().waiting == 1
    assert not set(export.block_ids) & set(landing.reserved.block_ids)
    bench.release("export")
    bench.run()
    assert growing.finished is None
    bench.abandon("import", 0, PeerLost("gone"))
    bench.run()
    assert growing.tokens == continuation(range(7), 20)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", 0),
        ("max_waiting_tokens", -1),
        ("max_prefill_chunk", 0),
        ("watermark", 1.0),
        ("watermark", -0.1),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting) as caught:
        EngineConfig(**{setting: value})  # type: ignore[arg-type]
    assert caught.value.param == setting
