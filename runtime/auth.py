"""The cluster key: what routers and nodes show each other. Without one, only loopback is served.

The key travels as `Authorization: Bearer <key>` and is compared in constant time.
"""

import hmac
import ipaddress

from protocol.errors import ConfigError, Unauthorized

MIN_KEY_CHARS = 16


def authorization_header(cluster_key: str | None) -> dict[str, str]:
    return {} if cluster_key is None else {"authorization": f"Bearer {cluster_key}"}


def check_authorization(cluster_key: str | None, header: str | None) -> None:
    """Raise Unauthorized unless `header` carries the key (or none is configured)."""
    if cluster_key is None:
        return
    if header is None or not hmac.compare_digest(header.encode(), f"Bearer {cluster_key}".encode()):
        raise Unauthorized("the cluster key is missing or wrong; set the same cluster_key on routers and nodes")


def check_bind(host: str, cluster_key: str | None) -> None:
    """Raise ConfigError for a control plane that would be open to the network without a key."""
    if cluster_key is not None and len(cluster_key) < MIN_KEY_CHARS:
        raise ConfigError(f"cluster_key must have at least {MIN_KEY_CHARS} characters", param="cluster_key")
    if cluster_key is None and not is_loopback(host):
        raise ConfigError(
            f"host {host!r} is reachable from the network, so a cluster key is needed: set cluster_key "
            "(or HEADRACE_CLUSTER_KEY) to the same secret on every router and node, or bind to 127.0.0.1",
            param="cluster_key",
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
