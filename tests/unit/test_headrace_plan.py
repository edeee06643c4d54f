"""Which processes a cluster consists of, which cores they get, and what they are told."""

import argparse
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cores import divide_cores, format_cpus, parse_cpus
from headrace.plan import ChildSpec, ClusterPlan, UpOptions, make_plan, wanted_index
from headrace.settings import parse_settings
from protocol.errors import ConfigError
from runtime.config import load_config
from runtime.node_config import NodeConfig


def plan(cores: int = 2, environ: dict[str, str] | None = None, **options: object) -> ClusterPlan:
    return make_plan(UpOptions(**options), list(range(cores)), environ or {})  # type: ignore[arg-type]  # by keyword


def config_of(spec: ChildSpec) -> NodeConfig:
    """As the process itself would read its command line."""
    arguments = spec.arguments({"routers": ["http://127.0.0.1:1"]})
    settings = [value for flag, value in pairwise(arguments) if flag == "--set"]
    return load_config(NodeConfig, None, parse_settings(settings), {})


def test_one_core_each_for_a_pair_on_two_cores() -> None:
    prefill, decode = plan().nodes
    assert (prefill.name, prefill.role, prefill.cpus) == ("prefill-0", "prefill", (0,))
    assert (decode.name, decode.role, decode.cpus) == ("decode-0", "decode", (1,))
    assert config_of(prefill).model.threads == config_of(decode).model.threads == 1
    assert plan().router.cpus == ()


def test_a_node_alone_has_the_machine_to_itself() -> None:
    (decode,) = plan(num_prefill=0).nodes
    assert decode.cpus == ()
    assert config_of(decode).model.threads == 2


def test_nodes_that_outnumber_the_cores_share_them_with_a_thread_each() -> None:
    nodes = plan(num_prefill=2, num_decode=3).nodes
    assert [node.name for node in nodes] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert {node.cpus for node in nodes} == {()}
    assert {config_of(node).model.threads for node in nodes} == {1}


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 8))
def test_cores_are_shared_out_fairly_or_not_at_all(num_cores: int, num_nodes: int, threads: int) -> None:
    cores = list(range(num_cores))
    shares = divide_cores(cores, num_nodes, threads)
    assert len(shares) == num_nodes
    if num_cores < num_nodes * max(1, threads):
        assert shares == [tuple(cores)] * num_nodes
        return
    given_out = [core for share in shares for core in share]
    assert len(given_out) == len(set(given_out))
    lengths = {len(share) for share in shares}
    assert (
        lengths == {threads} if threads else (sum(map(len, shares)) == num_cores and max(lengths) - min(lengths) <= 1)
    )


@given(st.sets(st.integers(0, 200), min_size=1))
def test_core_lists_survive_the_command_line(cpus: set[int]) -> None:
    assert set(parse_cpus(format_cpus(sorted(cpus)))) == cpus


