"""Replay of traces: the reader and its errors, results that can be worked out by hand, bounds, and the real excerpt."""

import random
from pathlib import Path

import msgspec
import pytest

from headrace.cli import main
from kv_store.replay.clairvoyant import clairvoyant_hit_rate
from kv_store.replay.one_tier import replay_one_tier
from kv_store.replay.report import CacheReport, ReplayOptions, replay
from kv_store.replay.reuse import summarize_reuse
from kv_store.replay.trace import TraceError, TraceRequest, parse_trace, read_trace
from kv_store.replay.two_tiers import TwoTiers, replay_two_tiers

EXCERPT = Path(__file__).parents[2] / "benchmarks" / "data" / "mooncake_conversation_excerpt.jsonl"


def trace(*requests: tuple[float, list[int]]) -> list[TraceRequest]:
    lines = [msgspec.json.encode({"timestamp": 1000 * at, "hash_ids": ids}) for at, ids in requests]
    return parse_trace(lines, "here")


@pytest.fixture(scope="module")
def excerpt() -> list[TraceRequest]:
    return read_trace(EXCERPT)


def test_reads_chains_and_times() -> None:
    first, second = trace((5, [0, 1, 2]), (7.5, [0, 3]))
    assert (first.time_s, second.time_s) == (0.0, 2.5)
    assert [block.position for block in first.blocks] == [0, 1, 2]
    assert second.blocks[0] is first.blocks[0]
    assert second.blocks[1].parent == first.blocks[1].parent == first.blocks[0].block_hash


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "truncated"),
        (b'{"timestamp": 1}', "hash_ids"),
        (b'{"timestamp": "soon", "hash_ids": []}', "timestamp"),
        (b'{"timestamp": 9, "hash_ids": [1.5]}', "hash_ids"),
        (b'{"timestamp": 9, "hash_ids": [-1]}', "-1"),
        (b'{"timestamp": 9, "hash_ids": [7, 4]}', "follows another block"),
        (b'{"timestamp": 9, "hash_ids": [4, 4]}', "follows another block"),
        (b'{"timestamp": 1, "hash_ids": []}', "before the last"),
        (b"[]", "object"),
        (b'\xff{"timestamp": 9, "hash_ids": []}', "invalid"),
    ],
)
def test_a_bad_line_is_named(line: bytes, why: str) -> None:
    with pytest.raises(TraceError, match="here, line 3: ") as caught:
        parse_trace([b'{"timestamp": 5, "hash_ids": [4]}', b"", line], "here")
    assert why in str(caught.value)


def test_an_empty_trace_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no request"):
        parse_trace([b"\n"], "here")
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "nowhere")


def test_hits_are_contiguous_from_the_beginning() -> None:
    requests = trace((0, [0, 1, 2]), (1, [0, 1, 3]), (2, [0, 1, 2]))
    result = replay_one_tier(requests, "lru", 100)
    assert result.hit_rate == pytest.approx(5 / 9)
    assert result.write_rate == pytest.approx(4 / 9)
    # Room for three: the second request needs block 2's, and its place is not there in the third.
    assert replay_one_tier(requests, "lru", 3).hit_rate == pytest.approx(4 / 9)


def test_reuse_by_hand() -> None:
    reuse = summarize_reuse(trace((0, [0, 1]), (10, [0, 2]), (40, [0, 1])))
    assert (reuse.num_wanted_blocks, reuse.num_distinct_blocks) == (6, 3)
    assert reuse.unlimited_hit_rate == pytest.approx(3 / 6)
    assert reuse.never_again_share == pytest.approx(1 / 3)
    assert reuse.gap_s is not None
    assert reuse.gap_s[0] == pytest.approx(30)


def test_clairvoyant_by_hand() -> None:
    requests = trace((0, [1]), (1, [2]), (2, [3]), (3, [1]), (4, [2]), (5, [3]))
    assert clairvoyant_hit_rate(requests, 1) == pytest.approx(1 / 6)
    assert clairvoyant_hit_rate(requests, 2) == pytest.approx(2 / 6)
    assert clairvoyant_hit_rate(requests, 3) == pytest.approx(3 / 6)


