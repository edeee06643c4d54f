"""The router against nodes that answer from a script, over real HTTP: what clients see, and what nodes are told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from fake_node import LAYOUT, NUM_CACHED_TOKENS, FakeNode, nodes, until
from router_process import RunningRouter, running_router
from text_model import EOS, make_text_model, make_tokenizer

from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import InvalidParameter, LeaseExpired, NodeLost, Overloaded, UnavailableError

TEXT = "Ein Mühlrad: 水は流れる 🎉 end. The mill turns."
SCRIPT = make_tokenizer().encode(TEXT, add_special_tokens=False)
PROMPT = list(range(2, 60))


class Site:
    """One router with a client; nodes come and go."""

    def __init__(self, router: RunningRouter, session: aiohttp.ClientSession) -> None:
        self.router = router
        self.session = session
        self.url = router.url

    def node(self, role: Any, name: str, script: list[int] | None = None, **options: Any) -> FakeNode:
        return FakeNode(role, name, self.router.control_url, SCRIPT if script is None else script, **options)

    def pair(self) -> tuple[FakeNode, FakeNode]:
        return self.node("prefill", "p"), self.node("decode", "d")

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        body = {"max_tokens": len(SCRIPT), "ignore_eos": True, "return_token_ids": True} | body
        body.setdefault("prompt" if path == "/v1/completions" else "messages", PROMPT)
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            return response.status, await response.json()

    @asynccontextmanager
    async def stream(self, **body: Any) -> AsyncIterator["Events"]:
        body = {"prompt": PROMPT, "max_tokens": len(SCRIPT), "return_token_ids": True, "stream": True} | body
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        if path.endswith("chat/completions"):
            del body["prompt"]
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            yield Events(response)

    async def read_stream(self, **body: Any) -> "Events":
        async with self.stream(**body) as events:
            await events.read()
        return events


class Events:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.chunks: list[dict[str, Any]] = []
        self.done = False

    async def read(self, count: int | None = None) -> list[dict[str, Any]]:
        """The next events; all of them, up to [DONE], without a count."""
        new: list[dict[str, Any]] = []
        while count is None or len(new) < count:
            line = await self.response.content.readline()
            if not line:
                break
            if line.startswith(b"data: {"):
                new.append(json.loads(line[6:]))
            self.done = self.done or line.startswith(b"data: [DONE]")
        self.chunks += new
        return new

    def token_ids(self, index: int = 0) -> list[int]:
        return [
            token_id
            for chunk in self.chunks
            for choice in chunk.get("choices", [])
            if choice["index"] == index
            for token_id in choice.get("token_ids") or []
        ]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_router(make_text_model()) as router, aiohttp.ClientSession() as session:
        yield Site(router, session)


async def test_whole_and_streamed_answers_are_the_script(site: Site) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        status, answer = await site.post()
        assert status == 200
        choice = answer["choices"][0]
        assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (TEXT, SCRIPT, "length")
        assert answer["usage"] == {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": len(SCRIPT),
            "total_tokens": len(PROMPT) + len(SCRIPT),
            "prompt_tokens_details": {"cached_tokens": NUM_CACHED_TOKENS},
        }
        async with site.stream(stream_options={"include_usage": True}) as events:
            assert events.response.headers["content-type"].startswith("text/event-stream")
            await events.read()
        assert events.done
        assert events.token_ids() == SCRIPT
        assert "".join(choice["text"] for chunk in events.chunks for choice in chunk["choices"]) == TEXT
        assert events.chunks[-1]["choices"] == []
        assert events.chunks[-1]["usage"] == answer["usage"]
        assert all(chunk["usage"] is None for chunk in events.chunks[:-1])
        assert [len(node.requests) for node in (prefill, decode)] == [2, 2]
        ticket = decode.requests[0].ticket
        assert ticket is not None
        assert ticket.request_id == prefill.requests[0].request_id == decode.requests[0].request_id
        await asyncio.sleep(0.05)
        assert prefill.cancelled == decode.cancelled == []


async def test_the_first_token_does_not_wait_for_the_decode_node(site: Site) -> None:
    prefill, decode = site.pair()
    decode.hold_at = 0
    async with nodes(prefill, decode), site.stream() as events:
        (first,) = await events.read(1)
        assert first["choices"][0]["token_ids"] == SCRIPT[:1]
        await until(lambda: decode.requests)
        decode.go()
        await events.read()
        assert events.token_ids() == SCRIPT


async def test_one_token_needs_no_decode_node(site: Site) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        _, answer = await site.post(max_tokens=1)
        assert answer["choices"][0]["token_ids"] == SCRIPT[:1]
        assert decode.requests == []


async def test_a_stop_at_the_first_token_ends_the_decode_node_too(site: Site) -> None:
    prefill, decode = site.pair()
    prefill.script = [EOS]
    decode.hold_at = 0
    async with nodes(prefill, decode):
        prefill.hold_at = 0
        running = asyncio.create_task(site.post(ignore_eos=False))
        await until(lambda: decode.requests)
        prefill.go()
        _, answer = await running
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
        await until(lambda: decode.cancelled)
        assert decode.num_running == 0


async def test_short_prompts_and_missing_prefill_nodes_stay_local(site: Site) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        await site.post(prompt=PROMPT[:16])
        assert prefill.requests == []
        assert decode.requests[0].ticket is None
        await prefill.die()
        status, answer = await site.post()
        assert (status, answer["choices"][0]["token_ids"]) == (200, SCRIPT)


async def test_cached_tokens_are_of_the_prompt_when_the_answer_began(site: Site) -> None:
    """A second attempt finds cached what the first has computed, of the answer as well: the client's prompt was not."""
    prefill, first, second = site.node("prefill", "p"), site.node("decode", "d1"), site.node("decode", "d2")
    first.hold_at = 5
    async with nodes(prefill, first):
        reading = asyncio.create_task(site.read_stream(stream_options={"include_usage": True}))
        await until(lambda: len(first.sent) >= 5)
        prefill.num_cached_tokens = 4 * NUM_CACHED_TOKENS
        async with nodes(second):
            await first.die()
            events = await reading
        assert len(prefill.requests) == 2
        assert events.token_ids() == SCRIPT
        assert events.chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED_TOKENS}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("messages", [False, True])
