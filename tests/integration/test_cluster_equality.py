"""Disaggregated output == single-node output == the transformers library's greedy output, token for token, in fp32."""

import asyncio
import random
import re
from pathlib import Path

import pytest
from cluster import Cluster
from completions import complete_all
from tiny_models import CONFIGS, EOS, SHAPE, greedy_reference, load_reference, make_model, write_model
from tokenizers import Tokenizer
from transformers import Gemma3TextConfig

from headrace.cli import main
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

BLOCK_SIZE = 16
CHUNK = 64
NUM_TOKENS = 24
PROMPT_LENGTHS = [1, 7, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE, CHUNK, CHUNK + 1, 333]
REMOTE = {"local_prefill_tokens": 0}
"""A router that sends even the shortest prompt to the prefill node."""
SETTINGS = {"cache.block_size": BLOCK_SIZE, "scheduler.max_num_batched_tokens": CHUNK}


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 512) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_and_prompt_length(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(1)]
    with Cluster(tmp_path, str(model), settings=SETTINGS, router_settings=REMOTE) as cluster:
        disaggregated = asyncio.run(complete_all(cluster.url, prompts(1), NUM_TOKENS))
        cluster.wait_idle()
        moved = sum(
            cluster.processes[node].metric("headrace_kv_transfer_blocks_total") for node in ("prefill-0", "decode-0")
        )
        assert moved == sum(-(-length // BLOCK_SIZE) for length in PROMPT_LENGTHS)
    with Cluster(tmp_path, str(model), prefill=0, settings=SETTINGS) as single:
        alone = asyncio.run(complete_all(single.url, prompts(1), NUM_TOKENS))
    assert disaggregated == expected
    assert alone == expected


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_transport(transport: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(2)]
    with Cluster(tmp_path, str(model), transport=transport, settings=SETTINGS) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(2), NUM_TOKENS)) == expected
        cluster.wait_idle()


def test_nodes_choose_their_transport_and_the_doctor_tells_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama", tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(2)]
    with Cluster(
        tmp_path,
        str(model),
        transport="auto",
        settings=SETTINGS,
        router_settings=REMOTE,
    ) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(2), NUM_TOKENS)) == expected
        cluster.wait_idle()
        assert main(["doctor", "--cluster", cluster.router.listening["control_url"]]) == 0
        told = capsys.readouterr().out
    assert "prefill-0 -> decode-0" in told
    assert "GB/s" in told
    assert re.search(r"runs shm, nixl,( ucx,)? tcp", told)


def test_a_model_of_the_transformers_library(tmp_path: Path) -> None:
    """Of a family that only the fallback runs; its odd layers see a window that ends within the blocks that move."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SHAPE, pad_token_id=EOS, head_dim=32, sliding_window=21, layer_types=kinds)
    model = write_model(config, tmp_path / "gemma3")
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(4)]
    with Cluster(tmp_path, str(model), settings=SETTINGS, router_settings=REMOTE) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(4), NUM_TOKENS)) == expected
        cluster.wait_idle()


def test_nixl_over_tcp(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    reference = load_reference(model)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts(3)]
    with Cluster(tmp_path, str(model), settings=SETTINGS, environment={"UCX_TLS": "tcp"}) as cluster:
        assert asyncio.run(complete_all(cluster.url, prompts(3), NUM_TOKENS)) == expected
        cluster.wait_idle()


def test_the_real_model(tmp_path: Path) -> None:
    files = resolve_model(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    texts = ["The", "Water runs through the mill and", "def fibonacci(n):\n", "Once upon a time. " * 30]
    token_ids = [tokenizer.encode(text).ids for text in texts]
    reference = load_reference(files.folder)
    expected = [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in token_ids]
    with Cluster(tmp_path, DEFAULT_MODEL, settings=SETTINGS, router_settings=REMOTE) as cluster:
        assert asyncio.run(complete_all(cluster.url, token_ids, NUM_TOKENS)) == expected
    with Cluster(tmp_path, DEFAULT_MODEL, prefill=0, settings=SETTINGS) as single:
        assert asyncio.run(complete_all(single.url, token_ids, NUM_TOKENS)) == expected
