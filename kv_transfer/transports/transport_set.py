"""TransportSet: the transports that this process runs, over one arena; and those that it was told to run and cannot.

Made at start by factory.start_transports, closed before the arena. Which of them moves the bytes of a pair of nodes is
decided when the two meet (kv_transfer.meeting.meeting).
"""

from collections.abc import Iterator, Sequence

from kv_transfer.meeting.scratch import Scratch
from kv_transfer.memory.device_arena import Arena
from kv_transfer.transport import Transport, find_endpoint, introduce, nothing_in_common
from protocol.ids import Incarnation, WorkerId
from protocol.kv_layout import KVLayout
from protocol.transfer import Introduction, MissingTransport, TransportKind


class TransportSet:
    """`running` in order of preference: the first wins where two are about as fast. At least one."""

    def __init__(self, arena: Arena, running: Sequence[Transport], missing: Sequence[MissingTransport] = ()) -> None:
        assert running, "a process that moves KV needs a transport"
        self.arena = arena
        self.scratch = Scratch(arena)
        self.missing = tuple(missing)
        self._running = {transport.kind: transport for transport in running}

    def __iter__(self) -> Iterator[Transport]:
        return iter(self._running.values())

    @property
    def kinds(self) -> tuple[TransportKind, ...]:
        return tuple(self._running)

    @property
    def listed(self) -> tuple[TransportKind, ...]:
        """What this process was told to run, whether or not it can."""
        return (*self._running, *(each.transport for each in self.missing))

    def get(self, kind: TransportKind) -> Transport | None:
        return self._running.get(kind)

    def introduce(self, worker: WorkerId, incarnation: Incarnation, layout: KVLayout) -> Introduction:
        """What this process says of itself when it meets a peer."""
        return introduce(
            worker, incarnation, layout, self.arena, self, missing=self.missing, scratch_seed=self.scratch.seed
        )

    def check_common(self, peer: Introduction) -> None:
        """Raise TransferError unless some transport runs at both ends, and all that do have arrived whole."""
        common = [endpoint.transport for endpoint in peer.endpoints if endpoint.transport in self._running]
        if not common:
            raise nothing_in_common(peer, self.kinds)
        for kind in common:
            find_endpoint(peer, kind)

    async def close(self) -> None:
        """Stop serving peers and end all links. Idempotent. The arena must outlive this."""
        for transport in self:
            await transport.close()
