"""The internal app: where nodes register, say how they are, and leave, and where operators ask. Behind the cluster key; never on
the public port."""

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from protocol.errors import HeadraceError
from protocol.workers import Heartbeat, HeartbeatReply, Leave, Registered, WorkerInfo
from router.cache_admin import CacheAdmin
from router.cluster import Cluster
from router.http_edge import error_response, json_response
from runtime.auth import check_authorization
from runtime.rpc_server import message_route


def build_control_app(cluster: Cluster, cache: CacheAdmin, cluster_key: str | None) -> Starlette:
    async def register(message: WorkerInfo) -> Registered:
        return await cluster.register(message)

    async def heartbeat(message: Heartbeat) -> HeartbeatReply:
        return cluster.heartbeat(message)

    async def leave(message: Leave) -> None:
        cluster.leave(message)

    async def workers(request: Request) -> Response:
        """For people and scripts: JSON."""
        try:
            check_authorization(cluster_key, request.headers.get("authorization"))
        except HeadraceError as error:
            return error_response(error)
        return json_response({"workers": describe_workers(cluster)})

    return Starlette(
        routes=[
            message_route("/internal/v1/workers/register", WorkerInfo, register, cluster_key),
            message_route("/internal/v1/workers/heartbeat", Heartbeat, heartbeat, cluster_key),
            message_route("/internal/v1/workers/leave", Leave, leave, cluster_key),
            Route("/internal/v1/workers", workers, methods=["GET"]),
            *cache.routes(cluster_key),
        ]
    )


def describe_workers(cluster: Cluster) -> list[dict[str, object]]:
    described: list[dict[str, object]] = []
    for worker in cluster.workers:
        info = worker.info
        described.append(
            {
                "worker_id": info.worker_id,
                "incarnation": info.incarnation,
                "role": info.role,
                "control_url": info.control_url,
                "ready": cluster.is_ready(worker),
                "leaving": worker.leaving,
                "transports": info.transports,
                "num_blocks": info.num_blocks,
                "max_model_len": info.max_model_len,
                "layout_fingerprint": info.layout.fingerprint,
                "load": msgspec.to_builtins(worker.load),
                "sequences_in_flight": cluster.in_flight.sequences(worker.incarnation),
                "prefill_tokens_in_flight": cluster.in_flight.prefill_tokens(worker.incarnation),
            }
        )
    return described