async def test_cached_tokens_count_each_prompt_once(site: Site, stream: bool, messages: bool) -> None:
    """As prompt_tokens do: choices of one prompt share its blocks."""
    prompts: dict[str, Any] = {"prompt": [PROMPT, PROMPT[::-1]]}
    if messages:
        prompts = {"messages": [{"role": "user", "content": "Where does the water go from here, and who has sent it?"}]}
    async with nodes(*site.pair()):
        if stream:
            usage = (await site.read_stream(n=3, stream_options={"include_usage": True}, **prompts)).chunks[-1]["usage"]
        else:
            path = "/v1/chat/completions" if messages else "/v1/completions"
            usage = (await site.post(path, n=3, **prompts))[1]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED_TOKENS * (1 if messages else 2)}


@pytest.mark.parametrize("lost", ["p", "d1"])
@pytest.mark.parametrize("position", [0, 1, 5])
async def test_a_lost_node_does_not_show(site: Site, lost: str, position: int) -> None:
    """Whichever node dies, before or after the first token, the same stream goes on."""
    prefill, first, second = site.node("prefill", "p"), site.node("decode", "d1"), site.node("decode", "d2")
    first.hold_at, prefill.hold_at = position, 0 if position == 0 else None
    async with nodes(prefill, first):
        reading = asyncio.create_task(site.read_stream())
        await until(lambda: first.requests)
        await until(lambda: len(first.sent) >= position)
        async with nodes(second):
            await (prefill if lost == "p" else first).die()
            prefill.go()
            first.go()
            events = await reading
        assert events.token_ids() == SCRIPT
        assert events.done
        if lost == "d1":
            assert list(second.requests[-1].emitted_token_ids) == SCRIPT[:position]
            assert second.requests[-1].request_id != first.requests[0].request_id


@pytest.mark.parametrize(
    ("role", "failure"), [("decode", LeaseExpired("gone")), ("prefill", UnavailableError("engine is restarting"))]
)
async def test_a_failed_hand_off_is_computed_again_elsewhere(site: Site, role: str, failure: Any) -> None:
    prefill, decode = site.pair()
    failing = decode if role == "decode" else prefill
    failing.hold_at, failing.failure = 0, failure
    async with nodes(prefill, decode), site.stream() as events:
        await until(lambda: failing.requests)
        await until(lambda: failing.num_running == 0)
        failing.hold_at = None
        await events.read()
        assert events.token_ids() == SCRIPT
        assert decode.requests[-1].ticket is None, "the prefill node is not asked again"


