"""The owner's control routes: how readers meet this node and follow its hand-offs. See protocol.transfer for the talk.

GET  /kv/hello      who is here: the one message that every wire version can read
POST /kv/connect    Introduction -> Introduction
POST /kv/probe      ProbePush -> ProbeResult
POST /kv/presence   Hello -> frames: one Hello, and no end while this process lives and may write
POST /kv/handoff    OpenHandoff -> frames of HandoffMessage
POST /kv/renew      RenewLease -> LeasesHeld
POST /kv/landed     BlocksLanded -> LeaseState
POST /kv/release    ReleaseLease -> LeaseState
POST /kv/borrow     BorrowPrefix -> PrefixLent
"""

from collections.abc import AsyncIterator

from starlette.routing import Route

from kv_transfer.handoff.exports import ExportTable
from kv_transfer.lending.lender import NOTHING, Lend
from kv_transfer.meeting.pushers import Pushers
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import Incarnation, WorkerId
from protocol.kv_blocks import check_distinct
from protocol.kv_layout import KVLayout
from protocol.transfer import (
    BlocksLanded,
    BorrowPrefix,
    Introduction,
    LeasesHeld,
    LeaseState,
    OpenHandoff,
    PrefixLent,
    ProbePush,
    ProbeResult,
    ReleaseLease,
    RenewLease,
)
from protocol.wire import WIRE_VERSION, Hello
from runtime.rpc_server import get_route, message_route, stream_route

HELLO_PATH = "/kv/hello"
CONNECT_PATH = "/kv/connect"
PROBE_PATH = "/kv/probe"
PRESENCE_PATH = "/kv/presence"
HANDOFF_PATH = "/kv/handoff"
RENEW_PATH = "/kv/renew"
LANDED_PATH = "/kv/landed"
RELEASE_PATH = "/kv/release"
BORROW_PATH = "/kv/borrow"


def kv_routes(
    exports: ExportTable,
    transports: TransportSet,
    pushers: Pushers,
    layout: KVLayout,
    *,
    worker_id: WorkerId,
    incarnation: Incarnation,
    cluster_key: str | None,
    lend: Lend | None = None,
) -> list[Route]:
    """The routes of one owner. All are behind the cluster key. Without `lend` nothing is lent."""

    myself = Hello(WIRE_VERSION, worker_id, incarnation, layout.fingerprint)

    async def hello() -> Hello:
        return myself

    async def presence(_: Hello) -> AsyncIterator[bytes]:
        return exports.presence(myself)

    async def connect(message: Introduction) -> Introduction:
        layout.check_compatible(message.layout, message.worker)
        transports.check_common(message)
        pushers.introduce(message)
        return transports.introduce(worker_id, incarnation, layout)

    async def probe(message: ProbePush) -> ProbeResult:
        return await pushers.probe(message)

    async def handoff(message: OpenHandoff) -> AsyncIterator[bytes]:
        return exports.attach(message)

    async def renew(message: RenewLease) -> LeasesHeld:
        return exports.renew(message)

    async def landed(message: BlocksLanded) -> LeaseState:
        return exports.landed(message)

    async def release(message: ReleaseLease) -> LeaseState:
        return exports.release(message)

    async def borrow(message: BorrowPrefix) -> PrefixLent:
        check_distinct(message.block_hashes, "block_hashes")
        return NOTHING if lend is None else await lend(message)

    return [
        get_route(HELLO_PATH, hello, cluster_key),
        message_route(CONNECT_PATH, Introduction, connect, cluster_key),
        message_route(PROBE_PATH, ProbePush, probe, cluster_key),
        stream_route(PRESENCE_PATH, Hello, presence, cluster_key),
        stream_route(HANDOFF_PATH, OpenHandoff, handoff, cluster_key),
        message_route(RENEW_PATH, RenewLease, renew, cluster_key),
        message_route(LANDED_PATH, BlocksLanded, landed, cluster_key),
        message_route(RELEASE_PATH, ReleaseLease, release, cluster_key),
        message_route(BORROW_PATH, BorrowPrefix, borrow, cluster_key),
    ]
