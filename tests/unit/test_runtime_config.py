"""Settings from file, environment and flags; what cannot be meant is refused with the key's name."""

from pathlib import Path

import pytest

from protocol.errors import ConfigError
from router.config import RouterConfig
from runtime.config import format_config, load_config, parse_size
from runtime.node_config import NodeConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    assert load_config(NodeConfig, None, {}, {}) == NodeConfig()


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'cluster_key = "from-the-file"\nport = 1\n[cache]\nblock_size = 32\nmemory = "2GiB"\n')
    environment = {"HEADRACE_CLUSTER_KEY": "from-the-environment"}
    config = load_config(NodeConfig, path, {"port": "2", "cache.block_size": 64}, environment)
    assert (config.port, config.cache.block_size, config.cache.memory) == (2, 64, "2GiB")
    assert config.cluster_key == "from-the-environment"
    flags = {"cluster_key": "from-the-flags"}
    assert load_config(NodeConfig, path, flags, environment).cluster_key == "from-the-flags"


def test_environment_names_only_what_the_role_has() -> None:
    environment = {"HEADRACE_API_KEY": "k", "HEADRACE_CLUSTER_KEY": ""}
    assert load_config(NodeConfig, None, {}, environment) == NodeConfig()
    assert load_config(RouterConfig, None, {}, environment).api_key == "k"


@pytest.mark.parametrize("text", ['["http://a:1", "http://b:2"]', "http://a:1, http://b:2"])
def test_lists_in_flags(text: str) -> None:
    assert load_config(NodeConfig, None, {"routers": text}, {}).routers == ("http://a:1", "http://b:2")


@pytest.mark.parametrize("text", ['["nixl", "tcp"]', "nixl,tcp"])
def test_lists_with_bounds_in_flags(text: str) -> None:
    assert load_config(NodeConfig, None, {"transfer.allowed": text}, {}).transfer.allowed == ("nixl", "tcp")
    with pytest.raises(ConfigError, match=r"transfer\.allowed"):
        load_config(NodeConfig, None, {"transfer.allowed": ""}, {})


def test_flags_are_text_for_any_type() -> None:
    flags = {"cache.prefix_cache": "false", "transfer.lease_ttl_s": "2.5", "worker_id": "7", "model.seed": "-3"}
    config = load_config(NodeConfig, None, flags, {})
    assert config.cache.prefix_cache is False
    assert config.transfer.lease_ttl_s == 2.5
    assert config.worker_id == "7"
    assert config.model.seed == -3


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("[cache]\nblocksize = 16", "cache.blocksize", "did you mean 'cache.block_size'?"),
        ("prot = 1", "prot", "did you mean 'port'?"),
        ("zzz = 1", "zzz", "known are"),
        ("block_size = 16", "block_size", "did you mean 'cache.block_size'?"),
        ("[model.x]\ny = 1", "model.x.y", "unknown"),
        ('[scheduler]\nmax_num_seqs = "many"', "scheduler.max_num_seqs", "expected int, got str"),
        ('port = "80"', "port", "expected int, got str"),
        ("port = 70000", "port", "expected int <= 65535"),
        ("[cache]\nblock_size = 17", "cache.block_size", "17"),
        ('cache = "2GiB"', "cache", "group of settings"),
        ('routers = "http://a"', "routers", "expected array, got str"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(NodeConfig, write(tmp_path, text), {}, {})
    assert caught.value.param == key
    assert key in caught.value.message
    assert message in caught.value.message
    assert "node.toml" in caught.value.message


@pytest.mark.parametrize(
    ("flags", "key"),
    [({"model.threads": "two"}, "model.threads"), ({"port.x": "1"}, "port.x"), ({"model": "x"}, "model")],
)
def test_wrong_flags_are_refused_by_key(flags: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(NodeConfig, None, flags, {})
    assert caught.value.param == key


def test_a_value_and_a_group_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a\.b"):
        load_config(NodeConfig, None, {"a": "1", "a.b": "2"}, {})


@pytest.mark.parametrize("text", ["port = ", b"\xff"])
def test_a_file_that_is_not_toml(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(NodeConfig, path, {}, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(NodeConfig, tmp_path / "none.toml", {}, {})


def test_secrets_are_not_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RouterConfig, None, {"api_key": ["hush"]}, {})
    assert "hush" not in caught.value.message
    shown = format_config(load_config(RouterConfig, None, {"api_key": "hush", "cluster_key": "hush"}, {}))
    assert "hush" not in shown


def test_what_is_printed_can_be_loaded(tmp_path: Path) -> None:
    flags = {"worker_id": 'a"b', "cache.memory": "3GiB", "routers": "http://a,http://b", "model.dtype": "float32"}
    config = load_config(NodeConfig, None, flags, {})
    assert load_config(NodeConfig, write(tmp_path, format_config(config)), {}, {}) == config


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("1e9", 10**9),
        ("64MB", 64 * 10**6),
        ("4k", 4096),
        ("1.5G", 3 << 29),
        ("0", 0),
        ("17", 17),
        ("3TiB", 3 << 40),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1 2", "1..5G", "infinity", "nan", "1e400"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cache\.memory"):
        parse_size(text, "cache.memory")
