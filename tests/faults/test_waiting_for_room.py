"""A decode node without room keeps the leases on what waits for it, however long that takes."""

import asyncio
import random
from pathlib import Path

import aiohttp
from cluster import Cluster
from completions import complete
from tiny_models import greedy_reference, load_reference, make_model

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 5, 300, 300


async def test_leases_outlive_the_queue_of_a_full_decode_node(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 512) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]
    settings = {"transfer.lease_ttl_s": 0.6}
    room_for_one = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // 16) + 1
    settings, decode_settings = {"transfer.lease_ttl_s": 0.6}, {"cache.num_blocks": room_for_one}
    with Cluster(tmp_path, str(model), settings=settings, decode_settings=decode_settings) as cluster:
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(
                *(complete(session, cluster.url, prompt, OUTPUT_TOKENS) for prompt in prompts)
            )
        await asyncio.to_thread(cluster.wait_idle)
        assert cluster.processes["prefill-0"].metric("headrace_leases_expired_total") == 0
    reference = load_reference(model)
    assert [answer.token_ids for answer in answers] == [
        greedy_reference(reference, prompt, OUTPUT_TOKENS) for prompt in prompts
    ]
