"""The public app: OpenAI's routes, and what an orchestrator asks. Built from parts; needs no socket to be tested."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from protocol.errors import HeadraceError, ModelNotFound
from protocol.wire import WIRE_VERSION
from router.api_errors import quote
from router.api_responses import Model, ModelList
from router.generation_endpoint import GenerationEndpoint
from router.http_edge import Edge, json_response, on_bug, on_headrace_error, on_http_exception
from router.openai_chat import ChatEndpoint
from router.openai_completions import CompletionEndpoint
from router.services import Services
from runtime.health import health_routes


def build_app(services: Services) -> ASGIApp:
    """The two generation routes are plain ASGI apps, because a framework's response objects cost as much as the tokens."""
    app = FastAPI(
        title="Headrace",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            HeadraceError: on_headrace_error,
            HTTPException: on_http_exception,
            Exception: on_bug,
        },
    )
    for endpoint in (ChatEndpoint(), CompletionEndpoint()):
        app.router.routes.append(
            Route(endpoint.path, GenerationEndpoint(services, endpoint), methods=["POST"], name=endpoint.path)
        )

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response(ModelList([_model(services)]))

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        if model_id != services.model.name:
            raise ModelNotFound(f"model {quote(model_id)!r} does not exist", param="model")
        return json_response(_model(services))

    @app.get("/version")
    async def get_version() -> Response:
        return json_response({"version": _version(), "wire_version": WIRE_VERSION})

    app.router.routes.extend(health_routes(services.life, lambda: None, lambda: _missing(services), services.registry))
    return Edge(app, services.config.api_key)


def _model(services: Services) -> Model:
    return Model(id=services.model.name, created=services.started_at, max_model_len=services.limits().max_model_len)


def _missing(services: Services) -> str | None:
    missing = services.cluster.missing()
    return f"no {' and no '.join(missing)} is ready" if missing else None


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"
