"""IndexSettings: where the index is and how it is used. Made once, at start; frozen.

    unix:///run/valkey.sock              redis://[user:password@]host:port/db
    rediss://...?ssl_ca_certs=FILE       redis+cluster://..., rediss+cluster://... (a cluster is also recognised behind redis://)

rediss is TLS; `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and `ssl_check_hostname` stand in the query, as
redis-py names them, and `db` where the path is a socket's. The query has nothing else: the rest of the driver's options are ours.
"""

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from protocol.errors import ConfigError
from runtime.node_config import StoreOptions

SCHEMES = ("unix", "redis", "rediss", "redis+cluster", "rediss+cluster")
_SETTING = "store.redis"
_NUMBER = re.compile(r"[0-9]{1,5}")
_OPTIONS = {
    "db": _NUMBER,
    "ssl_ca_certs": re.compile(r".+"),
    "ssl_certfile": re.compile(r".+"),
    "ssl_keyfile": re.compile(r".+"),
    "ssl_cert_reqs": re.compile(r"none|optional|required"),
    "ssl_check_hostname": re.compile(r"true|false|yes|no|1|0", re.IGNORECASE),
}
_USER_INFO = re.compile(r"//.*@")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """`record_ttl_s`: after how long a silence an owner counts as dead; it speaks every `heartbeat_s`. `drift_check_s`: how
    often a sample of what is published is compared with what is held. `max_queued`: blocks whose news waits to be
    published; beyond that the news is dropped and made up for from a snapshot. `reply_timeout_s`: silence of the
    server, off the request path, after which a connection is given up. `cluster_key`: what owners are sealed with; it never goes
    to the server."""

    url: str = field(repr=False)
    cluster_key: str | None = field(default=None, repr=False)
    namespace: str = "headrace"
    budget_s: float = 0.002
    record_ttl_s: float = 5.0
    heartbeat_s: float = 1.0
    drift_check_s: float = 30.0
    reply_timeout_s: float = 1.0
    max_queued: int = 1 << 16

    def __post_init__(self) -> None:
        """Raises ConfigError, which never shows the password."""
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            why = "is not a URL; characters of a password other than letters and digits are written as %XX"
            raise ConfigError(f"{_SETTING}: {self.shown_url!r} {why}", param=_SETTING) from error
        if parts.scheme not in SCHEMES:
            raise ConfigError(
                f"{_SETTING}: {self.shown_url!r} must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}",
                param=_SETTING,
            )
        if parts.scheme == "unix" and not parts.path:
            raise ConfigError(f"{_SETTING}: write a socket as unix:///path/of/the.sock", param=_SETTING)
        if parts.scheme != "unix" and (not parts.hostname or port == 0):
            raise ConfigError(f"{_SETTING}: {self.shown_url!r} names no host", param=_SETTING)
        if parts.scheme != "unix" and parts.path not in ("", "/") and not _NUMBER.fullmatch(parts.path[1:]):
            raise ConfigError(f"{_SETTING}: after the host comes the number of a database, or nothing", param=_SETTING)
        self._check_query(parts.scheme, parts.query)

    def _check_query(self, scheme: str, query: str) -> None:
        """Whatever is wrong with it is not shown: it may be the end of a password."""
        options = parse_qsl(query, keep_blank_values=True)
        for name, value in options:
            known = _OPTIONS.get(name)
            if (
                known is None
                or (name == "db") != (scheme == "unix")
                or (name != "db" and not scheme.startswith("rediss"))
            ):
                raise ConfigError(
                    f"{_SETTING}: after the ? stand db with unix://, and {', '.join(list(_OPTIONS)[1:])} with rediss://; "
                    "nothing else",
                    param=_SETTING,
                )
            if not known.fullmatch(value):
                raise ConfigError(
                    f"{_SETTING}: {name} in the query must be of the form {known.pattern}", param=_SETTING
                )
        if len(dict(options)) != len(options):
            raise ConfigError(f"{_SETTING}: an option stands in the query twice", param=_SETTING)

    @classmethod
    def of(cls, options: StoreOptions, cluster_key: str | None) -> Self | None:
        """None where no index is wanted. Raises ConfigError."""
        if options.redis is None:
            return None
        return cls(
            url=options.redis,
            cluster_key=cluster_key,
            namespace=options.namespace,
            budget_s=options.redis_budget_s,
        )

    @property
    def shown_url(self) -> str:
        """For logs and status: without user, password and query."""
        return _USER_INFO.sub("//", self.url).partition("?")[0]

    @property
    def clustered(self) -> bool:
        return "+cluster" in self.url.partition("://")[0]

    @property
    def driver_url(self) -> str:
        """As redis-py wants it. Holds the password."""
        return self.url.replace("+cluster://", "://", 1)
