"""The only decode node goes and comes back: what runs waits for it. A link that fails takes nobody else with it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from fake_node import FakeNode, nodes, until
from router_process import RunningRouter, running_router
from text_model import make_text_model

from router.node_link import NodeLink
from runtime.rpc_client import RpcClient

SCRIPT = list(range(20, 60))
BODY = {"prompt": list(range(2, 60)), "max_tokens": len(SCRIPT), "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    async with running_router(make_text_model()) as router:
        yield router


async def ask(router: RunningRouter) -> list[int]:
    async with aiohttp.ClientSession() as session, session.post(f"{router.url}/v1/completions", json=BODY) as response:
        answer = await response.json()
        assert response.status == 200, answer
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens


def node(router: RunningRouter, name: str = "d") -> FakeNode:
    return FakeNode("decode", name, router.control_url, SCRIPT)


async def test_a_restarted_node_goes_on_with_what_ran_there(router: RunningRouter) -> None:
    first, second = node(router), node(router)
    first.hold_at = 7
    async with nodes(first):
        running = asyncio.create_task(ask(router))
        await until(lambda: len(first.sent) == 7)
        await first.die()
        waiting = asyncio.create_task(ask(router))
        await asyncio.sleep(0.1)
        async with nodes(second):
            assert await running == SCRIPT
            assert await waiting == SCRIPT
    assert {len(request.emitted_token_ids) for request in second.requests} == {0, 7}


async def test_a_node_whose_stream_was_cut_is_used_again(router: RunningRouter) -> None:
    only = node(router)
    only.hold_at = 7
    async with nodes(only):
        running = asyncio.create_task(ask(router))
        await until(lambda: len(only.sent) == 7)
        only.hold_at = None
        only.outbox.close()
        assert await running == SCRIPT
    assert [len(request.emitted_token_ids) for request in only.requests] == [0, 7]


async def _broken(_: NodeLink) -> None:
    raise RuntimeError("a bug")


def _break_open(link: NodeLink) -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(("name", "broken"), [("_send_cancels", _broken), ("_note_open", _break_open)])
async def test_a_bug_in_a_link_ends_nobody_else(
    router: RunningRouter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    broken: Callable[[NodeLink], object],
) -> None:
    monkeypatch.setattr("router.node_link.MAX_BACKOFF_S", 0.05)
    healthy = getattr(NodeLink, name)

    def sometimes(link: NodeLink) -> object:
        return broken(link) if link.worker_id == "bad" else healthy(link)

    monkeypatch.setattr(NodeLink, name, sometimes)
    good, bad = node(router, "good"), node(router, "bad")
    async with nodes(good):
        await bad.start()
        await until(lambda: "the connection to bad failed" in caplog.text)
        assert await ask(router) == SCRIPT
        monkeypatch.setattr(NodeLink, name, healthy)
        await until(lambda: bad.registration.registered_with)
        await good.die()
        assert await ask(router) == SCRIPT
        await bad.die()
    assert not router.served.done()


async def test_a_bug_in_a_call_is_a_lost_node(router: RunningRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    only = node(router)
    async with nodes(only):
        failures = [RuntimeError("a bug")]
        call = RpcClient.call

        async def fail_once(client: RpcClient, url: str, *arguments: Any) -> object:
            if failures and url.endswith("/decode"):
                raise failures.pop()
            return await call(client, url, *arguments)

        monkeypatch.setattr(RpcClient, "call", fail_once)
        assert await ask(router) == SCRIPT
    assert not router.served.done()


async def test_a_process_that_was_held_up_has_lost_nobody(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop stands still for longer than a node may be silent, and finds signs of life when it goes on."""
    monkeypatch.setattr("router.node_link.SILENCE_S", 0.3)
    monkeypatch.setattr("runtime.token_outbox.SIGN_OF_LIFE_S", 0.05)
    only = node(router)
    only.hold_at = 7
    async with nodes(only):
        running = asyncio.create_task(ask(router))
        await until(lambda: len(only.sent) == 7)
        time.sleep(0.8)  # noqa: ASYNC251  # the pause
        await asyncio.sleep(0.1)
        only.go()
        assert await running == SCRIPT
    assert len(only.requests) == 1
