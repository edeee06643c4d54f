"""What a node tells of its links: GET /kv/links, as JSON for people and scripts."""

from collections.abc import Mapping
from dataclasses import asdict

from starlette.routing import Route

from kv_transfer.meeting.link_choice import Trial
from kv_transfer.meeting.meeting import PeerLink
from kv_transfer.meeting.peers import Peers
from kv_transfer.meeting.pushers import Pushers
from kv_transfer.transport import Transport
from kv_transfer.transports.transport_set import TransportSet
from protocol.ids import WorkerId
from protocol.links import LinkReport, LinksReport, ReaderReport, TransportReport, WayReport
from protocol.transfer import MAX_REASON_CHARS, Direction, MissingTransport
from runtime.clock import Clock
from runtime.rpc_server import json_route

LINKS_PATH = "/kv/links"


class LinkReporter:
    """Without `peers` it tells of no links, without `pushers` of no readers."""

    def __init__(
        self,
        worker: WorkerId,
        transports: TransportSet,
        clock: Clock,
        *,
        peers: Peers | None = None,
        pushers: Pushers | None = None,
    ) -> None:
        self._worker = worker
        self._transports = transports
        self._clock = clock
        self._peers = peers
        self._pushers = pushers

    def route(self, cluster_key: str | None) -> Route:
        async def links() -> LinksReport:
            return self.report()

        return json_route(LINKS_PATH, links, cluster_key)

    def report(self) -> LinksReport:
        moved = self._bytes_by_peer()
        links = self._peers.links() if self._peers is not None else []
        return LinksReport(
            worker=self._worker,
            transports=tuple(_transport(each) for each in self._transports),
            missing=self._transports.missing,
            links=tuple(self._link(link, moved) for link in links),
            readers=self._readers(moved),
        )

    def _link(self, link: PeerLink, moved: Mapping[tuple[str, Direction], int]) -> LinkReport:
        return LinkReport(
            peer=link.worker,
            incarnation=link.incarnation,
            control_url=link.control_url,
            transport=link.kind,
            direction=link.direction,
            why=link.choice.why,
            warning=link.choice.warning,
            ways=tuple(_way(trial) for trial in link.trials),
            unusable=tuple(MissingTransport(each.kind, each.problem[:MAX_REASON_CHARS]) for each in link.obstacles),
            bytes_moved=moved.get((link.worker, "pull"), 0),
            age_s=self._clock.now() - link.met_at,
        )

    def _readers(self, moved: Mapping[tuple[str, Direction], int]) -> tuple[ReaderReport, ...]:
        if self._pushers is None:
            return ()
        now = self._clock.now()
        return tuple(
            ReaderReport(
                peer=known.introduction.worker,
                incarnation=known.introduction.incarnation,
                pushed_by=tuple(known.links),
                bytes_pushed=moved.get((known.introduction.worker, "push"), 0),
                silent_s=now - known.heard_at,
            )
            for known in self._pushers.known
        )

    def _bytes_by_peer(self) -> dict[tuple[str, Direction], int]:
        sums: dict[tuple[str, Direction], int] = {}
        for transport in self._transports:
            for key, moved in transport.stats().by_peer.items():
                sums[key] = sums.get(key, 0) + moved.num_bytes
        return sums


def _transport(transport: Transport) -> TransportReport:
    return TransportReport(transport=transport.kind, **asdict(transport.capabilities))


def _way(trial: Trial) -> WayReport:
    measured = trial.measured
    return WayReport(
        transport=trial.kind,
        direction=trial.direction,
        latency_s=measured.latency_s if measured is not None else None,
        bytes_per_s=measured.bytes_per_s if measured is not None else None,
        problem=trial.problem,
    )
