"""Meeting: one reader meets one owner. Connects what both run, measures each way, keeps the best: a PeerLink.

    introduced -> for each transport of both: connect -> probe pull, probe push -> choose -> close the others

A meeting fails only if no transport connects at all. A probe that fails or hangs costs its transport the race, and what
could not be used is said with its cure.
"""

import logging
from dataclasses import dataclass

from kv_transfer.meeting.link_choice import Choice, Obstacle, Trial, choose
from kv_transfer.meeting.link_probe import probe_pull, probe_push
from kv_transfer.meeting.local_limits import transport_limits
from kv_transfer.routes import PROBE_PATH
from kv_transfer.transport import Link, OutOfReach, Transport, close_link, find_endpoint, nothing_in_common
from kv_transfer.transports.transport_set import TransportSet
from protocol.errors import HeadraceError, PeerLost, TransferError
from protocol.ids import Incarnation, WorkerId
from protocol.transfer import Direction, Introduction, ProbePush, ProbeResult, TransportKind
from runtime.node_config import TransferOptions
from runtime.rpc_client import RpcClient

REFERENCE_TOKENS = 128
"""What one transfer typically moves: the KV of a prefill chunk of this size."""

MAX_PROBE_TIMEOUT_S = 1.0
PROBES_PER_STALL = 4
ANSWER_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerLink:
    """How KV comes from one owner, in this life of it. `link` is ours to read with; None: the owner pushes."""

    worker: WorkerId
    incarnation: Incarnation
    control_url: str
    link: Link | None
    choice: Choice
    trials: tuple[Trial, ...]
    obstacles: tuple[Obstacle, ...]
    met_at: float
    """An instant of the clock of whoever met."""

    @property
    def kind(self) -> TransportKind:
        return self.choice.taken.kind

    @property
    def direction(self) -> Direction:
        return self.choice.taken.direction

    @property
    def measured(self) -> ProbeResult | None:
        return self.choice.taken.measured

    def estimate_seconds(self, num_bytes: int) -> float:
        """How long that many bytes take, when nothing else is on the link; infinity where that could not be measured."""
        return self.choice.taken.seconds(num_bytes)