@pytest.fixture
async def impatient() -> AsyncIterator[Site]:
    """A router that does not wait for lost nodes."""
    async with running_router(make_text_model(), worker_wait_s=0) as router, aiohttp.ClientSession() as session:
        yield Site(router, session)


async def test_nothing_left_is_a_typed_error(impatient: Site) -> None:
    site = impatient
    status, answer = await site.post()
    assert (status, answer["error"]["code"]) == (503, "no_worker")
    prefill, decode = site.pair()
    decode.hold_at = 5
    async with nodes(prefill, decode), site.stream() as events:
        while len(events.token_ids()) < 5:
            await events.read(1)
        await decode.die()
        (*_, last) = await events.read()
        assert last["error"]["code"] in ("no_worker", "node_lost")
        assert events.done
        assert events.token_ids() == SCRIPT[:5]
        await until(lambda: prefill.cancelled)


async def test_retries_are_bounded(site: Site) -> None:
    decoders = [site.node("decode", f"d{i}") for i in range(5)]
    for node in decoders:
        node.hold_at, node.failure = 0, UnavailableError("broken")
    async with nodes(*decoders):
        status, answer = await site.post()
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert sum(len(node.requests) for node in decoders) == 2


async def test_overload_tries_others_and_then_says_when(site: Site) -> None:
    prefill, second, decode = site.node("prefill", "p1"), site.node("prefill", "p2"), site.node("decode", "d")
    prefill.refusal = Overloaded("full", retry_after_s=2.5)
    async with nodes(prefill, second, decode):
        for _ in range(4):
            status, answer = await site.post()
            assert (status, answer["choices"][0]["token_ids"]) == (200, SCRIPT)
        second.refusal = prefill.refusal
        async with site.session.post(f"{site.url}/v1/completions", json={"prompt": PROMPT}) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "3"
            assert (await response.json())["error"]["type"] == "rate_limit_error"


async def test_a_crowded_decode_node_is_not_the_last(site: Site) -> None:
    crowded, roomy = site.node("decode", "d1"), site.node("decode", "d2")
    crowded.refusal = Overloaded("full", retry_after_s=2.5)
    async with nodes(site.node("prefill", "p"), crowded, roomy):
        for prompt in (PROMPT[:5], PROMPT, PROMPT[:5], PROMPT):
            status, answer = await site.post(prompt=prompt)
            assert (status, answer["choices"][0]["token_ids"]) == (200, SCRIPT)
        roomy.refusal = crowded.refusal
        status, answer = await site.post(prompt=PROMPT[:5])
        assert (status, answer["error"]["code"]) == (429, "overloaded")


async def test_what_a_retry_cannot_mend_surfaces(site: Site) -> None:
    prefill, decode = site.pair()
    prefill.refusal = InvalidParameter("no such thing", param="thing")
    async with nodes(prefill, decode):
        status, answer = await site.post()
        assert (status, answer["error"]["param"]) == (400, "thing")
        assert decode.requests == []


async def test_a_client_that_leaves_frees_both_nodes(site: Site) -> None:
    prefill, decode = site.pair()
    prefill.hold_at = decode.hold_at = 0
    async with nodes(prefill, decode):
        for stream in (True, False):
            asking = asyncio.create_task(site.post(stream=stream))
            await until(lambda: decode.num_running)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: not prefill.num_running and not decode.num_running)
            assert prefill.cancelled[-1:] == decode.cancelled[-1:] == [decode.requests[-1].request_id]


async def test_a_cancel_does_not_overtake_its_request(site: Site) -> None:
    prefill, decode = site.pair()
    slow = asyncio.Event()
    accept = prefill._prefill

    async def slowly(request: Any) -> Any:
        await slow.wait()
        return await accept(request)

    prefill._prefill = slowly  # type: ignore[method-assign]
    async with nodes(prefill, decode):
        asking = asyncio.create_task(site.post())
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: prefill.cancelled)
        slow.set()
        await until(lambda: prefill.requests)
        await until(lambda: len(prefill.cancelled) == 2)
        assert decode.requests == []


