"""The helper process of the ucx transport: the one that has UCX in it. `python -m kv_transfer.transports.ucx.process SETTINGS`.

It stands between its node and other nodes' helpers, and maps the node's arena. Why a process of its own: a damaged
address aborts the process that reads it, peers that die at the wrong moment have crashed UCX, nothing but the end of its
process stops a receive that has begun, and NIXL brings another copy of UCX into the node. A helper's death costs the
transfers in flight and half a second.

One thread does everything. A second one only waits for standard input to close, which is the node's death, and ends the
process.
"""

import mmap
import os
import secrets
import socket
import sys
import threading

import msgspec
import numpy as np

from kv_transfer.transports.ucx.library import load_ucx
from kv_transfer.transports.ucx.owner import UcxOwner
from kv_transfer.transports.ucx.reader import UcxReader
from kv_transfer.transports.ucx.wire import (
    KEY_BYTES,
    MAX_MESSAGE_BYTES,
    Command,
    Connect,
    Disconnect,
    Event,
    HelperSettings,
    Permission,
    Read,
    Started,
    StartFailed,
    UcxPayload,
)
from kv_transfer.transports.ucx.worker import Bytes, UcxWorker
from protocol.errors import ConfigError
from protocol.wire import decode, encode


class UcxProcess:
    """Takes the node's commands and lets UCX work, in turn, until the node closes the control socket."""

    def __init__(self, control: socket.socket, worker: UcxWorker) -> None:
        self._control = control
        self._worker = worker
        key = secrets.token_bytes(KEY_BYTES)
        self._reader = UcxReader(worker, self._tell)
        self._owner = UcxOwner(worker, key, self._tell)
        self._tell(Started(UcxPayload(worker.address, key)))

    def run(self) -> None:
        while True:
            try:
                busy = self._take_command()
            except EOFError:
                return
            busy |= self._worker.step()
            busy |= self._owner.step()
            if not busy:
                self._worker.sleep(self._control.fileno())

    def _take_command(self) -> bool:
        """True if there was one. Raises EOFError when the node has closed its end."""
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not message:
            raise EOFError
        command: Command = decode(message, Command)
        match command:
            case Read():
                self._reader.read(command)
            case Permission(question_id, granted):
                self._owner.permit(question_id, granted)
            case Connect(peer_id, payload):
                self._reader.connect(peer_id, payload)
            case Disconnect(peer_id):
                self._reader.disconnect(peer_id)
        return True

    def _tell(self, event: Event) -> None:
        self._control.sendall(encode(event))


def main(settings_json: str) -> None:
    settings = msgspec.json.decode(settings_json, type=HelperSettings)
    threading.Thread(target=_end_with_node, name="ucx-lifeline", daemon=True).start()
    with socket.socket(fileno=settings.control_fd) as control:
        try:
            api = load_ucx()
            worker = UcxWorker(api, settings, _map_arena(settings))
        except ConfigError as error:
            control.sendall(encode(StartFailed(error.message)))
            return
        except api.Error as error:
            control.sendall(encode(StartFailed(f"UCX cannot start: {error}; check UCX_TLS and UCX_NET_DEVICES")))
            return
        UcxProcess(control, worker).run()


def _map_arena(settings: HelperSettings) -> Bytes:
    size = settings.num_blocks * settings.block_bytes
    mapping = mmap.mmap(settings.arena_fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=settings.arena_offset)
    return np.frombuffer(mapping, np.uint8)


def _end_with_node() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)  # not by an exception: the other thread may be inside UCX


if __name__ == "__main__":
    main(sys.argv[1])
