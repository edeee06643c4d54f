"""rpc_server, rpc_client, token_outbox and registration, over real sockets on loopback."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import aiohttp
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from protocol.errors import (
    ConfigError,
    HeadraceError,
    InvalidParameter,
    LayoutMismatch,
    MalformedMessage,
    MessageTooLarge,
    NodeLost,
    Overloaded,
    Unauthorized,
    WireVersionMismatch,
)
from protocol.ids import RequestId, RouterId
from protocol.kv_layout import KVLayout
from protocol.phases import DecodePhases, HandoffPhases, PrefillPhases
from protocol.tokens import (
    OpenTokenStream,
    PromptComputed,
    SampledToken,
    SequenceFailed,
    SequenceFinished,
    TokenChunk,
    TokenFrame,
)
from protocol.wire import decode, encode_frame
from protocol.workers import Heartbeat, HeartbeatReply, Leave, Registered, WorkerInfo, WorkerLoad
from runtime import registration as registration_module
from runtime.auth import check_bind
from runtime.registration import Registration
from runtime.rpc_client import RpcClient
from runtime.rpc_server import get_route, message_route, stream_route
from runtime.token_outbox import MAX_BUFFERED_FRAMES, TokenOutbox

KEY = "0123456789abcdef"
ROUTER = RouterId("router-1")
LOAD = WorkerLoad(running=0, waiting=0, waiting_tokens=0, free_blocks=1, steps=0, draining=False)
INFO = WorkerInfo(
    worker_id="p0",
    incarnation="i",
    wire_version=1,
    role="prefill",
    control_url="http://127.0.0.1:1",
    served_model="m",
    vocab_size=10,
    max_model_len=20,
    num_blocks=30,
    layout=KVLayout(
        model="m", revision="r", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, rope="x"
    ),
    transports=("nixl",),
)


@contextlib.asynccontextmanager
async def serving(*routes: Route) -> AsyncIterator[str]:
    config = uvicorn.Config(Starlette(routes=list(routes)), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def echo(message: WorkerLoad) -> WorkerLoad:
    return message


async def test_a_message_goes_there_and_back() -> None:
    async with serving(message_route("/echo", WorkerLoad, echo, KEY)) as url, RpcClient(KEY) as client:
        assert await client.call(f"{url}/echo", LOAD, WorkerLoad, 5) == LOAD


async def test_typed_errors_cross() -> None:
    async def refuse(message: WorkerLoad) -> None:
        raise InvalidParameter("no", param="seed")

    async with serving(message_route("/refuse", WorkerLoad, refuse, None)) as url, RpcClient(None) as client:
        with pytest.raises(InvalidParameter) as caught:
            await client.notify(f"{url}/refuse", LOAD, 5)
    assert caught.value.param == "seed"


async def test_what_cannot_be_decoded_is_refused_and_the_server_lives_on() -> None:
    async with serving(message_route("/echo", WorkerLoad, echo, None)) as url, RpcClient(None) as client:
        with pytest.raises(MalformedMessage):
            await client.call(f"{url}/echo", Leave("p0", "i"), WorkerLoad, 5)
        with pytest.raises(MessageTooLarge):
            await client.call(f"{url}/echo", b"x" * (9 << 20), WorkerLoad, 5)
        assert await client.call(f"{url}/echo", LOAD, WorkerLoad, 5) == LOAD


@pytest.mark.parametrize("key", [None, "0123456789abcdeX"])
async def test_the_cluster_key_guards_every_kind_of_route(key: str | None) -> None:
    async def forever(message: WorkerLoad) -> AsyncIterator[bytes]:
        raise AssertionError("reached without the key")

    async def status() -> WorkerLoad:
        return LOAD

    routes = (
        message_route("/echo", WorkerLoad, echo, KEY),
        stream_route("/stream", WorkerLoad, forever, KEY),
        get_route("/get", status, KEY),
    )
    async with serving(*routes) as url, RpcClient(key) as client:
        with pytest.raises(Unauthorized):
            await client.call(f"{url}/echo", LOAD, WorkerLoad, 5)
        with pytest.raises(Unauthorized):
            await client.get(f"{url}/get", WorkerLoad, 5)
        with pytest.raises(Unauthorized):
            async with client.stream(f"{url}/stream", LOAD, 5):
                pass


def test_no_open_control_plane_without_a_key() -> None:
    check_bind("127.0.0.1", None)
    check_bind("0.0.0.0", KEY)  # noqa: S104  # what is being tested
    for host, key in [("0.0.0.0", None), ("10.0.0.1", None), ("127.0.0.1", "short")]:  # noqa: S104
        with pytest.raises(ConfigError, match="cluster_key"):
            check_bind(host, key)


async def test_a_cancel_that_comes_with_the_answer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swallowed, it left whoever reads the stream reading for ever, and its process unable to end."""
    answered = asyncio.Event()

    class Response:
        status = 200

        def close(self) -> None:
            """Nothing was opened."""

    async def post(*_: object, **__: object) -> Response:
        await answered.wait()
        return Response()

    async def read(client: RpcClient) -> None:
        async with client.stream("http://127.0.0.1:1", LOAD, 5):
            await asyncio.Event().wait()

    monkeypatch.setattr(aiohttp.ClientSession, "post", post)
    async with RpcClient(KEY) as client:
        reading = asyncio.create_task(read(client))
        await asyncio.sleep(0.01)
        answered.set()
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading], timeout=5)
        assert reading.cancelled()


