"""The owner's control routes: how readers meet this node and follow its hand-offs. See protocol.transfer for the talk.

GET  /kv/hello      who is here: the one message that every wire version can read
POST /kv/connect    Introduction -> Introduction
POST /kv/handoff    OpenHandoff -> frames of HandoffMessage
POST /kv/renew      RenewLease -> LeaseState
POST /kv/landed     BlocksLanded -> LeaseState
POST /kv/release    ReleaseLease -> LeaseState
POST /kv/borrow     BorrowPrefix -> PrefixLent
"""

from collections.abc import AsyncIterator

from starlette.routing import Route

from kv_transfer.device_arena import Arena
from kv_transfer.exports import ExportTable
from kv_transfer.lending import NOTHING, Lender
from kv_transfer.transport import Transport, find_endpoint, introduce
from protocol.ids import Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import (
    BlocksLanded,
    BorrowPrefix,
    Introduction,
    LeaseState,
    OpenHandoff,
    PrefixLent,
    ReleaseLease,
    RenewLease,
)
from protocol.wire import WIRE_VERSION, Hello
from runtime.rpc_server import get_route, message_route, stream_route

HELLO_PATH = "/kv/hello"
CONNECT_PATH = "/kv/connect"
HANDOFF_PATH = "/kv/handoff"
RENEW_PATH = "/kv/renew"
LANDED_PATH = "/kv/landed"
RELEASE_PATH = "/kv/release"
BORROW_PATH = "/kv/borrow"


def kv_routes(
    exports: ExportTable,
    transport: Transport,
    arena: Arena,
    layout: KVLayout,
    *,
    worker_id: WorkerId,
    incarnation: Incarnation,
    cluster_key: str | None,
    lender: Lender | None = None,
) -> list[Route]:
    """The routes of one owner. All are behind the cluster key. Without `lender` nothing is lent."""

    async def hello() -> Hello:
        return Hello(WIRE_VERSION, worker_id, incarnation, layout.fingerprint)

    async def connect(message: Introduction) -> Introduction:
        layout.check_compatible(message.layout, message.worker)
        find_endpoint(message, transport.kind)
        return introduce(worker_id, incarnation, layout, arena, [transport])

    async def handoff(message: OpenHandoff) -> AsyncIterator[bytes]:
        return exports.attach(message)

    async def renew(message: RenewLease) -> LeaseState:
        return exports.renew(message)

    async def landed(message: BlocksLanded) -> LeaseState:
        return exports.landed(message)

    async def release(message: ReleaseLease) -> LeaseState:
        return exports.release(message)

    async def borrow(message: BorrowPrefix) -> PrefixLent:
        return NOTHING if lender is None else await lender.lend(message)

    return [
        get_route(HELLO_PATH, hello, cluster_key),
        message_route(CONNECT_PATH, Introduction, connect, cluster_key),
        stream_route(HANDOFF_PATH, OpenHandoff, handoff, cluster_key),
        message_route(RENEW_PATH, RenewLease, renew, cluster_key),
        message_route(LANDED_PATH, BlocksLanded, landed, cluster_key),
        message_route(RELEASE_PATH, ReleaseLease, release, cluster_key),
        message_route(BORROW_PATH, BorrowPrefix, borrow, cluster_key),
    ]