async def test_several_choices(site: Site) -> None:
    prefill, decode = site.pair()
    prefill.hold_at = decode.hold_at = 0
    async with nodes(prefill, decode):
        reading = asyncio.create_task(site.read_stream(n=3, seed=7, prompt=[PROMPT, PROMPT[::-1]]))
        await until(lambda: len(decode.requests) == 2)
        await asyncio.sleep(0.02)
        assert len(prefill.requests) == 2, "the others wait for the first choice's prefill"
        prefill.go()
        decode.go()
        events = await reading
        assert [events.token_ids(index) for index in range(6)] == [SCRIPT] * 6
        seeds = sorted(request.sampling.seed for request in decode.requests)
        assert seeds == [7, 7, 8, 8, 9, 9]
        assert len({request.request_id for request in decode.requests}) == 6


async def test_stop_strings_across_tokens(site: Site) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        decode.hold_at = len(SCRIPT) - 1
        _, answer = await site.post(stop=["nothing", "流れる 🎉"])
        choice = answer["choices"][0]
        assert choice["text"] == TEXT[: TEXT.index("流れる")]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "流れる 🎉")
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) < len(SCRIPT)
        await until(lambda: decode.cancelled)
        _, answer = await site.post(stop="流れる", include_stop_str_in_output=True)
        assert answer["choices"][0]["text"] == TEXT[: TEXT.index("れる") + 2]


async def test_stop_token_ids(site: Site) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        _, answer = await site.post(stop_token_ids=[SCRIPT[9]])
        stopped = SCRIPT.index(SCRIPT[9])
        choice = answer["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", SCRIPT[9])
        assert choice["token_ids"] == SCRIPT[: stopped + 1]
        assert choice["text"] == make_tokenizer().decode(SCRIPT[:stopped], skip_special_tokens=True)


@pytest.mark.parametrize("local", [True, False])
async def test_the_phases_add_up(site: Site, local: bool) -> None:
    prefill, decode = site.pair()
    async with nodes(prefill, decode):
        if local:
            await prefill.die()
        _, answer = await site.post(include_timing=True)
        timing = answer["choices"][0]["timing"]
        total, parts = timing.pop("total_ms"), timing.pop("handoff")
        assert sum(timing.values()) == pytest.approx(total, rel=0.01)
        assert parts == {"queue_ms": 0, "wire_ms": 0.1, "verify_ms": 0, "join_ms": 0.2}
        assert (timing["queue_ms"], timing["prefill_ms"]) == (0.1, 0.2)
        assert (timing["handoff_ms"], timing["decode_ms"]) == (0.3, 0.4)
        _, stopped = await site.post(include_timing=True, stop="Müh")
        timing = stopped["choices"][0]["timing"]
        total, parts = timing.pop("total_ms"), timing.pop("handoff")
        assert sum(timing.values()) == pytest.approx(total, rel=0.01)
        assert sum(parts.values()) == timing["handoff_ms"]
        assert all(value >= 0 for value in timing.values())


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("stop", [TEXT[0], "rad"])
async def test_a_stop_string_keeps_the_account_of_the_prompt(site: Site, local: bool, stop: str) -> None:
    """Even one in the first token. The decode node waits, so that a remote prefill's word is there in time."""
    prefill, decode = site.pair()
    decode.hold_at = None if local else 0
    async with nodes(prefill, decode):
        if local:
            await prefill.die()
        asked = {"stop": stop, "include_timing": True, "stream_options": {"include_usage": True}}
        async with site.stream(**asked) as events:
            await events.read(1)
            decode.go()
            await events.read()
        choices = [choice for chunk in events.chunks for choice in chunk["choices"]]
        assert "".join(choice["text"] for choice in choices) == TEXT[: TEXT.index(stop)]
        assert (choices[-1]["timing"]["queue_ms"], choices[-1]["timing"]["prefill_ms"]) == (0.1, 0.2)
        assert events.chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED_TOKENS}


async def test_two_nodes_that_disagree_do_not_mix(site: Site) -> None:
    prefill, decode = site.pair()
    decode.script = [SCRIPT[0] + 1, *SCRIPT[1:]]
    async with nodes(prefill, decode):
        _, answer = await site.post()
        tokens = answer["choices"][0]["token_ids"]
        assert tokens in ([SCRIPT[0], *SCRIPT[1:]], decode.script)