async def test_a_dead_or_silent_peer_is_node_lost() -> None:
    async def hang(message: WorkerLoad) -> None:
        await asyncio.sleep(0.6)

    async def one_then_silence(message: WorkerLoad) -> AsyncIterator[bytes]:
        async def frames() -> AsyncIterator[bytes]:
            yield encode_frame(LOAD)
            await asyncio.sleep(0.6)

        return frames()

    async with RpcClient(None) as client:
        with pytest.raises(NodeLost):
            await client.call("http://127.0.0.1:9/x", LOAD, WorkerLoad, 5)
        routes = (
            message_route("/hang", WorkerLoad, hang, None),
            stream_route("/stream", WorkerLoad, one_then_silence, None),
        )
        async with serving(*routes) as url:
            with pytest.raises(NodeLost):
                await client.call(f"{url}/hang", LOAD, WorkerLoad, 0.1)
            received = []
            with pytest.raises(NodeLost, match="silent"):
                async with client.stream(f"{url}/stream", LOAD, 0.2) as bodies:
                    async for body in bodies:
                        received.append(decode(body, WorkerLoad))
            assert received == [LOAD]


@pytest.mark.parametrize("host", ["..", "a" * 300, "nowhere.invalid"])
async def test_an_address_that_is_none_is_node_lost(host: str) -> None:
    async with RpcClient(None) as client:
        with pytest.raises(NodeLost):
            await client.call(f"http://{host}:1/x", LOAD, WorkerLoad, 2)
        with pytest.raises(NodeLost):
            async with client.stream(f"http://{host}:1/x", LOAD, 2):
                pass


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 No\r\ncontent-length: 100\r\n\r\nhalf",
        b"HTTP/1.1 302 Elsewhere\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\njunk",
        b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n" + b"100000\r\n" + b"x" * 0x100000 + b"\r\n",
        b"nonsense",
    ],
    ids=["half an error", "redirect", "no reply", "endless error", "no HTTP"],
)
async def test_whatever_a_peer_answers_is_node_lost(answer: bytes) -> None:
    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            for _ in range(16 if b"chunked" in answer else 0):
                writer.write(answer[answer.index(b"100000") :])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(misbehave, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    async with server, RpcClient(None) as client:
        with pytest.raises(NodeLost):
            await client.call(url, LOAD, WorkerLoad, 5)
        with pytest.raises((NodeLost, MessageTooLarge)):
            async with client.stream(url, LOAD, 5) as bodies:
                async for _ in bodies:
                    pass
                raise NodeLost("the stream ended, which its reader takes for a loss")


class Outbox:
    """A TokenOutbox, and the requests it reported lost."""

    def __init__(self) -> None:
        self.lost: list[RequestId] = []
        self.outbox = TokenOutbox(self.lost.extend)


def chunk(request_id: str, index: int = 0) -> TokenChunk:
    return TokenChunk(request_id, index, (SampledToken(7),))


async def next_frame(frames: AsyncIterator[bytes]) -> TokenFrame:
    return decode((await anext(frames))[4:], TokenFrame)


async def test_one_frame_a_step_and_router() -> None:
    box = Outbox()
    one, two = box.outbox.open(ROUTER), box.outbox.open(RouterId("router-2"))
    assert await next_frame(one) == TokenFrame(0, ())
    await next_frame(two)
    box.outbox.expect(RequestId("a"), ROUTER)
    box.outbox.expect(RequestId("b"), ROUTER)
    box.outbox.expect(RequestId("c"), RouterId("router-2"))
    box.outbox.post([chunk("a"), chunk("c"), chunk("b"), chunk("unknown")])
    assert await next_frame(one) == TokenFrame(1, (chunk("a"), chunk("b")))
    assert await next_frame(two) == TokenFrame(1, (chunk("c"),))
    await one.aclose()
    await two.aclose()
    assert sorted(box.lost) == ["a", "b", "c"]
    assert box.outbox.num_requests == 0


async def test_the_account_of_a_prompt_does_not_end_the_request() -> None:
    box = Outbox()
    frames = box.outbox.open(ROUTER)
    await next_frame(frames)
    box.outbox.expect(RequestId("a"), ROUTER)
    computed = PromptComputed("a", 0, PrefillPhases(0.5, 0.25))
    finished = SequenceFinished("a", "length", DecodePhases(HandoffPhases(), 1.0))
    for messages in ((chunk("a"), computed), (chunk("a", 1), finished)):
        box.outbox.post(messages)
        assert (await next_frame(frames)).messages == messages
    assert box.outbox.num_requests == 0
    await frames.aclose()
    assert box.lost == []


async def test_a_last_word_ends_the_request() -> None:
    box = Outbox()
    frames = box.outbox.open(ROUTER)
    await next_frame(frames)
    box.outbox.expect(RequestId("a"), ROUTER)
    box.outbox.post([SequenceFailed("a", NodeLost("x").to_info()), chunk("a")])
    assert len((await next_frame(frames)).messages) == 1
    await frames.aclose()
    assert box.lost == []


async def test_a_newer_stream_replaces_the_older_one() -> None:
    box = Outbox()
    older = box.outbox.open(ROUTER)
    await next_frame(older)
    box.outbox.expect(RequestId("a"), ROUTER)
    newer = box.outbox.open(ROUTER)
    assert box.lost == ["a"]
    with pytest.raises(StopAsyncIteration):
        await anext(older)
    box.outbox.expect(RequestId("b"), ROUTER)
    await next_frame(newer)
    await newer.aclose()
    assert box.lost == ["a", "b"]


async def test_a_second_request_of_one_id_leaves_the_first_alone() -> None:
    box = Outbox()
    frames = box.outbox.open(ROUTER)
    await next_frame(frames)
    box.outbox.expect(RequestId("a"), ROUTER)
    with pytest.raises(InvalidParameter):
        box.outbox.expect(RequestId("a"), ROUTER)
    box.outbox.post([chunk("a")])
    assert (await next_frame(frames)).messages == (chunk("a"),)
    await frames.aclose()


async def test_no_stream_no_request() -> None:
    with pytest.raises(Overloaded):
        Outbox().outbox.expect(RequestId("a"), ROUTER)


async def test_a_router_that_does_not_read_is_let_go() -> None:
    box = Outbox()
    box.outbox.open(ROUTER)
    box.outbox.expect(RequestId("a"), ROUTER)
    for index in range(MAX_BUFFERED_FRAMES + 1):
        box.outbox.post([chunk("a", index)])
    assert box.lost == ["a"]


async def test_the_stream_is_a_lease_over_the_wire() -> None:
    box = Outbox()

    async def tokens(message: OpenTokenStream) -> AsyncIterator[bytes]:
        return box.outbox.open(RouterId(message.router_id))

    async with serving(stream_route("/tokens", OpenTokenStream, tokens, None)) as url, RpcClient(None) as client:
        async with client.stream(f"{url}/tokens", OpenTokenStream(ROUTER), 5) as bodies:
            await anext(bodies)
            box.outbox.expect(RequestId("a"), ROUTER)
            box.outbox.post([chunk("a")])
            assert decode(await anext(bodies), TokenFrame).messages == (chunk("a"),)
        async with asyncio.timeout(5):
            while not box.lost:
                await asyncio.sleep(0.01)


async def test_registration_survives_the_routers_restart() -> None:
    heard: list[object] = []
    known = True

    async def register(info: WorkerInfo) -> Registered:
        heard.append(info)
        return Registered(0.01)

    async def heartbeat(message: Heartbeat) -> HeartbeatReply:
        heard.append(message)
        return HeartbeatReply(known)

    async def leave(message: Leave) -> None:
        heard.append(message)

    prefix = "/internal/v1/workers"
    routes = (
        message_route(f"{prefix}/register", WorkerInfo, register, KEY),
        message_route(f"{prefix}/heartbeat", Heartbeat, heartbeat, KEY),
        message_route(f"{prefix}/leave", Leave, leave, KEY),
    )
    async with serving(*routes) as url, RpcClient(KEY) as client:
        registration = Registration(client, (url,), INFO, lambda: LOAD)
        task = asyncio.create_task(registration.run())
        async with asyncio.timeout(10):
            while sum(isinstance(message, Heartbeat) for message in heard) < 2:
                await asyncio.sleep(0.005)
            known = False
            while sum(isinstance(message, WorkerInfo) for message in heard) < 2:
                await asyncio.sleep(0.005)
            known = True
            while registration.registered_with != {url}:
                await asyncio.sleep(0.005)
        await registration.leave()
        assert isinstance(heard[-1], Leave)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("kind", [LayoutMismatch, WireVersionMismatch])
async def test_a_refused_node_says_so_once_for_each_reason_and_asks_again(
    kind: type[HeadraceError], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registration_module, "REFUSED_RETRY_S", 0.01)
    asked = 0
    reason: str | None = "page_format"

    async def register(info: WorkerInfo) -> Registered:
        nonlocal asked
        asked += 1
        if reason is not None:
            raise kind(reason)
        return Registered(0.01)

    async def heartbeat(message: Heartbeat) -> HeartbeatReply:
        return HeartbeatReply(True)

    async def until_asked(times: int) -> None:
        until = asked + times
        while asked < until:
            await asyncio.sleep(0.005)

    prefix = "/internal/v1/workers"
    routes = (
        message_route(f"{prefix}/register", WorkerInfo, register, None),
        message_route(f"{prefix}/heartbeat", Heartbeat, heartbeat, None),
    )
    caplog.set_level(logging.WARNING, "runtime.registration")
    async with serving(*routes) as url, RpcClient(None) as client:
        registration = Registration(client, (url,), INFO, lambda: LOAD)
        assert registration.obstacle() == "registering with the routers"
        task = asyncio.create_task(registration.run())
        async with asyncio.timeout(10):
            await until_asked(3)
            assert registration.obstacle() == f"router {url} refuses this node: page_format"
            reason = "dtype"
            await until_asked(3)
            assert registration.obstacle() == f"router {url} refuses this node: dtype"
            reason = None
            while registration.obstacle() is not None:
                await asyncio.sleep(0.005)
        assert registration.registered_with == {url}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", f"router {url} refuses this node: page_format"),
        ("ERROR", f"router {url} refuses this node: dtype"),
    ]


async def test_a_router_that_is_away_or_one_that_refuses_beside_one_that_takes_it_is_no_obstacle() -> None:
    async def take(info: WorkerInfo) -> Registered:
        return Registered(0.01)

    async def refuse(info: WorkerInfo) -> Registered:
        raise LayoutMismatch("dtype")

    async def heartbeat(message: Heartbeat) -> HeartbeatReply:
        return HeartbeatReply(True)

    prefix = "/internal/v1/workers"
    beating = message_route(f"{prefix}/heartbeat", Heartbeat, heartbeat, None)
    async with (
        serving(message_route(f"{prefix}/register", WorkerInfo, take, None), beating) as taking,
        serving(message_route(f"{prefix}/register", WorkerInfo, refuse, None), beating) as refusing,
        RpcClient(None) as client,
    ):
        for urls in (("http://127.0.0.1:1",), (taking, refusing)):
            registration = Registration(client, urls, INFO, lambda: LOAD)
            task = asyncio.create_task(registration.run())
            async with asyncio.timeout(10):
                while registration.obstacle() is not None:
                    await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
