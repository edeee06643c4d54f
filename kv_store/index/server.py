"""RedisServer: a connection to the server, standalone or cluster, as a function from commands to replies.

Opened on first use and again after a failure; `close` ends it. It never retries: whoever asks knows whether it is worth it. One
of these is used by one task at a time.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from kv_store.index.settings import IndexSettings

log = logging.getLogger(__name__)

Command = tuple[bytes | str | int, ...]
Reply = Any
"""bytes, int, None, a list of replies, or the RedisError that a single command was answered with. Untrusted."""

UNREACHABLE = (RedisError, OSError, TimeoutError, EOFError)
"""What `run` raises when the server does not answer, or not as servers do."""


class OddServer(RedisError):
    """What the server is, or says, is not what the driver or we can use."""


MAX_CAUSE_CHARS = 200
OLDEST_REDIS = 7
OLDEST_VALKEY = 8


class RedisServer:
    def __init__(self, settings: IndexSettings) -> None:
        self._settings = settings
        self._client: Redis | RedisCluster | None = None

    @property
    def clustered(self) -> bool:
        """Keys of different shards may be on different servers. As of the last time that it was opened."""
        return isinstance(self._client, RedisCluster)

    @property
    def is_open(self) -> bool:
        return self._client is not None

    async def run(self, commands: Sequence[Command], on_open: Callable[[], None] | None = None) -> list[Reply]:
        """One reply for each, in order and in one round trip; a command's own error is its reply. `on_open` is called once the
        connection is open, just before they are written. Raises one of UNREACHABLE when there is no answer within the reply
        timeout; the commands may have been carried out."""
        try:
            async with asyncio.timeout(2 * self._settings.reply_timeout_s):
                client = self._client or await self._open()
                pipeline = client.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                if on_open is not None:
                    on_open()
                return await pipeline.execute(raise_on_error=False)
        except BaseException as error:
            await self.close()
            if isinstance(error, Exception) and not isinstance(error, UNREACHABLE):
                raise OddServer(cause_of(error)) from error  # the driver has many errors of no common kind
            raise
        finally:
            _mind_cancellation()

    async def inspect(self) -> str | None:
        """Log, with the cure, whatever of the server's settings costs hits. Returns the server process's own id; None where
        there are several, or it does not say. Raises like `run`."""
        replies = await self.run([("INFO", "server"), ("INFO", "memory")])
        facts: dict[str, Any] = {}
        for reply in replies:
            if isinstance(reply, dict):
                facts |= reply
        policy = str(facts.get("maxmemory_policy", "noeviction"))
        if policy != "noeviction":
            log.warning(
                "the index server evicts keys (maxmemory-policy %s), which costs hits and makes drift; cure: "
                "CONFIG SET maxmemory-policy noeviction",
                policy,
            )
        version = str(facts.get("valkey_version") or facts.get("redis_version") or "")
        oldest = OLDEST_VALKEY if facts.get("valkey_version") else OLDEST_REDIS
        major = version.partition(".")[0]
        if major.isdigit() and int(major) < oldest:
            log.warning("the index server is version %s; it is tested with Redis 7 and Valkey 8 or later", version)
        return None if self.clustered else facts.get("run_id")

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            async with asyncio.timeout(self._settings.reply_timeout_s):
                await client.aclose()
        except Exception as error:  # noqa: BLE001 - whatever it is, the connection is given up
            log.debug("closing a connection to the index server: %s", cause_of(error))

    async def _open(self) -> Redis | RedisCluster:
        settings = self._settings
        options: dict[str, Any] = {
            "protocol": 2,  # one form of every reply
            "socket_timeout": settings.reply_timeout_s,
            "socket_connect_timeout": settings.reply_timeout_s,
        }
        if not settings.clustered:
            client = Redis.from_url(settings.driver_url, retry=Retry(NoBackoff(), 0), **options)
            self._client = client
            try:
                info = await client.info("cluster")
            except ResponseError:
                return client  # a user who may not ask: what matters shows at the first write
            if not info.get("cluster_enabled"):
                return client
            await client.aclose()
        self._client = RedisCluster.from_url(settings.driver_url, retry=Retry(NoBackoff(), 1), **options)
        return self._client


def cause_of(error: BaseException) -> str:
    """One short line. Some of it may be the server's own words."""
    text = " ".join(str(error).split())[:MAX_CAUSE_CHARS]
    text = "".join(char if char.isprintable() else "?" for char in text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _mind_cancellation() -> None:
    """redis-py writes under asyncio.wait_for, which on Python 3.11 loses a cancellation that comes as the write ends."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
