"""Whoever reaches a node's control port without the key gets nothing out of any route but the public ones; with the key and
nonsense, a typed refusal. The routes are those of a real node, so a new one is in this test the day it is made."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from tiny_models import make_model

from protocol.errors import ErrorInfo
from protocol.wire import MAX_MESSAGE_BYTES, decode
from protocol.workers import Role
from tests.support.whole_node import CLUSTER_KEY, visit_node

PUBLIC = {"/health", "/ready", "/metrics"}
"""What an orchestrator asks; they show nothing secret and change nothing."""

ROLES: list[Role] = ["prefill", "decode"]
KEY = {"authorization": f"Bearer {CLUSTER_KEY}"}
WITHOUT_THE_KEY: dict[str, dict[str, str]] = {
    "nothing": {},
    "an empty header": {"authorization": ""},
    "another key": {"authorization": f"Bearer {CLUSTER_KEY[:-1]}x"},
    "the beginning of the key": {"authorization": f"Bearer {CLUSTER_KEY[:-1]}"},
    "more than the key": {"authorization": f"Bearer {CLUSTER_KEY}x"},
    "the key as another scheme": {"authorization": f"Basic {CLUSTER_KEY}"},
    "the bare key": {"authorization": CLUSTER_KEY},
    "a key of bytes": {"authorization": "Bearer \xff\xfe"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """An exception that leaves the application is the test's."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as client:
        yield client


def control_routes(app: Starlette) -> list[tuple[str, str]]:
    """Method and path of all that is not public."""
    found = []
    for route in app.routes:
        assert isinstance(route, Route), f"{route} is not checked by this test"
        if route.path not in PUBLIC:
            found += [(method, route.path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


@pytest.mark.parametrize("role", ROLES)
def test_no_control_route_answers_without_the_key(role: Role, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def visit(app: Starlette) -> None:
        routes = control_routes(app)
        assert {path.split("/")[1] for _, path in routes} <= {"node", "kv", "store"}
        assert any(path.startswith("/node/") for _, path in routes)
        async with client_of(app) as client:
            for method, path in routes:
                for what, headers in WITHOUT_THE_KEY.items():
                    for body in (b"", b"\x80", bytes(MAX_MESSAGE_BYTES + 1)):
                        answer = await client.request(method, path, headers=encoded(headers), content=body)
                        assert answer.status_code == 401, (path, what)
                        assert typed_error(answer).code == "unauthorized"

    visit_node(role, model, monkeypatch, visit)


def typed_error(answer: httpx.Response) -> ErrorInfo:
    if answer.headers["content-type"] == "application/json":
        return msgspec.json.decode(answer.content, type=ErrorInfo)
    return decode(answer.content, ErrorInfo)


def encoded(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode("latin-1") for name, value in headers.items()}


def nonsense() -> dict[str, bytes]:
    rng = random.Random(8)
    pack = msgspec.msgpack.encode
    return {
        "nothing": b"",
        "nil": pack(None),
        "a list": pack([1, 2, 3]),
        "text": pack("x" * 1000),
        "an empty object": pack({}),
        "json": b'{"ticket_id": "t"}',
        "html": b"<html></html>",
        "nesting": b"\x91" * 200_000,
        "half a message": pack({"ticket_id": "t", "incarnation": "i"})[:-1],
        "a length that lies": b"\xdf\xff\xff\xff\xff",
        "text that is no UTF-8": b"\x81\xa9ticket_id\xa1\xff",
        "ids that are too long": pack({"ticket_id": "t" * 129, "incarnation": "i", "request_ids": ["r" * 129]}),
        "ids of odd characters": pack({"ticket_id": "a b\n", "incarnation": "i", "router_id": "\x00"}),
        "numbers that are too large": pack({"request_ids": [1 << 63], "deadline_s": 1e300, "skip_blocks": -1}),
        "too much": bytes(MAX_MESSAGE_BYTES + 1),
        **{f"noise {i}": rng.randbytes(rng.randrange(1, 300)) for i in range(30)},
    }


@pytest.mark.parametrize("role", ROLES)
def test_nonsense_is_a_typed_refusal_on_every_route(role: Role, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def visit(app: Starlette) -> None:
        async with client_of(app) as client:
            for method, path in control_routes(app):
                for what, body in nonsense().items() if method == "POST" else ():
                    answer = await client.request(method, path, headers=KEY, content=body)
                    assert 400 <= answer.status_code < 500, (path, what, answer.status_code)
                    info = typed_error(answer)
                    assert info.code in ("malformed_message", "message_too_large"), (path, what, info)
                    assert not info.retryable
            assert (await client.get("/health")).status_code == 200

    visit_node(role, model, monkeypatch, visit)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("announced", [MAX_MESSAGE_BYTES + 1, 1 << 62])
def test_a_body_that_says_it_is_too_large_is_not_read(
    role: Role, announced: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield bytes(1 << 20)

    async def visit(app: Starlette) -> None:
        async with client_of(app) as client:
            for method, path in control_routes(app):
                if method == "POST":
                    headers = {**KEY, "content-length": str(announced)}
                    answer = await client.request(method, path, headers=headers, content=body())
                    assert answer.status_code == 413, path

    visit_node(role, model, monkeypatch, visit)
    assert num_read == 0


def test_the_public_routes_show_no_secret(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def visit(app: Starlette) -> None:
        async with client_of(app) as client:
            for path in PUBLIC:
                answer = await client.get(path)
                assert answer.status_code == 200
                assert CLUSTER_KEY not in answer.text

    visit_node("prefill", model, monkeypatch, visit)
