"""A prompt that the device has forgotten comes back from wherever it is kept, and the answer is the same."""

from pathlib import Path
from typing import Any

import pytest
from completions import Answer
from store_cluster import BLOCK_SIZE, NUM_BLOCKS, StoreCluster, running_stores
from tiny_models import make_model

import store_node.main
from kv_store.disk.tier import DiskTier
from kv_store.index.embedded import EmbeddedServer
from kv_store.store import KVStore
from protocol.errors import InvalidParameter
from protocol.ids import BlockHash
from protocol.kv_blocks import chain
from protocol.store import StorePut, StorePutDone
from protocol.transfer import KVSource
from store_node.build import build_store
from store_node.put_receiver import PUT_PATH

PROMPT_BLOCKS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def prompt(number: int) -> list[int]:
    return [(7 * number + 3 * i) % 500 + 2 for i in range(PROMPT_BLOCKS * BLOCK_SIZE + 5)]


async def forget(cluster: StoreCluster, first: int = 1) -> None:
    """Have the device forget what it holds, by asking for enough else."""
    for number in range(first, first + NUM_BLOCKS // PROMPT_BLOCKS + 1):
        await cluster.ask(prompt(number), 1)


def num_cached(answer: Answer) -> int:
    return int(answer.usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("write", ["back", "through"])
async def test_from_host_memory(model: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0", write=write)
        first = await cluster.ask(prompt(0))
        await forget(cluster)
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert num_cached(again) == PROMPT_BLOCKS * BLOCK_SIZE
        assert (await cluster.tier("d0")).found == PROMPT_BLOCKS
        await cluster.at_rest()


async def test_a_prompt_of_less_than_a_block(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0")
        answer = await cluster.ask([5, 6, 7])
        assert len(answer.token_ids) == 4
        assert num_cached(answer) == 0


async def test_from_disk(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        node = await cluster.start("decode", "d0", host_memory="512KiB", disk_path=str(tmp_path), disk_size="16MiB")
        first = await cluster.ask(prompt(0))
        await forget(cluster, 1)
        await forget(cluster, 30)
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert num_cached(again) == PROMPT_BLOCKS * BLOCK_SIZE
        assert (await cluster.tier("d0", "disk")).found == PROMPT_BLOCKS
        await cluster.at_rest()
        await node.stop()
        await cluster.start("decode", "d1", disk_path=str(tmp_path), disk_size="16MiB")
        restarted = await cluster.ask(prompt(0))
        assert restarted.token_ids == first.token_ids
        assert num_cached(restarted) == PROMPT_BLOCKS * BLOCK_SIZE, "the disk tier outlives the process"


async def test_from_a_peers_host_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch, local_prefill_tokens=0) as cluster:
        await cluster.start("decode", "d0")
        first = await cluster.ask(prompt(0))
        await forget(cluster)
        await cluster.start("prefill", "p0", host_memory="0")
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert num_cached(again) >= PROMPT_BLOCKS * BLOCK_SIZE
        await cluster.at_rest()
        assert await cluster.metric("d0", "headrace_leases_released_total", memory="host") >= 1
        assert await cluster.metric("d0", "headrace_leases_open", memory="host") == 0
        assert await cluster.metric("p0", "headrace_kv_transfer_blocks_total", memory="device") >= PROMPT_BLOCKS


async def test_a_slot_that_changes_is_forgotten_once_a_reader_has_noticed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that computes nothing never reads its own slots: it hears of it from who borrows."""
    stores: list[KVStore] = []

    def remember(*args: Any) -> tuple[KVStore, DiskTier | None]:
        store, disk = build_store(*args)
        stores.append(store)
        return store, disk

    monkeypatch.setattr(store_node.main, "build_store", remember)
    async with running_stores(model, monkeypatch) as cluster:
        store = await cluster.start("store", "s0")
        node = await cluster.start("decode", "d0", write="through", stores=(store.url,))
        first = await cluster.ask(prompt(0))
        await cluster.until_stored("s0", PROMPT_BLOCKS)
        slab, bad = cluster.arenas[0], 7
        place = next(stored.place for stored in stores[0].snapshot() if stored.block.position == bad)
        slab.block(place)[3] ^= 0x40
        for number in (1, 2):
            await cluster.at_rest()
            await node.stop()
            del cluster.nodes[node.name]
            node = await cluster.start("decode", f"d{number}", stores=(store.url,), host_memory="0")
            again = await cluster.ask(prompt(0))
            assert again.token_ids == first.token_ids
            assert num_cached(again) == bad * BLOCK_SIZE, "the rest is computed"
            await cluster.at_rest()
            tier = await cluster.tier("s0")
            assert (tier.damaged, tier.used) == (1, PROMPT_BLOCKS - 1)
            failures = await cluster.metric(node.name, "headrace_checksum_failures_total", memory="device", peer="s0")
            assert failures == (number == 1), "the second reader is not lent what is damaged"


async def test_from_a_store_after_the_node_has_gone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        store = await cluster.start("store", "s0")
        node = await cluster.start("decode", "d0", write="through", stores=(store.url,))
        first = await cluster.ask(prompt(0))
        await cluster.until_stored("s0", PROMPT_BLOCKS)
        await cluster.at_rest()
        await node.stop()
        del cluster.nodes["d0"]
        await cluster.start("decode", "d1", stores=(store.url,))
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert num_cached(again) == PROMPT_BLOCKS * BLOCK_SIZE
        await cluster.at_rest()


async def test_what_is_no_put_is_refused_and_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        store = await cluster.start("store", "s0")
        node = await cluster.start("decode", "d0")
        blocks = tuple(chain(BlockHash(b"r" * 16), [BlockHash(bytes([i]) * 16) for i in range(4)]))
        nobody = KVSource(worker="gone", incarnation="i", control_url="http://127.0.0.1:9", num_blocks=4)
        put = StorePut(request_id="q", source=nobody, blocks=blocks, deadline_s=5.0)
        with pytest.raises(InvalidParameter, match="no store"):
            await cluster.client.call(node.url + PUT_PATH, put, StorePutDone, 5.0)
        torn = StorePut(request_id="q", source=nobody, blocks=(blocks[0], blocks[2]), deadline_s=5.0)
        with pytest.raises(InvalidParameter, match="does not continue"):
            await cluster.client.call(store.url + PUT_PATH, torn, StorePutDone, 5.0)
        done = await cluster.client.call(store.url + PUT_PATH, put, StorePutDone, 10.0)
        assert done.num_stored == 0, "its sender has died"
        lost = KVSource(worker="d0", incarnation="i", control_url=node.url, num_blocks=4)
        done = await cluster.client.call(
            store.url + PUT_PATH,
            StorePut(request_id="q", source=lost, blocks=blocks, deadline_s=5.0),
            StorePutDone,
            10.0,
        )
        assert done.num_stored == 0, "it is of another life"
        tier = await cluster.tier("s0")
        assert (tier.used, tier.held) == (0, 0)


async def test_two_nodes_find_each_other_through_the_index(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No router tells them: it has not heard of the blocks yet, or serves others."""
    async with EmbeddedServer() as server, running_stores(model, monkeypatch) as cluster:
        store = await cluster.start("store", "s0", redis=server.url)
        node = await cluster.start("decode", "d0", redis=server.url, write="through")
        first = await cluster.ask(prompt(0))
        await cluster.until_stored("s0", PROMPT_BLOCKS)
        await node.stop()
        del cluster.nodes["d0"]
        assert store.engine is None
        await cluster.start("decode", "d1", redis=server.url)
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert num_cached(again) == PROMPT_BLOCKS * BLOCK_SIZE
        await cluster.at_rest()
