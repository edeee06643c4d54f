"""/health, /ready and /metrics: what an orchestrator asks every process, whatever its role.

Liveness is "the work makes progress", readiness is "started, warm, not draining", and for a node that no
router's refusal makes it useless; neither depends on a peer's being there. The three routes need no key and show nothing
secret.
"""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from runtime.life import Phase, ProcessLife
from runtime.metrics import render

Check = Callable[[], str | None]
"""What is wrong, in a few words; None when nothing is."""


def health_routes(
    life: ProcessLife,
    liveness: Check,
    readiness: Check,
    registry: CollectorRegistry,
    refresh: Callable[[], None] | None = None,
) -> list[Route]:
    """GET and HEAD of three routes. /health: 503 when `liveness` names a reason. /ready: 503 before start-up is complete,
    while draining, or when `readiness` names a reason. /metrics: Prometheus text, after `refresh`."""

    async def health(_: Request) -> Response:
        reason = liveness()
        if reason is not None:
            return JSONResponse({"status": "stuck", "reason": reason}, status_code=503)
        return JSONResponse({"status": "alive", "phase": life.phase.name.lower()})

    async def ready(_: Request) -> Response:
        if life.phase is not Phase.READY:
            return JSONResponse({"status": life.phase.name.lower(), "reason": life.reason}, status_code=503)
        reason = readiness()
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def metrics(_: Request) -> Response:
        if refresh is not None:
            refresh()
        return Response(render(registry), media_type=CONTENT_TYPE_LATEST)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
