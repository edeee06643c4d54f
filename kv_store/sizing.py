"""How large tiers are: what was asked for, of what there is. Raises ConfigError that names the setting, both, and the cure."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kv_store.quotas import Quotas
from protocol.errors import ConfigError
from protocol.kv_blocks import Tenant
from runtime.config import parse_size
from runtime.memory import available_memory_bytes

HOST_SETTING = "store.host_memory"
DISK_SETTING = "store.disk_size"
PATH_SETTING = "store.disk_path"
QUOTA_SETTING = "store.quotas"

AUTO_SHARE = 1 / 4
"""Of the available memory, on a GPU node or a store: its KV cache is elsewhere, or it has none."""

AUTO_CPU_SHARE = 1 / 8
"""On a CPU node, whose KV cache and weights are in the same memory."""

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TENANT = re.compile(r"[0-9a-z]{1,16}")


def parse_amount(text: str, total_bytes: int, setting: str) -> int:
    """Bytes of "4GiB", of "25%" of a total, or of "0"."""
    share = _SHARE.fullmatch(text.strip())
    if share is None:
        return 0 if text.strip() == "0" else parse_size(text, setting)
    if float(share[1]) > 100:
        raise ConfigError(f"{setting}: {text} is more than all there is; write at most 100%", param=setting)
    return int(total_bytes * float(share[1]) / 100)


def host_slots(text: str, block_bytes: int, *, cache_bytes: int | None = None, available: int | None = None) -> int:
    """Slots of a host tier of that size; 0 for none. "auto" is a quarter of the available memory; with a KV cache of `cache_bytes`
    in the same memory as much as that, an eighth of the available memory at most. `available`: bytes, None to ask the
    machine and its control group."""
    available = available_memory_bytes() if available is None else available
    if text.strip() == "auto":
        wanted = _auto_bytes(cache_bytes, available)
        return wanted // block_bytes
    wanted = parse_amount(text, available, HOST_SETTING)
    if wanted > available:
        raise ConfigError(
            f"{HOST_SETTING}: {text} was asked for ({wanted >> 20} MiB) and {available >> 20} MiB of memory are available; "
            "make it smaller",
            param=HOST_SETTING,
        )
    return _blocks(wanted, block_bytes, text, HOST_SETTING)


def disk_folder(text: str) -> Path:
    """The folder of that name, which may not exist yet; "~" is somebody's home."""
    try:
        if text and "\0" not in text:
            return Path(text).expanduser()
        problem = "is no folder's name"
    except RuntimeError:
        problem = "begins with the home of a user who has none here"
    raise ConfigError(f"{PATH_SETTING}: {text!r} {problem}; write the whole path of a folder", param=PATH_SETTING)


def disk_bytes(text: str, path: Path, block_bytes: int, *, used_bytes: int = 0) -> int:
    """Bytes for a disk tier in a folder that may not exist yet; 0 for none. A share is one of the whole filesystem. `used_bytes`:
    what the tier has on it from an earlier life, and may keep."""
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        usage = shutil.disk_usage(there)
    except OSError as error:
        raise ConfigError(
            f"{PATH_SETTING}: cannot look at {path}: {error.strerror}; choose another folder", param=PATH_SETTING
        ) from error
    wanted = parse_amount(text, usage.total, DISK_SETTING)
    free = usage.free + used_bytes
    if wanted > free:
        raise ConfigError(
            f"{DISK_SETTING}: {text} was asked for ({wanted >> 20} MiB) and {free >> 20} MiB are free on the disk of {path}; "
            "make it smaller, or store.disk_path another disk's",
            param=DISK_SETTING,
        )
    _blocks(wanted, block_bytes, text, DISK_SETTING)
    return wanted


def parse_quotas(share: float, quotas: Sequence[str], block_bytes: int) -> Quotas:
    """Of StoreOptions.tenant_share and StoreOptions.quotas, each of those "tenant=size". A quota is one KV block at least: what is
    loaded for a tenant passes through the tier, so that none at all would be a promise that nobody keeps."""
    blocks_by_tenant: dict[Tenant, int] = {}
    for text in quotas:
        tenant, separator, size = text.partition("=")
        if not separator or not _TENANT.fullmatch(tenant):
            raise ConfigError(
                f'{QUOTA_SETTING}: {text!r} is no quota; write it like "3f9c2ab01d44=2GiB", with a tenant\'s name as '
                "`headrace cache stats` shows it",
                param=QUOTA_SETTING,
            )
        num_blocks = parse_size(size, QUOTA_SETTING) // block_bytes
        if not num_blocks:
            raise ConfigError(
                f"{QUOTA_SETTING}: {text} is less than one KV block; give the tenant {block_bytes} bytes or more, or leave "
                "it out for store.tenant_share",
                param=QUOTA_SETTING,
            )
        blocks_by_tenant[Tenant(tenant)] = num_blocks
    return Quotas(share, blocks_by_tenant)


def _auto_bytes(cache_bytes: int | None, available: int) -> int:
    if cache_bytes is None:
        return int(available * AUTO_SHARE)
    return min(cache_bytes, int(available * AUTO_CPU_SHARE))


def _blocks(num_bytes: int, block_bytes: int, text: str, setting: str) -> int:
    if 0 < num_bytes < block_bytes:
        raise ConfigError(
            f"{setting}: {text} holds no KV block of {block_bytes} bytes; make it larger, or 0 for none", param=setting
        )
    return num_bytes // block_bytes