async def test_the_prompt_goes_where_its_prefix_is(site: Site) -> None:
    near, far, decode = site.node("prefill", "near"), site.node("prefill", "far"), site.node("decode", "d")
    near.stored = tuple(hash_blocks(PROMPT, 16, root_hash(LAYOUT.identity)))
    async with nodes(near, far, decode):
        for _ in range(6):
            await site.post(max_tokens=2)
        assert (len(near.requests), len(far.requests)) == (6, 0)


async def test_a_reader_that_stops_reading_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.generation.MAX_UNREAD_TOKENS", 50)
    prefill, decode = site.pair()
    decode.script = SCRIPT * 4
    async with nodes(prefill, decode):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]), limit=1024)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        body = {"prompt": PROMPT, "max_tokens": 190, "stream": True, "logprobs": 20, "n": 100}
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await until(lambda: decode.cancelled, 20)
        await until(lambda: not decode.num_running)
        writer.close()


class TestThroughTheOfficialClient:
    async def test_chat(self, site: Site) -> None:
        prefill, decode = site.pair()
        client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
        async with nodes(prefill, decode), client:
            messages: Any = [
                {"role": "system", "content": "Answer."},
                {"role": "user", "content": [{"type": "text", "text": "What turns?"}]},
            ]
            arguments: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": len(SCRIPT)}
            whole = await client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
            assert whole.choices[0].message.content == TEXT
            assert whole.object == "chat.completion"
            assert whole.choices[0].logprobs is not None
            content = whole.choices[0].logprobs.content or []
            assert b"".join(bytes(entry.bytes or []) for entry in content) == TEXT.encode()
            assert [len(entry.top_logprobs) for entry in content] == [2] * len(SCRIPT)
            rendered = make_tokenizer().decode(list(decode.requests[0].prompt_token_ids), skip_special_tokens=False)
            assert rendered == ("<|start|>system\nAnswer.<|end|><|start|>user\nWhat turns?<|end|><|start|>assistant\n")
            stream = await client.chat.completions.create(
                **arguments, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
            assert chunks[-2].choices[0].delta.content is None
            assert chunks[-1].usage == whole.usage

    async def test_completions(self, site: Site) -> None:
        prefill, decode = site.pair()
        client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
        async with nodes(prefill, decode), client:
            answer = await client.completions.create(
                model="tiny", prompt=["Water runs", "The mill"], max_tokens=12, logprobs=2, n=2
            )
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert len(logprobs.tokens or []) == 12
            assert (logprobs.text_offset or [])[0] == 0
            assert [max(top.values()) for top in logprobs.top_logprobs or []] == [-0.5] * 12
            echoed = await client.completions.create(model="tiny", prompt="Water runs", max_tokens=12, echo=True)
            assert echoed.choices[0].text == "Water runs" + answer.choices[0].text
            assert [model.id for model in (await client.models.list()).data] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"

    async def test_errors(self, site: Site) -> None:
        client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
        async with client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="other", prompt="x")
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="tiny", prompt="x", temperature=9)
            assert bad.value.param == "temperature"
            with pytest.raises(openai.InternalServerError) as none:
                await client.completions.create(model="tiny", prompt="x")
            assert none.value.code == "no_worker"
        prefill, decode = site.pair()
        decode.hold_at, decode.failure = 3, NodeLost("x")
        client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
        async with nodes(prefill, decode), client:
            stream = await client.completions.create(model="tiny", prompt=PROMPT, stream=True)
            with pytest.raises(openai.APIError):
                async for _ in stream:
                    pass


async def test_drain_finishes_what_runs_and_lets_nothing_in(site: Site) -> None:
    prefill, decode = site.pair()
    decode.hold_at = 3
    async with nodes(prefill, decode), site.stream() as events:
        await events.read(1)
        site.router.life.drain("test")
        await asyncio.sleep(0.02)
        status, answer = await site.post()
        assert (status, answer["error"]["code"]) == (503, "draining")
        async with site.session.get(f"{site.url}/ready") as response:
            assert response.status == 503
        decode.go()
        await events.read()
        assert events.token_ids() == SCRIPT
        async with asyncio.timeout(5):
            await site.router.served
