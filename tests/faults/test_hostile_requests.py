"""Nothing of a client's request reaches what nodes say to each other about KV, whatever its fields are called."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from fake_node import FakeNode, nodes
from router_process import RunningRouter, running_router
from text_model import make_text_model

from protocol.requests import DecodeRequest, PrefillRequest
from protocol.wire import encode

MARK = "smuggled"
TRACE = "a-name-for-the-log"
"""Of the client's request: the one word of a client's that travels, and nothing is looked up by it."""
TICKET = {
    "ticket_id": MARK,
    "request_id": MARK,
    "owner": MARK,
    "incarnation": MARK,
    "layout_fingerprint": "0" * 32,
    "control_url": f"http://{MARK}.example:1",
    "num_tokens": 20,
    "context_hash": MARK,
    "ttl_s": 3600,
}
SOURCE = {"worker": MARK, "incarnation": MARK, "control_url": f"http://{MARK}.example:1", "num_blocks": 1}
FIELDS: dict[str, Any] = {
    "ticket": TICKET,
    "sources": [SOURCE],
    "push": {"transport": "tcp", "block_ids": [0, 1, 2]},
    "request_id": MARK,
    "trace_id": MARK,
    "router_id": MARK,
    "ticket_id": MARK,
    "incarnation": MARK,
    "reader": MARK,
    "reader_incarnation": MARK,
    "owner": MARK,
    "worker_id": MARK,
    "control_url": f"http://{MARK}.example:1",
    "context_hash": MARK,
    "block_hashes": [MARK],
    "block_ids": [0, 1, 2],
    "skip_blocks": 7,
    "emitted_token_ids": [101, 102, 103],
    "prompt_token_ids": [101, 102, 103],
    "deadline_s": 86_000.5,
    "do_remote_prefill": True,
    "do_remote_decode": True,
    "remote_engine_id": MARK,
    "remote_block_ids": [0, 1, 2],
    "remote_host": f"{MARK}.example",
    "remote_port": 1,
    "disagg_prefill_resp": {"ctx_request_id": MARK, "first_gen_tokens": [101]},
    "disaggregated_params": {"request_type": "generation_only", "ctx_request_id": MARK},
    "bootstrap_host": MARK,
    "bootstrap_room": 1,
    "nvext": {"backend_instance_id": 1, "annotations": [MARK]},
    "sampling": {"max_tokens": 1_000_000, "seed": 1},
    "sampling_params": {"max_tokens": 1_000_000},
    "vllm_xargs": {"kv_transfer_params": TICKET},
    "extra_args": {"kv_transfer_params": TICKET},
    "metadata": {"ticket": MARK},
    "user": MARK,
}
HEADERS = {
    "x-request-id": TRACE,
    "x-ticket-id": MARK,
    "x-prefiller-host-port": f"{MARK}.example:1",
    "x-headrace-sources": json.dumps([SOURCE]),
    "traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
}
CHAT = {"messages": [{"role": "user", "content": "hello there, how does the mill turn today?"}]}
COMPLETION = {"prompt": list(range(2, 60))}
ENDPOINTS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


class Site:
    def __init__(self, router: RunningRouter, session: aiohttp.ClientSession) -> None:
        self.router = router
        self._session = session

    def pair(self) -> list[FakeNode]:
        url = self.router.control_url
        return [FakeNode("prefill", "p", url, [7, 8, 9]), FakeNode("decode", "d", url, [7, 8, 9])]

    async def post(self, path: str, **more: Any) -> tuple[int, Any]:
        body = {**ENDPOINTS[path], "max_tokens": 4, "ignore_eos": True, **more}
        async with self._session.post(self.router.url + path, json=body, headers=HEADERS) as response:
            return response.status, await response.json()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_router(make_text_model()) as router, aiohttp.ClientSession() as session:
        yield Site(router, session)


def check_clean(node: FakeNode, prefill: FakeNode) -> None:
    """What a node was sent is the router's own doing, field by field."""
    for request in node.requests:
        assert isinstance(request, PrefillRequest | DecodeRequest)
        assert request.trace_id == TRACE
        assert MARK.encode() not in encode(request)
        assert encode(request).count(TRACE.encode()) == 1
        assert request.request_id.startswith("req-")
        assert request.router_id.startswith("router-")
        assert request.emitted_token_ids == ()
        assert request.sources == ()
        assert request.sampling.max_tokens == 4
        assert request.deadline_s < 80_000
        assert not {101, 102, 103} & set(request.prompt_token_ids)
        if isinstance(request, DecodeRequest) and request.ticket is not None:
            assert (request.ticket.owner, request.ticket.control_url) == (prefill.worker_id, prefill.url)
            assert request.ticket.request_id == request.request_id


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_fields_named_like_ours_reach_no_node(site: Site, path: str) -> None:
    prefill, decode = pair = site.pair()
    async with nodes(*pair):
        status, honest = await site.post(path)
        assert status == 200, honest
        status, answer = await site.post(path, **FIELDS)
        assert status == 200, answer
        for name, value in FIELDS.items():
            status, answer = await site.post(path, **{name: value})
            assert status == 200, (name, answer)
            assert answer["choices"] == honest["choices"], name
        assert len(decode.requests) == 2 + len(FIELDS)
        assert any(request.ticket is not None for request in decode.requests)
        for node in pair:
            check_clean(node, prefill)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_client_that_asks_for_a_transfer_by_name_is_refused(site: Site, path: str) -> None:
    pair = site.pair()
    async with nodes(*pair):
        for value in ({"do_remote_prefill": True, "remote_block_ids": [1]}, TICKET, [], "x"):
            status, answer = await site.post(path, kv_transfer_params=value)
            assert status == 400, value
            assert answer["error"]["param"] == "kv_transfer_params"
        assert pair[0].requests == pair[1].requests == []


async def test_a_salt_that_looks_like_a_ticket_is_only_a_salt(site: Site) -> None:
    prefill, decode = pair = site.pair()
    salt = json.dumps(TICKET)
    async with nodes(*pair):
        status, _ = await site.post("/v1/completions", cache_salt=salt)
        assert status == 200
        for request in (*prefill.requests, *decode.requests):
            assert request.cache_salt == salt
        for request in decode.requests:
            assert request.ticket is None or request.ticket.ticket_id != MARK
