"""make_transport: from the configured kind to a transport that serves peers and reads from them."""

from collections.abc import Sequence

from kv_transfer.device_arena import Arena, DeviceArena
from kv_transfer.inproc_transport import InprocTransport
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.shm_transport import ShmTransport
from kv_transfer.tcp_transport import TcpTransport
from kv_transfer.transport import MayRead, Transport
from protocol.errors import ConfigError
from protocol.ids import Incarnation, TicketId
from protocol.transfer import TransportKind


def lend_nothing(_ticket_id: TicketId, _block_ids: Sequence[int]) -> bool:
    """The MayRead of a node that exports nothing."""
    return False


def make_transport(
    kind: TransportKind,
    arena: Arena,
    *,
    incarnation: Incarnation,
    host: str,
    advertise_host: str | None = None,
    may_read: MayRead = lend_nothing,
) -> Transport:
    """The process's one transport, ready to use; close it before the arena.

    `host` is what the node binds and `advertise_host` how peers reach it, where that differs (only tcp listens by
    itself). `may_read` is ExportTable.may_read on a node that exports. Takes up to half a second; call it before the
    event loop has work to do. Raises ConfigError, saying how to mend it, if the transport cannot work here.
    """
    if kind == "nixl":
        return NixlTransport(arena, incarnation, host)
    if isinstance(arena, DeviceArena):
        raise ConfigError(
            f'the transport "{kind}" does not reach the memory of a GPU; set transfer.device_memory to "staged", or'
            ' transfer.transport to "nixl"',
            param="transfer.device_memory",
        )
    match kind:
        case "shm":
            return ShmTransport(arena)
        case "tcp":
            return TcpTransport(arena, host, advertise_host or host, may_read)
        case "inproc":
            return InprocTransport(arena, may_read)