class Meeting:
    """`ours` is what the owner has heard of us, `owner` what it said of itself and has been checked
    (check_introduction). `prefers_pull`: the reader's wire blocks are scarce, and a push takes some for the whole context at
    once, which a read does not: nobody is asked to push here unless the direction is set. Used once."""

    def __init__(
        self,
        transports: TransportSet,
        client: RpcClient,
        options: TransferOptions,
        ours: Introduction,
        owner: Introduction,
        control_url: str,
        *,
        prefers_pull: bool = False,
    ) -> None:
        self._transports = transports
        self._client = client
        self._options = options
        self._ours = ours
        self._owner = owner
        self._control_url = control_url
        self._prefers_pull = prefers_pull
        self._timeout_s = min(MAX_PROBE_TIMEOUT_S, options.stall_timeout_s / PROBES_PER_STALL)
        self._links: dict[TransportKind, Link] = {}
        self._trials: list[Trial] = []
        self._obstacles: list[Obstacle] = []
        self._out_of_reach: set[TransportKind] = set()
        self._errors: list[TransferError] = []

    async def hold(self, now: float) -> PeerLink:
        """Raises TransferError if no transport joins the two."""
        for kind in self._listed_by_both():
            transport = self._transports.get(kind)
            if transport is not None:
                await self._try(transport)
        if not self._trials:
            raise self._failure()
        choice = self._choose()
        pulls = choice.taken.direction == "pull"
        kept = self._links.pop(choice.taken.kind) if pulls else None
        for link in self._links.values():
            await close_link(link)
        return PeerLink(
            worker=WorkerId(self._owner.worker),
            incarnation=Incarnation(self._owner.incarnation),
            control_url=self._control_url,
            link=kept,
            choice=choice,
            trials=tuple(self._trials),
            obstacles=tuple(self._obstacles),
            met_at=now,
        )

    def _listed_by_both(self) -> list[TransportKind]:
        """In our order of preference. What cannot run at one end is an obstacle."""
        owner = self._owner
        absent = {each.transport: each.reason for each in owner.missing}
        here = {each.transport: each.reason for each in self._transports.missing}
        offered = {endpoint.transport for endpoint in owner.endpoints}
        common = []
        for kind in self._transports.listed:
            if kind not in offered and kind not in absent:
                continue
            if kind in here:
                self._obstacles.append(Obstacle(kind, f"it cannot run here: {here[kind]}"))
            elif kind in absent:
                self._obstacles.append(Obstacle(kind, f"it cannot run on {owner.worker}: {absent[kind]}"))
            else:
                common.append(kind)
        return common

    async def _try(self, transport: Transport) -> None:
        kind, can = transport.kind, transport.capabilities
        wanted = self._wanted(can.directions)
        try:
            endpoint = find_endpoint(self._owner, kind)
            if "pull" in wanted:
                self._links[kind] = await transport.connect(self._owner, endpoint)
        except TransferError as error:
            self._errors.append(error)
            self._obstacles.append(Obstacle(kind, error.message))
            if isinstance(error, OutOfReach):
                self._out_of_reach.add(kind)
            return
        for direction in wanted:
            self._trials.append(await self._measure(transport, direction))

    def _wanted(self, possible: tuple[Direction, ...]) -> list[Direction]:
        if self._options.direction != "auto":
            return [each for each in possible if each == self._options.direction]
        if self._prefers_pull and "pull" in possible:
            return ["pull"]
        return list(possible)

    async def _measure(self, transport: Transport, direction: Direction) -> Trial:
        kind, device = transport.kind, transport.capabilities.device_memory
        try:
            measured = await self._probe(kind, direction)
        except HeadraceError as error:
            log.info("%s: measuring %s %s failed: %s", self._owner.worker, kind, direction, error.message)
            return Trial(kind, direction, None, error.message, device)
        return Trial(kind, direction, measured, device_memory=device)

    async def _probe(self, kind: TransportKind, direction: Direction) -> ProbeResult:
        scratch = self._transports.scratch
        if direction == "pull":
            return await probe_pull(self._links[kind], self._owner, scratch, self._timeout_s)

        async def ask(block_ids: tuple[int, ...]) -> ProbeResult:
            message = ProbePush(
                reader=self._ours.worker,
                incarnation=self._ours.incarnation,
                transport=kind,
                block_ids=block_ids,
            )
            url = self._control_url + PROBE_PATH
            return await self._client.call(url, message, ProbeResult, ANSWER_TIMEOUT_S)

        return await probe_push(ask, self._owner, scratch)

    def _choose(self) -> Choice:
        arena = self._transports.arena
        layout = self._ours.layout
        options = self._options
        settings = [
            f"{name} is set"
            for name, value in (("transport", options.transport), ("direction", options.direction))
            if value != "auto"
        ]
        limits = transport_limits(arena) if self._unmeasured_kinds() else {}
        return choose(
            self._trials,
            self._obstacles,
            order=self._transports.kinds,
            reference_bytes=layout.num_blocks_for(REFERENCE_TOKENS) * layout.block_bytes,
            limits={kind: rate for kind, rate in limits.items() if kind not in self._out_of_reach},
            on_device=arena.memory_kind == "cuda",
            given=", ".join(settings),
        )

    def _unmeasured_kinds(self) -> bool:
        return bool(self._obstacles) or any(trial.measured is None for trial in self._trials)

    def _failure(self) -> TransferError:
        """Why no transport joins the two: the error of the only one, or all reasons together."""
        if len(self._errors) == 1:
            return self._errors[0]
        if not self._obstacles:
            return nothing_in_common(self._owner, self._transports.kinds)
        reasons = "; ".join(f"{obstacle.kind}: {obstacle.problem}" for obstacle in self._obstacles)
        kind = PeerLost if any(isinstance(error, PeerLost) for error in self._errors) else TransferError
        return kind(f"no transport reaches {self._owner.worker}: {reasons}")