@pytest.mark.parametrize("text", ["", "3-1", "-1", "1-", "a", "0,3-1", "4096", "0-99999999999999999999"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_cpus(text)


def test_flags_reach_the_nodes() -> None:
    options = {
        "model": "/models/m",
        "served_name": "m",
        "transport": "shm",
        "dtype": "float32",
        "load_format": "dummy",
        "max_model_len": 100,
        "kv_memory": "64MiB",
        "gpu_memory_utilization": 0.5,
        "threads": 3,
    }
    config = config_of(plan(**options).nodes[0])
    assert (config.model.model, config.model.served_name, config.model.dtype) == ("/models/m", "m", "float32")
    assert (config.model.load_format, config.model.max_model_len, config.model.threads) == ("dummy", 100, 3)
    assert (config.transfer.transport, config.cache.memory) == ("shm", "64MiB")
    assert config.cache.gpu_memory_utilization == 0.5
    assert config.routers == ("http://127.0.0.1:1",)


def test_settings_go_to_whom_they_name_and_the_narrower_wins() -> None:
    settings = {"node.scheduler.max_num_seqs": "32", "decode.scheduler.max_num_seqs": "16", "router.retries": "3"}
    made = plan(settings=settings)
    prefill, decode = made.nodes
    assert (config_of(prefill).scheduler.max_num_seqs, config_of(decode).scheduler.max_num_seqs) == (32, 16)
    assert "retries=3" in made.router.arguments({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_decode": 0}, "at least one decode node"),
        ({"num_prefill": -3}, "--prefill -3"),
        ({"threads": -1}, "--threads -1"),
        ({"threads": 99999999999999999999}, "--threads 99999999999999999999: from 0 to 4096"),
        ({"settings": {"node.model.threads": "99999999999999999999"}}, "model.threads"),
        ({"settings": {"node.model.threads": "4097"}}, "model.threads"),
        ({"settings": {"cache.block_size": "32"}}, "begin with whose setting it is"),
        ({"settings": {"prefill": "32"}}, "begin with whose setting it is"),
        ({"settings": {"decode.cache.blocksize": "32"}}, "cache.block_size"),
        ({"kv_memory": "much"}, "not a size"),
        ({"dtype": "float8"}, "float8"),
        ({"port": 70000}, "port"),
    ],
)
def test_what_the_processes_would_refuse_is_refused_before_they_start(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("key", "default", "other"),
    [
        ("model.model", "smollm2-135m-instruct", "another"),
        ("model.dtype", "auto", "float32"),
        ("model.quantization", "none", "int8"),
        ("model.load_format", "auto", "dummy"),
        ("model.seed", "0", "1"),
        ("cache.block_size", "16", "32"),
        ("cache.page_format", "auto", "plain"),
    ],
)
def test_nodes_that_could_not_read_each_others_kv_are_refused(key: str, default: str, other: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^{key} is .*{default}.* on prefill nodes and .*{other}.* on decode"
    ) as caught:
        plan(settings={f"decode.{key}": other})
    assert caught.value.param == key
    with pytest.raises(ConfigError, match=f"^{key} is .*{other}.* on prefill nodes and .*{default}.* on decode"):
        plan(settings={f"prefill.{key}": other})
    plan(settings={f"node.{key}": other}, num_prefill=2, num_decode=2)
    plan(settings={f"prefill.{key}": other, f"decode.{key}": other})
    plan(settings={f"decode.{key}": other}, num_prefill=0)


def test_secrets_stay_off_the_command_line() -> None:
    made = plan(
        settings={"router.api_key": "hush-hush", "node.cluster_key": "hush-hush", "router.cluster_key": "hush-hush"}
    )
    for spec in made.children:
        assert "hush-hush" not in " ".join(spec.arguments({}))
        assert spec.environment["HEADRACE_CLUSTER_KEY"] == "hush-hush"
    assert made.router.environment["HEADRACE_API_KEY"] == "hush-hush"


def test_the_plan_takes_this_machines_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    made = make_plan(UpOptions(), cores, {})
    assert {core for node in made.nodes for core in node.cpus} <= set(cores)


def test_stores_and_the_index_reach_every_node(tmp_path: Path) -> None:
    options = UpOptions(num_stores=2, disk=tmp_path, host_memory="1GiB", settings={"store.store.host_memory": "2GiB"})
    plan = make_plan(options, [0, 1], {}, "redis://:secret@cache:6379/0")
    assert [spec.name for spec in plan.nodes] == ["prefill-0", "decode-0", "store-0", "store-1"]
    for spec in plan.nodes:
        assert spec.environment["HEADRACE_REDIS_URL"] == "redis://:secret@cache:6379/0"
        assert "secret" not in " ".join(spec.arguments({})), "a command line is public"
        assert spec.settings["store.disk_path"] == str(tmp_path / spec.name)
        assert spec.settings["store.host_memory"] == ("2GiB" if spec.role == "store" else "1GiB")


def test_no_index_hides_the_environments() -> None:
    environ = {"HEADRACE_REDIS_URL": "redis://elsewhere"}
    assert wanted_index(UpOptions(), {}) == "embedded"
    assert wanted_index(UpOptions(), environ) == "redis://elsewhere"
    assert wanted_index(UpOptions(redis="none"), environ) == "none"
    plan = make_plan(UpOptions(redis="none"), [0, 1], environ)
    assert all(not spec.environment["HEADRACE_REDIS_URL"] for spec in plan.nodes)


def test_a_store_of_another_layout_is_refused() -> None:
    options = UpOptions(num_stores=1, settings={"store.cache.block_size": "32"})
    with pytest.raises(ConfigError, match=r"cache\.block_size is 32 on store nodes and 16 on decode nodes"):
        make_plan(options, [0, 1], {})
