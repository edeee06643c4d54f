"""Servers on one event loop: bound first, announced when they answer, drained, closed to the last socket."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiohttp
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from protocol.errors import ConfigError
from runtime.health import health_routes
from runtime.life import Phase, ProcessLife
from runtime.metrics import EngineMetrics, new_registry
from runtime.serving import announce, bind_socket, serve_apps, serve_sockets, socket_url

HOST = "127.0.0.1"


async def nothing() -> None:
    return None


@dataclass
class Site:
    """An app with a slow stream and health routes, served in a task."""

    life: ProcessLife = field(default_factory=ProcessLife)
    stuck: str | None = None
    missing: str | None = None
    urls: list[str] = field(default_factory=list)
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        registry = new_registry()
        metrics = EngineMetrics(registry)

        async def hello(_: Request) -> Response:
            return JSONResponse({"hello": "world"})

        async def stream(_: Request) -> Response:
            async def parts() -> AsyncIterator[bytes]:
                yield b"first "
                await self.finished.wait()
                yield b"last"

            return StreamingResponse(parts())

        health = health_routes(
            self.life, lambda: self.stuck, lambda: self.missing, registry, refresh=lambda: metrics.running.set(7)
        )
        return Starlette(routes=[Route("/", hello), Route("/stream", stream), *health])

    async def serve(
        self, num_apps: int = 1, drain: Callable[[], "asyncio.Future[None]"] | None = None, drain_timeout_s: float = 5
    ) -> "asyncio.Task[None]":
        serving = asyncio.Event()

        def on_serving(urls: list[str]) -> None:
            self.urls = urls
            self.life.ready()
            serving.set()

        apps = [(self.app(), HOST, 0) for _ in range(num_apps)]
        task = asyncio.create_task(serve_apps(apps, self.life, drain or nothing, drain_timeout_s, on_serving))  # type: ignore[arg-type]
        await asyncio.wait_for(serving.wait(), 10)
        return task


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


async def status(client: aiohttp.ClientSession, url: str) -> int:
    async with client.get(url) as response:
        return response.status


async def test_two_apps_answer_on_the_ports_that_were_announced(client: aiohttp.ClientSession) -> None:
    site = Site()
    task = await site.serve(num_apps=2)
    assert len(set(site.urls)) == 2
    for url in site.urls:
        assert await status(client, url) == 200
    site.life.drain("test")
    await asyncio.wait_for(task, 10)
    assert site.life.phase is Phase.STOPPED
    for url in site.urls:
        with pytest.raises(aiohttp.ClientConnectorError):
            await status(client, url)


async def test_no_task_outlives_the_servers() -> None:
    before = asyncio.all_tasks()
    site = Site()
    task = await site.serve()
    async with aiohttp.ClientSession() as client, client.get(f"{site.urls[0]}/stream") as response:
        assert await response.content.readany() == b"first "
        site.life.stop("at once")
        await asyncio.wait_for(task, 10)
        assert asyncio.all_tasks() == before


async def test_streams_that_never_end_are_cut_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    site = Site()
    task = await site.serve()
    async with aiohttp.ClientSession() as client, client.get(f"{site.urls[0]}/stream") as response:
        assert await response.content.readany() == b"first "
        site.life.drain("test")
        await asyncio.wait_for(task, 10)
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET / HTTP/1.1\r\nhost:"])
async def test_a_connection_without_a_whole_request_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr("runtime.http_protocol.HEAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr("runtime.http_protocol.FIRST_BYTE_TIMEOUT_S", 0.05)
    site = Site()
    task = await site.serve()
    reader, writer = await asyncio.open_connection(HOST, int(site.urls[0].rsplit(":", 1)[1]))
    if sent:
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    site.life.stop("test")
    await asyncio.wait_for(task, 10)


async def test_what_runs_is_finished_while_draining(client: aiohttp.ClientSession) -> None:
    site = Site()
    drained = asyncio.Event()
    task = await site.serve(drain=drained.wait)  # type: ignore[arg-type]
    async with client.get(f"{site.urls[0]}/stream") as response:
        assert await response.content.readany() == b"first "
        site.life.drain("test")
        assert await status(client, f"{site.urls[0]}/ready") == 503
        assert await status(client, f"{site.urls[0]}/health") == 200
        site.finished.set()
        assert await response.content.read() == b"last"
    drained.set()
    await asyncio.wait_for(task, 10)


async def test_a_drain_that_takes_too_long_is_given_up() -> None:
    site = Site()
    never = asyncio.Event()
    task = await site.serve(drain=never.wait, drain_timeout_s=0.05)  # type: ignore[arg-type]
    site.life.drain("test")
    await asyncio.wait_for(task, 10)


async def test_a_drain_that_fails_does_not_keep_the_process(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise RuntimeError("broken drain")

    site = Site()
    task = await site.serve(drain=broken)  # type: ignore[arg-type]
    site.life.drain("test")
    await asyncio.wait_for(task, 10)
    assert "broken drain" in caplog.text


async def test_the_first_app_does_not_keep_its_port_if_the_second_cannot_have_its_own() -> None:
    with bind_socket(HOST, 0) as free, bind_socket(HOST, 0) as taken:
        free_port, taken_port = free.getsockname()[1], taken.getsockname()[1]
        free.close()
        apps = [(Site().app(), HOST, free_port), (Site().app(), HOST, taken_port)]
        with pytest.raises(ConfigError, match=str(taken_port)):
            await serve_apps(apps, ProcessLife(), nothing, 1, lambda _: None)
        bind_socket(HOST, free_port).close()


async def test_health_routes(client: aiohttp.ClientSession) -> None:
    site = Site()
    task = await site.serve()
    url = site.urls[0]
    async with client.get(f"{url}/ready") as response:
        assert (response.status, await response.json()) == (200, {"status": "ready"})
    site.missing = "no decode node"
    async with client.get(f"{url}/ready") as response:
        assert (response.status, (await response.json())["reason"]) == (503, "no decode node")
    site.stuck = "no step for 60 s"
    async with client.get(f"{url}/health") as response:
        assert (response.status, (await response.json())["reason"]) == (503, "no step for 60 s")
    async with client.get(f"{url}/metrics") as response:
        assert "headrace_requests_running 7.0" in await response.text()
    for path, expected in (("/health", 503), ("/ready", 503), ("/metrics", 200)):
        async with client.head(url + path) as response:
            assert response.status == expected
    site.life.drain("test")
    await asyncio.wait_for(task, 10)


async def test_readiness_before_the_start_is_complete(client: aiohttp.ClientSession) -> None:
    site = Site()
    serving = asyncio.Event()
    urls: list[str] = []

    def on_serving(found: list[str]) -> None:
        urls.extend(found)
        serving.set()

    site.life.note("loading model")
    task = asyncio.create_task(serve_apps([(site.app(), HOST, 0)], site.life, nothing, 1, on_serving))
    await serving.wait()
    async with client.get(f"{urls[0]}/ready") as response:
        assert (response.status, await response.json()) == (503, {"status": "starting", "reason": "loading model"})
    site.life.stop("test")
    await asyncio.wait_for(task, 10)


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])  # noqa: S104
def test_urls(host: str, expected: str) -> None:
    with bind_socket(host, 0) as bound:
        port = bound.getsockname()[1]
        assert socket_url(bound) == f"http://{expected}:{port}"
        with socket.create_connection((expected, port), timeout=5):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_an_address_that_cannot_be_had(host: str) -> None:
    with bind_socket(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{host} port {port}"):
            bind_socket(host, port)


def test_the_announcement_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    announce("router", "http://a", control_url="http://b")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {"event": "listening", "role": "router", "url": "http://a", "control_url": "http://b"}


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_farewell_is_said_while_the_server_still_answers(client: aiohttp.ClientSession, at_once: bool) -> None:
    """Also if the process is to stop at once: connections are whole, and nobody finds that no one listens."""
    site, answers = Site(), []

    async def farewell() -> None:
        answers.append(await status(client, site.urls[0]))

    serving = asyncio.Event()

    def on_serving(urls: list[str]) -> None:
        site.urls = urls
        site.life.ready()
        serving.set()

    served = [(site.app(), bind_socket(HOST, 0))]
    task = asyncio.create_task(serve_sockets(served, site.life, nothing, 5, on_serving, farewell))
    await asyncio.wait_for(serving.wait(), 10)
    if at_once:
        site.life.stop("test")
    else:
        site.life.drain("test")
    await asyncio.wait_for(task, 10)
    assert answers == [200]


async def test_a_farewell_that_fails_or_never_ends_keeps_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runtime.serving.FAREWELL_TIMEOUT_S", 0.05)

    async def fails() -> None:
        raise RuntimeError("a bug")

    async def never() -> None:
        await asyncio.Event().wait()

    for farewell, said in ((fails, "the farewell failed"), (never, "giving up the farewell")):
        life = ProcessLife()
        life.drain("test")
        served = [(Site().app(), bind_socket(HOST, 0))]
        await asyncio.wait_for(serve_sockets(served, life, nothing, 5, lambda _: None, farewell), 10)
        assert life.phase is Phase.STOPPED
        assert said in caplog.text
