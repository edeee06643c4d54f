"""GenerationEndpoint: one POST, from its bytes to its answer, on the raw ASGI path.

read -> decode -> prompts -> choices -> run until finished, failed or the client has gone -> answer
"""

from collections.abc import Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from protocol.errors import Cancelled, Draining, HeadraceError
from protocol.ids import TraceId, new_trace_id
from router.api_choices import make_choices, text_options
from router.api_types import ChatRequest, CompletionRequest, decode_request
from router.generation import Generation
from router.http_edge import REQUEST_ID_KEY, json_response, read_json, run_until_disconnect
from router.openai_format import AnswerFormat, make_usage
from router.progress import Progress
from router.prompts import Limits, PromptText, TextModel, check_model
from router.services import Services
from router.sse import EventStream, UsageOptions
from router.text_choice import Delta
from runtime.clock import Deadline

READ_GRACE_S = 10.0
"""How long after its deadline a request's answer may still be on its way to a slow client."""


class Endpoint(Protocol):
    """What distinguishes chat from completions."""

    @property
    def path(self) -> str: ...

    @property
    def request_type(self) -> type[Any]: ...

    async def prompts(self, model: TextModel, request: Any, limits: Limits) -> list[PromptText]: ...

    def top_logprobs(self, request: Any) -> int | None: ...

    def format(self, model: TextModel, request: Any, prompts: Sequence[PromptText], /) -> AnswerFormat: ...


class GenerationEndpoint:
    """An ASGI app of its own. Raises HeadraceError, before anything is sent, for whoever writes error responses."""

    def __init__(self, services: Services, endpoint: Endpoint) -> None:
        self._services = services
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        request_id = scope.get(REQUEST_ID_KEY) or new_trace_id()
        progress = Progress(services.metrics, services.clock, self._endpoint.path, request_id, services.model.name)
        try:
            if services.admission.draining:
                raise Draining("the router is shutting down and takes no new requests")
            body = await read_json(Request(scope, receive), services.config.max_body_bytes)
            request = decode_request(body, self._endpoint.request_type)
            answering = self._answer(request, request_id, progress, send)
            await run_until_disconnect(receive, answering, services.config.request_timeout_s + READ_GRACE_S)
        except (Cancelled, ClientDisconnect):
            progress.failed(Cancelled("the client has gone"))
        except HeadraceError as error:
            progress.failed(error)
            raise
        finally:
            progress.close()

    async def _answer(
        self, request: ChatRequest | CompletionRequest, request_id: str, progress: Progress, send: Send
    ) -> None:
        services, endpoint = self._services, self._endpoint
        check_model(services.model, request.model)
        limits = services.limits()
        top_logprobs = endpoint.top_logprobs(request)
        options = text_options(request, top_logprobs)
        prompts = await endpoint.prompts(services.model, request, limits)
        choices = make_choices(services.model, limits, request, prompts, top_logprobs)
        answer = endpoint.format(services.model, request, prompts)
        deadline = Deadline(services.config.request_timeout_s, services.clock)
        generation = progress.generation = Generation(
            services.cluster,
            services.model,
            services.admission,
            choices,
            options,
            cache_salt=request.cache_salt,
            trace_id=TraceId(request_id),
            arrived_at=progress.arrived_at,
            deadline=deadline,
            retries=services.config.retries,
            clock=services.clock,
            streamed=request.stream is True,
        )
        async with generation:
            if request.stream:
                await EventStream(send).write(generation, answer, _usage_options(request), progress)
            else:
                await _send_whole(generation, answer, progress, send)


async def _send_whole(generation: Generation, answer: AnswerFormat, progress: Progress, send: Send) -> None:
    gathered: dict[int, list[Delta]] = {}
    async for deltas in generation.deltas():
        for delta in deltas:
            gathered.setdefault(delta.index, []).append(delta)
            progress.sent(delta)
    usage = make_usage(generation.num_prompt_tokens, generation.num_output_tokens, generation.num_cached_tokens)
    whole = [_join(gathered[index]) for index in sorted(gathered)]
    response = json_response(answer.whole(whole, usage))
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body)})


def _join(deltas: Sequence[Delta]) -> Delta:
    """Linear in the length of the answer."""
    tokens = tuple(placed for delta in deltas for placed in delta.tokens)
    return Delta(deltas[0].index, "".join(delta.text for delta in deltas), tokens, deltas[-1].finish)


def _usage_options(request: ChatRequest | CompletionRequest) -> UsageOptions:
    options = request.stream_options
    at_end = options is not None and options.include_usage is True
    return UsageOptions(at_end=at_end, always=at_end and options is not None and options.continuous_usage_stats is True)
