"""What clients may send, and what they are told when they send something else. No node, no socket."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from text_model import EOS, make_text_model, make_tokenizer

from protocol.errors import Draining, InternalError, InvalidParameter, Overloaded, RequestError
from protocol.ids import new_router_id
from protocol.phases import DecodePhases, HandoffPhases, PrefillPhases
from router.admission import Admission
from router.api_choices import make_choices, text_options
from router.api_errors import error_body
from router.api_types import ChatRequest, CompletionRequest, decode_request
from router.app import build_app
from router.cluster import Cluster
from router.config import RouterConfig
from router.ledger import Ledger
from router.prompts import Limits, PromptText, TextModel
from router.services import make_services
from runtime.clock import ManualClock, MonotonicClock
from runtime.life import ProcessLife
from runtime.rpc_client import RpcClient

JSON = {"content-type": "application/json"}
MODEL = make_text_model()


@asynccontextmanager
async def client_of(model: TextModel = MODEL, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = RouterConfig(**settings)
    life = ProcessLife()
    life.ready()
    clock = MonotonicClock()
    async with RpcClient(None) as rpc, Cluster(config, model.name, rpc, new_router_id(), clock) as cluster:
        app = build_app(make_services(config, model, cluster, life, clock, CollectorRegistry(), 1_700_000_000))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
            yield client


BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "invalid_parameter"),
    ({"prompt": []}, "prompt", "invalid_parameter"),
    ({"prompt": [[]]}, "prompt", "invalid_parameter"),
    ({"prompt": ["a", ""]}, "prompt", "invalid_parameter"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_parameter"),
    ({"prompt": [[1], "a"]}, "prompt", "invalid_parameter"),
    ({"prompt": [400]}, "prompt", "invalid_parameter"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_parameter"),
    ({"prompt": 7}, "prompt", "invalid_parameter"),
    ({"prompt": {"text": "a"}}, "prompt", "invalid_parameter"),
    ({"prompt": None}, "prompt", "invalid_parameter"),
    ({"prompt": ["a"] * 129}, "prompt", "invalid_parameter"),
    ({"prompt": [5] * 256}, "prompt", "context_length_exceeded"),
    ({"prompt": "word " * 400}, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 300_000}, "prompt", "context_length_exceeded"),
    ({"max_tokens": 0}, "max_tokens", "invalid_parameter"),
    ({"max_tokens": -1}, "max_tokens", "invalid_parameter"),
    ({"max_tokens": "10"}, "max_tokens", "invalid_parameter"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_parameter"),
    ({"max_tokens": True}, "max_tokens", "invalid_parameter"),
    ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 256}, "max_tokens", "context_length_exceeded"),
    ({"temperature": -0.1}, "temperature", "invalid_parameter"),
    ({"temperature": 2.1}, "temperature", "invalid_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_parameter"),
    ({"top_p": 0}, "top_p", "invalid_parameter"),
    ({"top_p": 1.1}, "top_p", "invalid_parameter"),
    ({"top_k": -2}, "top_k", "invalid_parameter"),
    ({"min_p": 1.5}, "min_p", "invalid_parameter"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_parameter"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_parameter"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_parameter"),
    ({"n": 0}, "n", "invalid_parameter"),
    ({"n": 10**9}, "n", "invalid_parameter"),
    ({"n": 128, "prompt": ["a", "b", "c"]}, "n", "invalid_parameter"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_parameter"),
    ({"stop": ""}, "stop", "invalid_parameter"),
    ({"stop": [""]}, "stop", "invalid_parameter"),
    ({"stop": "x" * 2000}, "stop", "invalid_parameter"),
    ({"stop": [1]}, "stop[0]", "invalid_parameter"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "invalid_parameter"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_parameter"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids", "invalid_parameter"),
    ({"min_tokens": 17}, "min_tokens", "invalid_parameter"),
    ({"min_tokens": -1}, "min_tokens", "invalid_parameter"),
    ({"logprobs": 21}, "logprobs", "invalid_parameter"),
    ({"logprobs": -1}, "logprobs", "invalid_parameter"),
    ({"logprobs": 1, "echo": True}, "logprobs", "invalid_parameter"),
    ({"logit_bias": {"400": 1}}, "logit_bias", "invalid_parameter"),
    ({"logit_bias": {"one": 1}}, "logit_bias", "invalid_parameter"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_parameter"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_parameter"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_parameter"),
    ({"seed": "one"}, "seed", "invalid_parameter"),
    ({"seed": 1 << 63}, "seed", "invalid_parameter"),
    ({"seed": -(1 << 63) - 1}, "seed", "invalid_parameter"),
    ({"stream": "yes"}, "stream", "invalid_parameter"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "invalid_parameter"),
    ({"cache_salt": ""}, "cache_salt", "invalid_parameter"),
    ({"cache_salt": "x" * 1025}, "cache_salt", "invalid_parameter"),
    ({"model": 5}, "model", "invalid_parameter"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "unsupported_parameter"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "unsupported_parameter"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "unsupported_parameter"),
]
USER = {"role": "user", "content": "hi"}
BAD_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "invalid_parameter"),
    ({"messages": "hi"}, "messages", "invalid_parameter"),
    ({"messages": [7]}, "messages[0]", "invalid_parameter"),
    ({"messages": None}, "messages", "invalid_parameter"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "invalid_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_parameter"),
    ({"messages": [{"role": "user", "content": []}]}, "messages", "invalid_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "invalid_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "refused", "content": "x"}]}, None, "invalid_request"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages", "context_length_exceeded"),
    ({"messages": [USER] * 4097}, "messages", "invalid_parameter"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_parameter"),
    ({"max_completion_tokens": 300}, "max_completion_tokens", "context_length_exceeded"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_parameter"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_parameter"),
    ({"logprobs": 5}, "logprobs", "invalid_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
    ({"functions": [{}]}, "functions", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"continue_final_message": True}, "continue_final_message", "unsupported_parameter"),
    ({"chat_template": "{{ 7 }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", "invalid_parameter"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs", "invalid_parameter"),
    ({"chat_template_kwargs": {str(i): 1 for i in range(33)}}, "chat_template_kwargs", "invalid_parameter"),
]


def check_error(response: httpx.Response, status: int, param: str | None, code: str) -> None:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["message"]
    assert len(response.content) < 1500


async def test_bad_values_are_named() -> None:
    async with client_of() as client:
        for path, valid, table in (
            ("/v1/completions", {"prompt": "hi"}, BAD_COMPLETIONS),
            ("/v1/chat/completions", {"messages": [USER]}, BAD_CHATS),
        ):
            for fields, param, code in table:
                response = await client.post(path, json={"model": "tiny"} | valid | fields)
                check_error(response, 400, param, code)
                assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a"',
        b"[1]",
        b"7",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "x": ' + b"[" * 100_000,
        b'{"prompt": "a", "user": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    ],
)
async def test_what_is_no_json_object(body: bytes) -> None:
    async with client_of() as client:
        check_error(await client.post("/v1/completions", content=body, headers=JSON), 400, None, "invalid_request")


async def test_refusals_of_the_edge() -> None:
    async with client_of(max_body_bytes=1000) as client:
        chat = {"messages": [USER]}
        check_error(
            await client.post("/v1/chat/completions", json=chat | {"model": "x" * 400}), 404, "model", "model_not_found"
        )
        check_error(await client.get("/v1/models/other"), 404, "model", "model_not_found")
        check_error(
            await client.post("/v1/completions", content=b"x" * 1001, headers=JSON), 413, None, "payload_too_large"
        )

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 500

        check_error(
            await client.post("/v1/completions", content=chunks(), headers=JSON), 413, None, "payload_too_large"
        )
        wrong_type = {"content-type": "text/plain"}
        check_error(
            await client.post("/v1/completions", content=b"{}", headers=wrong_type), 415, None, "unsupported_media_type"
        )
        check_error(await client.post("/v1/completions", content=b"{}"), 415, None, "unsupported_media_type")
        check_error(await client.get("/v1/completions"), 405, None, "method_not_allowed")
        check_error(await client.get("/v1/nothing"), 404, None, "not_found")
        check_error(await client.get("/internal/v1/workers"), 404, None, "not_found")
        check_error(await client.get("/docs"), 404, None, "not_found")
        response = await client.post("/v1/completions", json={"prompt": "hi"})
        check_error(response, 503, None, "no_worker")
        assert response.headers["retry-after"] == "1"
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
        check_error(response, 503, None, "no_worker")


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http_edge.BODY_TIMEOUT_S", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of() as client:
        response = await client.post("/v1/completions", content=stalled(), headers=JSON)
        check_error(response, 408, None, "request_timeout")
        assert response.headers["connection"] == "close"


async def test_a_long_prompt_is_told_both_numbers() -> None:
    async with client_of() as client:
        response = await client.post("/v1/completions", json={"prompt": [5] * 300})
        assert "256" in response.json()["error"]["message"]
        assert "300" in response.json()["error"]["message"]


async def test_a_model_without_a_template_cannot_chat() -> None:
    async with client_of(make_text_model(template=None)) as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER]})
        check_error(response, 400, "messages", "invalid_request")
        assert "chat template" in response.json()["error"]["message"]


async def test_an_error_is_smaller_than_what_caused_it() -> None:
    async with client_of() as client:
        body = {"messages": [{"role": "user", "content": [{"kind": i} for i in range(20_000)]}], "x" * 100_000: 1}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert len(response.content) < 1500
    assert len(error_body(InternalError("x" * 100_000)).error.message) <= 1000


async def test_the_key_guards_everything_but_the_probes() -> None:
    async with client_of(api_key="secret-key") as client:
        for method, path in [
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("GET", "//health"),
            ("GET", "/nothing"),
        ]:
            check_error(await client.request(method, path), 401, None, "invalid_api_key")
        wrong = {"authorization": "Bearer secret-kez"}
        check_error(await client.get("/v1/models", headers=wrong), 401, None, "invalid_api_key")
        odd = {"authorization": b"Bearer \xff"}
        check_error(await client.get("/v1/models", headers=odd), 401, None, "invalid_api_key")
        right = {"authorization": "Bearer secret-key"}
        assert (await client.get("/v1/models", headers=right)).status_code == 200
        for path in ("/health", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200


async def test_probes_models_and_request_ids() -> None:
    async with client_of() as client:
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "decode node" in response.text
        models = (await client.get("/v1/models")).json()
        assert models["object"] == "list"
        assert models["data"] == [
            {"id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "headrace", "max_model_len": 256}
        ]
        assert (await client.get("/v1/models/tiny")).json() == models["data"][0]
        assert (await client.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
        odd = (await client.get("/health", headers={"x-request-id": "a b"})).headers["x-request-id"]
        assert odd
        assert odd != "a b"
        assert "headrace_router_workers" in (await client.get("/metrics")).text
        assert "version" in (await client.get("/version")).json()


def test_unknown_fields_are_logged_once_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"prompt": "hi", "frobnicate_xyz": [1], "user": "u", "metadata": {}, "tools": None}).encode()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert decode_request(body, CompletionRequest).prompt == "hi"
    assert caplog.text.count("frobnicate_xyz") == 1
    assert "metadata" not in caplog.text


def test_fields_that_ask_for_nothing_are_no_trouble() -> None:
    body = {
        "messages": [USER],
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "best_of": 1,
        "modalities": ["text"],
        "audio": None,
    }
    assert decode_request(json.dumps(body).encode(), ChatRequest).messages[0].content == "hi"
    for value in ({"best_of": True}, {"best_of": 1.0}, {"tools": [{"a": "b" * 1000}]}):
        with pytest.raises(RequestError):
            decode_request(json.dumps({"messages": [USER]} | value).encode(), ChatRequest)


LIMITS = Limits(max_model_len=100, vocab_size=make_tokenizer().vocab_size)
PROMPTS = [PromptText((5, 6, 7), ""), PromptText((8,), "")]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(prompt="x", **fields)


def test_defaults_are_openais() -> None:
    (choice,) = make_choices(MODEL, LIMITS, completion(), PROMPTS[:1], None)
    sampling = choice.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert sampling.stop_token_ids == (EOS,)
    (chat,) = make_choices(MODEL, LIMITS, ChatRequest(messages=[]), PROMPTS[:1], None)
    assert chat.sampling.max_tokens == 97
    (edge,) = make_choices(MODEL, LIMITS, completion(), [PromptText((5,) * 95, "")], None)
    assert edge.sampling.max_tokens == 5


def test_seeds_and_leaders() -> None:
    choices = make_choices(MODEL, LIMITS, completion(n=2, seed=-1), PROMPTS, None)
    assert [choice.leader for choice in choices] == [0, 0, 2, 2]
    assert [choice.sampling.seed for choice in choices] == [(1 << 63) - 1, 0] * 2
    drawn = {choice.sampling.seed for choice in make_choices(MODEL, LIMITS, completion(n=8), PROMPTS, None)}
    assert len(drawn) == 16


def test_what_nodes_get() -> None:
    request = completion(top_k=-1, logit_bias={"7": -100}, ignore_eos=True, stop_token_ids=[9, 9], stop="x")
    (choice,) = make_choices(MODEL, LIMITS, request, PROMPTS[:1], None)
    assert (choice.sampling.top_k, choice.sampling.logit_bias) == (0, {7: -100})
    assert choice.sampling.stop_token_ids == (9,)
    assert text_options(request, None).stop == ("x",)


def test_admission_counts_tokens_until_they_are_computed() -> None:
    admission = Admission(max_queued_tokens=100)
    with admission.hold(1000) as large:
        with pytest.raises(Overloaded) as caught, admission.hold(1):
            pass
        assert caught.value.retry_after_s
        large.release()
        large.release()
        with admission.hold(60), pytest.raises(Overloaded), admission.hold(60):
            pass
        assert (admission.queued_tokens, admission.num_requests) == (0, 1)
    admission.draining = True
    with pytest.raises(Draining), admission.hold(1):
        pass


def test_ledger_of_a_sequence() -> None:
    clock = ManualClock()
    ledger = Ledger(clock, clock.now())
    clock.advance(1)
    ledger.dispatched()
    clock.advance(4)
    ledger.tokens_arrived()
    ledger.prefilled(PrefillPhases(queue_s=1, prefill_s=2))
    clock.advance(5)
    ledger.tokens_arrived()
    stopped = ledger.close()
    assert (stopped.router_s, stopped.decode_s, stopped.transit_s, stopped.total_s) == (1, 5, 1, 10)
    ledger.decoded(DecodePhases(HandoffPhases(queue_s=0.25, join_s=0.25), decode_s=4))
    whole = ledger.close()
    assert (whole.handoff_s, whole.decode_s, whole.transit_s) == (0.5, 4, 1.5)
    ledger.decoded(DecodePhases(HandoffPhases(join_s=0.5), decode_s=400))
    assert ledger.close().transit_s == 0


def test_the_time_of_a_lost_attempt_is_in_transit() -> None:
    clock = ManualClock()
    ledger = Ledger(clock, clock.now())
    ledger.dispatched()
    clock.advance(1)
    ledger.tokens_arrived()
    ledger.prefilled(PrefillPhases(queue_s=0, prefill_s=1))
    clock.advance(20)
    ledger.dispatched()
    assert ledger.close().prefill_s == 0
    clock.advance(2)
    ledger.tokens_arrived()
    ledger.prefilled(PrefillPhases(queue_s=0.5, prefill_s=1))
    clock.advance(3)
    ledger.tokens_arrived()
    stopped = ledger.close()
    assert (stopped.queue_s, stopped.prefill_s, stopped.decode_s) == (0.5, 1, 3)
    assert (stopped.transit_s, stopped.total_s) == (21.5, 26)
    assert ledger.first_token_s == 1


def test_no_tensor_library_in_the_router() -> None:
    code = (
        "import sys, router.app, router.main, router.control_app\n"
        "loaded = {'torch', 'transformers', 'numpy.linalg'} & set(sys.modules)\n"
        "assert 'torch' not in loaded and 'transformers' not in loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_invalid_parameter_keeps_its_name() -> None:
    assert error_body(InvalidParameter("bad", param="x")).error.param == "x"
