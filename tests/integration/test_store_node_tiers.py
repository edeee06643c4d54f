"""A prompt that the device has forgotten comes back from wherever it is kept, and the answer is the same."""

from pathlib import Path

import pytest
from store_cluster import BLOCK_SIZE, running_stores
from tiny_models import make_model

PROMPT_BLOCKS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def prompt(number: int) -> list[int]:
    return [(7 * number + 3 * i) % 500 + 2 for i in range(PROMPT_BLOCKS * BLOCK_SIZE + 5)]


async def test_from_host_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_stores(model, monkeypatch) as cluster:
        await cluster.start("decode", "d0")
        first = await cluster.ask(prompt(0))
        for number in range(1, 5):
            await cluster.ask(prompt(number))
        await cluster.until_stored("d0", PROMPT_BLOCKS)
        again = await cluster.ask(prompt(0))
        assert again.token_ids == first.token_ids
        assert again.usage["prompt_tokens_details"]["cached_tokens"] >= PROMPT_BLOCKS * BLOCK_SIZE // 2
        assert (await cluster.tier("d0")).found > 0
        await cluster.at_rest()