@pytest.mark.parametrize("capacity_blocks", [1, 7, 40])
@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "density"])
def test_no_policy_beats_the_bound_nor_limitless_room(policy: str, capacity_blocks: int) -> None:
    rng = random.Random(capacity_blocks)
    documents = [[100 * document + i for i in range(rng.randint(1, 6))] for document in range(30)]
    requests = trace(*((number, documents[int(30 * rng.random() ** 2)]) for number in range(600)))
    bound = clairvoyant_hit_rate(requests, capacity_blocks)
    assert replay_one_tier(requests, policy, capacity_blocks).hit_rate <= bound + 1e-12
    assert bound <= summarize_reuse(requests).unlimited_hit_rate
    unlimited = replay_one_tier(requests, policy, 10_000).hit_rate
    assert unlimited == pytest.approx(summarize_reuse(requests).unlimited_hit_rate)


def test_two_tiers_by_hand() -> None:
    requests = trace((0, [1]), (1, [2]), (2, [1]), (3, [2]), (4, [1]))
    back = replay_two_tiers(requests, TwoTiers(1, 2, "lru", "back", "all"))
    through = replay_two_tiers(requests, TwoTiers(1, 2, "lru", "through", "all"))
    picky = replay_two_tiers(requests, TwoTiers(1, 2, "lru", "through", "second-touch"))
    assert (back.hit_rate, back.host_write_rate) == (pytest.approx(3 / 5), pytest.approx(2 / 5))
    assert (through.hit_rate, through.host_write_rate) == (pytest.approx(3 / 5), pytest.approx(2 / 5))
    # Each is wanted twice before it is taken.
    assert (picky.hit_rate, picky.host_write_rate) == (pytest.approx(1 / 5), pytest.approx(2 / 5))


def test_ours_beats_lru_where_lru_thrashes(excerpt: list[TraceRequest]) -> None:
    lru, ours = (replay_one_tier(excerpt, policy, 2_000).hit_rate for policy in ("lru", "density"))
    assert ours > 1.15 * lru
    roomy_lru, roomy_ours = (replay_one_tier(excerpt, policy, 20_000).hit_rate for policy in ("lru", "density"))
    assert roomy_ours > 0.98 * roomy_lru


def test_the_same_replay_gives_the_same_report() -> None:
    requests = read_trace(EXCERPT, max_requests=100)
    options = ReplayOptions(policies=("lru", "density"), blocks=(500,), two_tiers=((100, 400),))
    lines: list[str] = []
    report = replay(requests, options, lines.append)
    assert report == replay(requests, options, lambda _: None)
    assert report.hit_rate("lru", 500) <= report.clairvoyant[0]
    assert any(line.startswith("| clairvoyant |") for line in lines)


def test_the_command_prints_and_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    flags = ["--policy", "lru,density", "--blocks", "500,1000", "--max-requests", "200", "--json", str(file)]
    assert main(["bench", "cache", "--trace", str(EXCERPT), *flags]) == 0
    assert "| density |" in capsys.readouterr().out
    report = msgspec.json.decode(file.read_bytes(), type=CacheReport)
    assert report.blocks == (500, 1000)
    assert report.reuse.num_requests == 200


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy", "belady"], "--policy"),
        (["--blocks", "many"], "--blocks"),
        (["--blocks", ","], "--blocks"),
        (["--two-tiers", "5"], "--two-tiers"),
        (["--max-requests", "0"], "--max-requests"),
        (["--json", "/no/such/folder/file"], "--json"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cache", "--trace", str(EXCERPT), *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_trace_that_is_none_is_a_plain_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("hello\n")
    assert main(["bench", "cache", "--trace", str(file)]) == 2
    assert "line 1" in capsys.readouterr().err
