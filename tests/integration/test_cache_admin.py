"""What an operator sees of the caches and does to them, from the command line through a router to nodes, over real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_node import LAYOUT, FakeNode, nodes, until
from router_process import RunningRouter, running_router
from text_model import make_text_model, make_tokenizer

from headrace.cli import main
from kv_store.admin import PATH
from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import InvalidParameter
from protocol.ids import BlockHash
from protocol.kv_blocks import tenant_of
from protocol.store_admin import BlocksChanged, PinBlocks
from runtime.rpc_client import RpcClient

TEXT = "The prefill node computes the prompt and the decode node continues the answer token by token. " * 4
SIZE = LAYOUT.block_size


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    async with running_router(make_text_model()) as router:
        yield router


@pytest.fixture
async def pair(router: RunningRouter) -> AsyncIterator[tuple[FakeNode, FakeNode]]:
    """Of the prompt, the prefill node has the first blocks on its device, and the decode node more of them in its store."""
    prefill, decode = (
        FakeNode(role, name, router.control_url, [5]) for role, name in (("prefill", "p"), ("decode", "d"))
    )  # type: ignore[arg-type]
    chain = addresses(TEXT)
    prefill.stored = tuple(chain[:2])
    decode.store.held["host"].update(chain[:3])
    decode.store.held["disk"].update(chain[2:4])
    async with nodes(prefill, decode):
        yield prefill, decode


def addresses(text: str, salt: str | None = None) -> list[BlockHash]:
    token_ids = make_tokenizer().encode(text, add_special_tokens=True)
    return hash_blocks(token_ids, SIZE, root_hash(LAYOUT.identity, salt))


async def headrace(router: RunningRouter, *arguments: str) -> int:
    """Run the command line beside the router, which shares this event loop."""
    return await asyncio.to_thread(main, ["cache", *arguments, "--cluster", router.control_url])


async def test_a_prompt_is_found_tier_by_tier_on_every_node(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await headrace(router, "lookup", TEXT, "--json") == 0
    found = json.loads(capsys.readouterr().out)["prompts"][0]
    chain = addresses(TEXT)
    assert (found["num_blocks"], found["block_size"], found["tenant"]) == (len(chain), SIZE, "none")
    nodes_found = {node["worker"]: node for node in found["nodes"]}
    tiers = ("leading", "device", "host", "disk", "known")
    assert [nodes_found["p"][name] for name in tiers] == [2, 2, 0, 0, True]
    assert [nodes_found["d"][name] for name in tiers] == [4, 0, 3, 2, True]
    assert found["expected_tokens"] == 2 * SIZE, (
        "what the prefill node has itself; the other's store has sent no events"
    )


async def test_another_salt_finds_nothing_of_it(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await headrace(router, "lookup", TEXT, "--salt", "other", "--json") == 0
    found = json.loads(capsys.readouterr().out)["prompts"][0]
    assert found["tenant"] == tenant_of("other")
    assert found["expected_tokens"] == 0
    assert all(node["leading"] == 0 for node in found["nodes"])


async def test_a_chat_is_rendered_as_a_request_would_be(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    template = make_text_model().template
    assert template is not None
    messages = [{"role": "user", "content": TEXT}]
    rendered = template.render(messages, add_generation_prompt=True, extra={})
    token_ids = make_tokenizer().encode(rendered, add_special_tokens=False)
    pair[1].store.held["host"].update(hash_blocks(token_ids, SIZE, root_hash(LAYOUT.identity, "s")))
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"messages": messages, "model": "tiny"}))
    for arguments in (["--chat", TEXT], ["--request", str(path)]):
        assert await headrace(router, "lookup", *arguments, "--salt", "s", "--json") == 0
        found = json.loads(capsys.readouterr().out)["prompts"][0]
        assert found["num_tokens"] == len(token_ids)
        assert [node["host"] for node in found["nodes"]] == [0, len(token_ids) // SIZE]


async def test_pins_are_set_and_taken_back(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    store = pair[1].store
    assert await headrace(router, "pin", TEXT, "--ttl", "2h") == 0
    assert store.pinned == dict.fromkeys(addresses(TEXT)[:4], 7200.0)
    assert "d" in capsys.readouterr().out
    assert await headrace(router, "lookup", TEXT, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"][0]["nodes"][1]["pinned"] == 4
    assert await headrace(router, "unpin", TEXT) == 0
    assert store.pinned == {}
    assert await headrace(router, "pin", TEXT, "--ttl", "1m") == 0
    assert await headrace(router, "unpin", "--all", "--json") == 0
    assert store.pinned == {}
    capsys.readouterr()
    assert await headrace(router, "pin", "nobody has this prompt, which is long enough", "--ttl", "1m") == 0
    assert "Nothing is pinned" in capsys.readouterr().out


async def test_a_pin_that_names_a_block_twice_is_refused(pair: tuple[FakeNode, FakeNode]) -> None:
    first = addresses(TEXT)[0]
    async with RpcClient(None) as client:
        with pytest.raises(InvalidParameter, match="twice"):
            await client.call(pair[1].url + f"{PATH}/pin", PinBlocks((first, first), 1.0), BlocksChanged, 2.0)
    assert not pair[1].store.pinned


async def test_clear_says_what_it_did_and_asks_first(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    held = pair[1].store.held
    assert await headrace(router, "clear", "--tier", "disk") == 2
    assert "--yes" in capsys.readouterr().err
    assert await headrace(router, "clear", "--tier", "disk", "--yes", "--json") == 0
    assert {node["worker"]: node["num_blocks"] for node in json.loads(capsys.readouterr().out)["nodes"]} == {
        "p": 0,
        "d": 2,
    }
    assert (len(held["host"]), len(held["disk"])) == (3, 0)
    assert await headrace(router, "clear", "--tier", "device", "--tenant", "abc", "--yes") == 1
    assert "a device is cleared for all tenants" in capsys.readouterr().err


async def test_stats_come_from_every_node_and_its_events(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await headrace(router, "stats", "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    used = {node["worker"]: {tier["tier"]: tier["used"] for tier in node["tiers"]} for node in stats["nodes"]}
    assert used == {"p": {"device": 2, "host": 0, "disk": 0}, "d": {"device": 0, "host": 3, "disk": 2}}
    for view in ("node", "tenant"):
        assert await headrace(router, "stats", "--by", view) == 0
    shown = capsys.readouterr().out
    assert "3 of 4 requests found something" in shown
    assert "none" in shown
    assert await headrace(router, "watch", "--count", "2", "--interval", "0.1") == 0
    assert capsys.readouterr().out.count("found/s") == 2


async def test_a_node_that_is_silent_is_named_beside_the_others(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    await pair[0].die()
    assert await headrace(router, "stats", "--json") == 1
    captured = capsys.readouterr()
    assert [node["worker"] for node in json.loads(captured.out)["nodes"]] == ["d"]
    assert "p did not answer" in captured.err
    assert await headrace(router, "lookup", TEXT, "--json") == 1
    found = json.loads(capsys.readouterr().out)["prompts"][0]
    assert [(node["worker"], node["leading"], node["known"]) for node in found["nodes"]] == [
        ("p", 2, False),
        ("d", 4, True),
    ]


async def test_what_a_client_would_be_refused_is_refused(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"prompt": "x", "model": "another"}))
    assert await headrace(router, "lookup", "--request", str(path)) == 1
    assert "'another' does not exist" in capsys.readouterr().err
    assert await headrace(router, "lookup", "word " * 500) == 1
    assert "maximum context length" in capsys.readouterr().err


async def test_without_nodes_or_key_the_cure_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    key = "0123456789abcdef0123456789abcdef"
    async with running_router(make_text_model(), cluster_key=key) as router:
        assert await headrace(router, "stats") == 1
        assert "set HEADRACE_CLUSTER_KEY" in capsys.readouterr().err
    async with running_router(make_text_model()) as router:
        assert await headrace(router, "lookup", TEXT) == 1
        assert "no node is registered" in capsys.readouterr().err


async def test_warming_sends_every_line_and_can_be_taken_up_again(
    router: RunningRouter, pair: tuple[FakeNode, FakeNode], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = [{"prompt": f"prompt number {i}", "n": 3, "stream": True, "max_tokens": 50} for i in range(6)]
    prompts[2] = {"messages": [{"role": "user", "content": "hi"}], "cache_salt": "s"}  # type: ignore[dict-item]
    prompts[4] = {"prompt": "word " * 500}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, prompts)))
    warm = ["cache", "warm", str(path), "--api", router.url, "--concurrency", "2"]
    assert await asyncio.to_thread(main, [*warm, "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["num_warmed"] == 5
    assert list(outcome["failed"]) == ["9"], "lines count from 1, empty ones too"
    assert "maximum context length" in outcome["failed"]["9"]
    requests = pair[0].requests
    assert len(requests) == 5
    assert {request.sampling.max_tokens for request in requests} == {1}
    assert [request.cache_salt for request in requests].count("s") == 1
    assert await asyncio.to_thread(main, [*warm, "--start", "11"]) == 0
    assert "1 prompts warm" in capsys.readouterr().out
    await until(lambda: pair[0].num_running == 0)


async def test_a_warming_that_cannot_go_on_says_where_to_begin_again(
    router: RunningRouter,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headrace.cache_warm.MAX_PAUSE_S", 0.001)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b c"}\n{"prompt": "d e f"}\n')
    assert await asyncio.to_thread(main, ["cache", "warm", str(path), "--api", router.url, "--start", "2"]) == 1
    assert f"headrace cache warm {path} --start 2" in capsys.readouterr().out
