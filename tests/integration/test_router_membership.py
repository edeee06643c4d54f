"""Nodes come, restart, fall silent and go; the router's process starts, announces itself and drains."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from fake_node import LAYOUT, FakeNode, nodes, until
from router_process import RunningRouter, running_router
from text_model import SPECIAL_TOKENS, TEMPLATE, make_text_model, make_tokenizer

from protocol.errors import LayoutMismatch, NodeLost, ProtocolError, Unauthorized
from protocol.kv_events import AllBlocksCleared, BlocksStored, KVEventBatch
from protocol.wire import WIRE_VERSION
from protocol.workers import Heartbeat, HeartbeatReply, Leave, Registered, WorkerInfo, WorkerLoad
from runtime.rpc_client import RpcClient

KEY = "a-cluster-key-of-some-length"
SCRIPT = [5, 6, 7, 8]
LOAD = WorkerLoad(running=1, waiting=0, waiting_tokens=0, free_blocks=3, steps=9, draining=False)


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    async with running_router(make_text_model(), cluster_key=KEY) as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[RpcClient]:
    async with RpcClient(KEY) as client:
        yield client


def node(router: RunningRouter, worker_id: str = "d", role: str = "decode") -> FakeNode:
    return FakeNode(role, worker_id, router.control_url, SCRIPT, cluster_key=KEY)  # type: ignore[arg-type]


def info(like: FakeNode, incarnation: str, **changes: object) -> WorkerInfo:
    fields: dict[str, object] = {
        "worker_id": like.worker_id,
        "role": like.role,
        "wire_version": WIRE_VERSION,
        "control_url": like.url,
        "served_model": "tiny",
        "vocab_size": 400,
        "max_model_len": 256,
        "num_blocks": 10,
        "layout": LAYOUT,
        "transports": ("inproc",),
    }
    return WorkerInfo(incarnation=incarnation, **(fields | changes))  # type: ignore[arg-type]


async def ask(router: RunningRouter, **body: object) -> tuple[int, dict[str, object]]:
    body = {"prompt": list(range(2, 60)), "max_tokens": 4, "return_token_ids": True} | body
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{router.url}/v1/completions", json=body) as response,
    ):
        return response.status, await response.json()


async def workers(router: RunningRouter) -> list[dict[str, object]]:
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{router.control_url}/internal/v1/workers", headers=headers) as response,
    ):
        listed: list[dict[str, object]] = (await response.json())["workers"]
        return listed


async def status_of(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


async def test_nodes_make_the_router_ready(router: RunningRouter) -> None:
    assert await status_of(f"{router.url}/ready") == 503
    async with nodes(node(router)):
        assert await status_of(f"{router.url}/ready") == 200
        (listed,) = await workers(router)
        assert (listed["worker_id"], listed["ready"], listed["role"]) == ("d", True, "decode")
    await until_status(f"{router.url}/ready", 503)


async def until_status(url: str, wanted: int) -> None:
    async with asyncio.timeout(10):
        while await status_of(url) != wanted:
            await asyncio.sleep(0.01)


async def test_the_control_plane_needs_its_key(router: RunningRouter) -> None:
    assert await status_of(f"{router.control_url}/internal/v1/workers") == 401
    async with RpcClient(None) as stranger:
        for path, message in [
            ("heartbeat", Heartbeat(worker_id="d", incarnation="x", load=LOAD)),
            ("leave", Leave("d", "x")),
        ]:
            with pytest.raises(Unauthorized):
                await stranger.notify(f"{router.control_url}/internal/v1/workers/{path}", message, 3)


async def test_only_one_life_of_a_node_counts(router: RunningRouter, client: RpcClient) -> None:
    register = f"{router.control_url}/internal/v1/workers/register"
    beat = f"{router.control_url}/internal/v1/workers/heartbeat"
    first = node(router)
    async with nodes(first):
        await client.call(register, info(first, "newer"), Registered, 3)
        (listed,) = await workers(router)
        assert listed["incarnation"] == "newer"
        old = Heartbeat(worker_id="d", incarnation=first.incarnation, load=LOAD)
        assert not (await client.call(beat, old, HeartbeatReply, 3)).known
        with pytest.raises(ProtocolError, match="worker_id"):
            await client.call(register, info(first, first.incarnation), Registered, 3)


async def test_refusals_reach_the_node_typed(
    router: RunningRouter, client: RpcClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = f"{router.control_url}/internal/v1/workers/register"
    monkeypatch.setattr("router.cluster.OPEN_TIMEOUT_S", 0.2)
    first = node(router, "p", "prefill")
    async with nodes(first):
        from_elsewhere = info(first, "x", worker_id="d", role="decode")
        with pytest.raises(LayoutMismatch, match="rope"):
            other = LAYOUT.__class__(
                **{name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__} | {"rope": "y"}
            )
            await client.call(register, info(first, "x", worker_id="d", role="decode", layout=other), Registered, 3)
        with pytest.raises(NodeLost, match="advertise_url"):
            unreachable = info(first, "y", worker_id="e", control_url="http://127.0.0.1:1")
            await client.call(register, unreachable, Registered, 3)
        assert len(await workers(router)) == 1
        assert (await client.call(register, from_elsewhere, Registered, 3)).heartbeat_interval_s == 0.05


async def test_missed_cache_events_are_asked_for_again(router: RunningRouter, client: RpcClient) -> None:
    beat = f"{router.control_url}/internal/v1/workers/heartbeat"
    first = node(router)
    async with nodes(first):
        await until_beaten(router)
        gap = KVEventBatch(first.incarnation, 77, (BlocksStored((b"h" * 16,)),))
        whole = KVEventBatch(first.incarnation, 80, (AllBlocksCleared(), BlocksStored((b"h" * 16,))))
        for batch, resync in ((gap, True), (whole, False)):
            message = Heartbeat(worker_id="d", incarnation=first.incarnation, load=LOAD, kv_events=batch)
            assert await client.call(beat, message, HeartbeatReply, 3) == HeartbeatReply(known=True, resync=resync)


async def until_beaten(router: RunningRouter) -> None:
    """Until the first heartbeat of the only node has come."""
    async with asyncio.timeout(10):
        while (await workers(router))[0]["load"]["free_blocks"] != 1000:  # type: ignore[index]
            await asyncio.sleep(0.01)


async def test_a_leaving_node_gets_nothing_new_and_finishes(router: RunningRouter, client: RpcClient) -> None:
    first, second = node(router, "d1"), node(router, "d2")
    first.hold_at = 2
    async with nodes(first):
        running = asyncio.create_task(ask(router))
        await until(lambda: first.requests)
        async with nodes(second):
            leave = Leave("d1", first.incarnation)
            await client.notify(f"{router.control_url}/internal/v1/workers/leave", leave, 3)
            assert (await ask(router))[0] == 200
            assert len(second.requests) == 1
            first.go()
            status, answer = await running
            assert (status, answer["choices"][0]["token_ids"]) == (200, SCRIPT)  # type: ignore[index]
            assert len(first.requests) == 1


async def test_a_silent_node_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.node_link.SILENCE_S", 0.5)
    monkeypatch.setattr("runtime.token_outbox.SIGN_OF_LIFE_S", 0.1)
    # Retries to spare: where the machine itself falls silent, the healthy node may be taken for lost as well.
    async with running_router(make_text_model(), cluster_key=KEY, retries=5) as router:
        first, second = node(router, "d1"), node(router, "d2")
        first.hold_at = 2
        async with nodes(first):
            running = asyncio.create_task(ask(router))
            await until(lambda: len(first.sent) == 2)
            async with nodes(second):
                first.frozen = True
                status, answer = await running
                assert (status, answer["choices"][0]["token_ids"]) == (200, SCRIPT)  # type: ignore[index]


async def test_heartbeats_that_stop_end_the_membership() -> None:
    async with running_router(make_text_model(), cluster_key=KEY, worker_timeout_s=0.3) as router:
        first = node(router)
        async with nodes(first):
            for task in first._tasks[1:]:
                task.cancel()
            await until_status(f"{router.url}/ready", 503)
            assert await workers(router) == []


async def test_a_request_that_takes_too_long_ends_in_time() -> None:
    async with running_router(make_text_model(), cluster_key=KEY, request_timeout_s=0.3) as router:
        first = node(router)
        first.hold_at = 1
        async with nodes(first):
            status, answer = await ask(router)
            assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")  # type: ignore[index]
            await until(lambda: first.cancelled)


async def test_the_process_announces_itself_and_drains(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    make_tokenizer()._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 400, "max_position_embeddings": 128, "eos_token_id": 0})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": SPECIAL_TOKENS[0], "chat_template": TEMPLATE})
    )
    code = (
        "import sys; from router.main import run; from router.config import RouterConfig\n"
        f"sys.exit(run(RouterConfig(model={str(folder)!r}, port=0, control_port=0)))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            announced = json.loads(await process.stdout.readline())
        assert (announced["event"], announced["role"]) == ("listening", "router")
        assert await status_of(f"{announced['url']}/v1/models") == 200
        assert await status_of(f"{announced['control_url']}/internal/v1/workers") == 200
        assert await status_of(f"{announced['url']}/internal/v1/workers") == 404
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_head_without_end_is_cut_off(router: RunningRouter) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rsplit(":", 1)[1]))
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nodd: ")
    try:
        for _ in range(64):
            writer.write(b"a" * 65536)
            await writer.drain()
        answer = await reader.read(100)
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert await status_of(f"{router.url}/health") == 200
