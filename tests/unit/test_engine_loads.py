"""What the store has of a context is asked for and not computed: at an admission, and after a preemption."""

import pytest
from engine_bench import Bench, continuation, hashes_of, prompt, request
from engine_store import BenchStore

from engine.request import Mode


def forgotten(num_tokens: int, **settings: object) -> tuple[Bench, list[int]]:
    """A bench that has forgotten a prompt which its store keeps."""
    store, tokens = BenchStore(eager=True), prompt(1, num_tokens)
    bench = Bench(256, store=store, **settings)
    bench.generate(request("first", tokens, max_tokens=1))
    bench.save()
    bench.core.clear_prefix_cache()
    return bench, tokens


@pytest.mark.parametrize("mode", [Mode.GENERATE, Mode.PREFILL_ONLY])
@pytest.mark.parametrize("num_tokens", [13, 16])
def test_what_the_store_keeps_is_asked_for_and_not_computed(num_tokens: int, mode: Mode) -> None:
    bench, tokens = forgotten(num_tokens)
    num_computed = bench.core.load().computed_prompt_tokens
    bench.submit(request("r", tokens, mode))
    bench.run()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert list(reserved.block_hashes) == hashes_of(tokens[:12]), "at least one token is left to compute"
    bench.resume("r", bench.bring("r"))
    bench.run()
    assert bench.heard["r"].tokens == continuation(tokens, 4 if mode is Mode.GENERATE else 1)
    answer = bench.heard["r"].computed if mode is Mode.GENERATE else bench.heard["r"].prefill
    assert answer is not None
    assert answer.num_cached_tokens == bench.core.load().loaded_prompt_tokens == 12
    assert bench.core.load().computed_prompt_tokens - num_computed == num_tokens - 12


def test_only_what_the_prefix_cache_lacks_is_asked_for() -> None:
    bench, tokens = forgotten(24)
    bench.generate(request("head", tokens[:8], max_tokens=1))
    bench.resume("head", bench.bring("head", 0))
    bench.run()
    bench.submit(request("r", tokens))
    bench.run()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert (reserved.num_cached_blocks, len(reserved.block_ids)) == (2, 5)


def test_a_load_that_brings_nothing_is_not_asked_for_again() -> None:
    bench, tokens = forgotten(24)
    bench.submit(request("r", tokens))
    bench.run()
    bench.resume("r", bench.bring("r", 0))
    bench.run()
    assert bench.heard["r"].tokens == continuation(tokens, 4)
    assert bench.core.load().loaded_prompt_tokens == 0


def test_whoever_may_bring_more_than_the_store_is_asked_for_all_of_it() -> None:
    bench, tokens = forgotten(16)
    longer = [*tokens, *prompt(7, 20)]
    bench.submit(request("r", longer, import_tokens=28))
    bench.run()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert list(reserved.block_hashes) == hashes_of(longer)[:7]
    bench.resume("r", bench.bring("r", 4))
    bench.run()
    assert bench.heard["r"].tokens == continuation(longer, 4)
    assert (bench.core.load().loaded_prompt_tokens, bench.core.load().imported_prompt_tokens) == (16, 16)


def test_an_import_is_told_the_addresses_of_its_full_blocks() -> None:
    bench = Bench()
    bench.submit(request("r", prompt(1, 14), Mode.IMPORT))
    bench.run()
    reserved = bench.heard["r"].reserved
    assert reserved is not None
    assert not reserved.prefix
    assert (len(reserved.block_ids), list(reserved.block_hashes)) == (4, hashes_of(prompt(1, 14)))


@pytest.mark.parametrize("brings", [True, False])
@pytest.mark.parametrize("mode", [Mode.GENERATE, Mode.IMPORT])
def test_a_preempted_decode_comes_back_from_the_store(mode: Mode, brings: bool) -> None:
    store = BenchStore(eager=True)
    bench = Bench(24, store=store)
    old, young = prompt(1, 40), prompt(2, 40)
    bench.submit(request("old", old, max_tokens=30))
    bench.submit(request("young", young, mode, max_tokens=30))
    for _ in range(2000):
        if mode is Mode.IMPORT and bench.heard["young"].awaiting and not bench.heard["young"].tokens:
            activate(bench, "young", young)
        elif bench.heard["young"].awaiting:
            bench.resume("young", bench.bring("young", None if brings else 0))
        bench.save()
        if not bench.step() and all(heard.over for heard in bench.heard.values()):
            break
    assert bench.heard["old"].tokens == continuation(old, 30)
    assert bench.heard["young"].tokens == continuation(young, 30)
    loads = bench.core.load()
    assert loads.preemptions > 0
    assert (loads.loaded_prompt_tokens > 0) == brings
    assert bench.busy_blocks == 0


def activate(bench: Bench, name: str, tokens: list[int]) -> None:
    reserved = bench.heard[name].reserved
    assert reserved is not None
    other = Bench()
    other.generate(request("source", tokens, Mode.PREFILL_ONLY))
    for source, block_id in zip(other.heard["source"].block_ids, reserved.block_ids, strict=True):
        bench.runner.import_block(other.runner.memory, source, block_id)
    bench.activate(name, continuation(tokens, 1)[0])
