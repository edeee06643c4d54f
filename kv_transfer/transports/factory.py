"""start_transports: from the configuration to the transports that this process runs; make_transport makes one."""

import logging
from collections.abc import Mapping, Sequence

from kv_transfer.memory.device_arena import Arena, DeviceArena
from kv_transfer.transport import MayRead, Transport
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.nixl.transport import NixlTransport
from kv_transfer.transports.shm import ShmTransport
from kv_transfer.transports.tcp.transport import TcpTransport
from kv_transfer.transports.transport_set import TransportSet
from kv_transfer.transports.ucx.transport import UcxTransport
from protocol.errors import ConfigError
from protocol.ids import Incarnation, TicketId
from protocol.transfer import MAX_REASON_CHARS, Direction, MissingTransport, TransportKind
from runtime.node_config import TransferOptions

_DIRECTIONS: Mapping[TransportKind, tuple[Direction, ...]] = {
    transport.kind: transport.capabilities.directions
    for transport in (NixlTransport, UcxTransport, ShmTransport, TcpTransport, InprocTransport)
}

log = logging.getLogger(__name__)


def lend_nothing(_ticket_id: TicketId, _block_ids: Sequence[int]) -> bool:
    """The MayRead of a node that exports nothing."""
    return False


def start_transports(
    options: TransferOptions,
    arena: Arena,
    *,
    incarnation: Incarnation,
    host: str,
    advertise_host: str | None = None,
    may_read: MayRead = lend_nothing,
) -> TransportSet:
    """What the configuration names: one transport, or with "auto" all of `allowed` that can start here.

    Arguments as of make_transport. One after the other: NIXL and UCX read the process's environment while they start,
    and set some of it. Raises ConfigError when there is none, or none that moves bytes in the direction that is set.
    """
    wanted = _wanted(options)
    running: list[Transport] = []
    missing: list[MissingTransport] = []
    for kind in wanted:
        try:
            running.append(
                make_transport(
                    kind, arena, incarnation=incarnation, host=host, advertise_host=advertise_host, may_read=may_read
                )
            )
        except ConfigError as error:
            if len(wanted) == 1:
                raise
            log.info("the transport %s does not run here: %s", kind, error.message)
            missing.append(MissingTransport(kind, error.message[:MAX_REASON_CHARS]))
    if not running:
        reasons = "; ".join(f"{each.transport}: {each.reason}" for each in missing)
        raise ConfigError(f"no transport of transfer.allowed can start here: {reasons}", param="transfer.allowed")
    return TransportSet(arena, running, missing)


def _wanted(options: TransferOptions) -> list[TransportKind]:
    """Each once, without those that do not move bytes in the direction that is set."""
    listed = list(dict.fromkeys(options.allowed if options.transport == "auto" else (options.transport,)))
    wanted = [kind for kind in listed if options.direction in ("auto", *_DIRECTIONS[kind])]
    if not wanted:
        raise ConfigError(
            f'transfer.direction is "{options.direction}", which {", ".join(listed)} cannot do; set it to "auto", or '
            'transfer.transport to "nixl"',
            param="transfer.direction",
        )
    return wanted


def make_transport(
    kind: TransportKind,
    arena: Arena,
    *,
    incarnation: Incarnation,
    host: str,
    advertise_host: str | None = None,
    may_read: MayRead = lend_nothing,
) -> Transport:
    """One transport, ready to use; close it before the arena.

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
        case "ucx":
            return UcxTransport(arena, host, may_read)
        case "shm":
            return ShmTransport(arena)
        case "tcp":
            return TcpTransport(arena, host, advertise_host or host, may_read)
        case "inproc":
            return InprocTransport(arena, may_read)
