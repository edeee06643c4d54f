"""Sizes of tiers: bytes, shares, "auto" and "0", and errors that say what is wrong and what to do."""

from pathlib import Path

import pytest

from kv_store.sizing import disk_bytes, disk_folder, host_slots, parse_amount, parse_quotas
from protocol.errors import ConfigError
from protocol.kv_blocks import Tenant

GIB = 1 << 30
BLOCK = 1 << 20


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("0", 0), ("25%", GIB), ("12.5 %", GIB // 2), ("100%", 4 * GIB), ("3GiB", 3 * GIB), ("0%", 0)],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_amount(text, 4 * GIB, "store.host_memory") == num_bytes


@pytest.mark.parametrize("text", ["101%", "-5%", "%", "lots", "", "5 parsecs"])
def test_what_is_no_amount_names_its_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.host_memory") as caught:
        parse_amount(text, GIB, "store.host_memory")
    assert caught.value.param == "store.host_memory"


def test_host_tiers() -> None:
    assert host_slots("0", BLOCK, available=GIB) == 0
    assert host_slots("auto", BLOCK, available=GIB) == 256
    assert host_slots("auto", BLOCK, cache_bytes=64 * BLOCK, available=GIB) == 64
    assert host_slots("auto", BLOCK, cache_bytes=GIB, available=GIB) == 128
    assert host_slots("50%", BLOCK, available=GIB) == 512
    with pytest.raises(ConfigError, match=r"2048 MiB.*1024 MiB of memory are available.*smaller"):
        host_slots("2GiB", BLOCK, available=GIB)
    with pytest.raises(ConfigError, match="holds no KV block of 1048576 bytes"):
        host_slots("100KiB", BLOCK, available=GIB)


def test_disk_tiers_in_folders_that_are_yet_to_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    assert disk_bytes("0", folder, BLOCK) == 0
    assert disk_bytes("4MiB", folder, BLOCK) == 4 << 20
    with pytest.raises(ConfigError, match=r"store\.disk_size: 1e30 was asked for .* are free on the disk of"):
        disk_bytes("1e30", folder, BLOCK)
    assert disk_bytes("1e30", folder, BLOCK, used_bytes=2 * 10**30) == int(1e30)


@pytest.mark.parametrize("text", ["~nobody-has-this-name/kv", "", "a\0b"])
def test_paths_that_are_none_name_their_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.disk_path") as caught:
        disk_folder(text)
    assert caught.value.param == "store.disk_path"


def test_a_name_that_is_too_long_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.disk_path.*File name too long.*another") as caught:
        disk_bytes("4MiB", disk_folder(str(tmp_path / ("a" * 300))), BLOCK)
    assert caught.value.param == "store.disk_path"


def test_quotas() -> None:
    quotas = parse_quotas(0.5, ["3f9c2ab01d44=3MiB"], BLOCK)
    assert quotas.limit(Tenant("3f9c2ab01d44"), 100) == 3
    assert quotas.limit(Tenant("0b17c2ab01d4"), 100) == 50
    assert quotas.limit(Tenant("none"), 100) == 100, "all without a salt have no tenant in common"
    assert quotas.limit(Tenant("3f9c2ab01d44"), 2) == 2


@pytest.mark.parametrize("text", ["3MiB", "=3MiB", "Big Corp=3MiB", "abc=many", "abc=1KiB", "abc=0", "abc=0GiB"])
def test_what_is_no_quota(text: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.quotas"):
        parse_quotas(1.0, [text], BLOCK)
