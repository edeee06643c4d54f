"""The next turn of a chat begins with an answer whose KV only the decode node has: the prefill node borrows it.

Whatever happens to the lender, the tokens are those of one node alone, and all blocks and leases come back.
"""

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from cluster import Cluster, Process
from completions import Answer, complete
from tiny_models import greedy_reference, load_reference, make_model

BLOCK_SIZE = 16
NUM_TOKENS = 40
SALT = "a"
SETTINGS = {
    "cache.block_size": BLOCK_SIZE,
    "scheduler.max_num_batched_tokens": 64,
    "transfer.stall_timeout_s": 1.0,
    "transfer.borrow": "always",
}
REMOTE = {"local_prefill_tokens": 0, "heartbeat_interval_s": 0.1}
SAID = [[random.Random(turn).randrange(2, 512) for _ in range(length)] for turn, length in enumerate((70, 25, 40))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("chat"), str(model), settings=SETTINGS, router_settings=REMOTE) as cluster:
        yield cluster


def expected_turns(model: Path, said: list[list[int]]) -> list[list[int]]:
    """The answers of one node alone."""
    reference = load_reference(model)
    context: list[int] = []
    answers = []
    for tokens in said:
        context += tokens
        answers.append(greedy_reference(reference, context, NUM_TOKENS))
        context += answers[-1]
    return answers


async def take_turn(cluster: Cluster, context: list[int], said: list[int]) -> Answer:
    """One turn, and time for the router to hear what the nodes hold now."""
    context += said
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, cluster.url, context, NUM_TOKENS, cache_salt=SALT)
    context += answer.token_ids
    await asyncio.sleep(0.5)
    return answer


def computed(node: Process) -> float:
    return node.metric("headrace_prompt_tokens_computed_total")


async def test_a_chat_computes_only_what_no_node_has(model: Path, cluster: Cluster) -> None:
    prefill, context = cluster.processes["prefill-0"], []
    answers: list[Answer] = []
    for turn, said in enumerate(SAID):
        before, num_known = computed(prefill), len(context)
        answers.append(await take_turn(cluster, context, said))
        # The last token of an answer is sampled but never computed.
        held = (num_known - 1) // BLOCK_SIZE * BLOCK_SIZE if turn else 0
        assert computed(prefill) - before == num_known + len(said) - held
        assert answers[-1].usage["prompt_tokens_details"]["cached_tokens"] == held
    assert [answer.token_ids for answer in answers] == expected_turns(model, SAID)
    assert prefill.metric("headrace_prompt_tokens_borrowed_total") > 0
    cluster.wait_idle()


async def test_two_tenants_with_the_same_chat_share_nothing(model: Path, cluster: Cluster) -> None:
    prefill = cluster.processes["prefill-0"]
    whole = SAID[0] + expected_turns(model, SAID[:1])[0] + SAID[1]
    async with aiohttp.ClientSession() as session:
        for salt in ("b", "c"):
            before = computed(prefill)
            answer = await complete(session, cluster.url, whole, NUM_TOKENS, cache_salt=salt)
            assert computed(prefill) - before == len(whole)
            assert answer.token_ids == expected_turns(model, SAID[:2])[1]
    cluster.wait_idle()


async def test_a_context_comes_from_the_prefill_node_and_from_who_else_has_it(model: Path, tmp_path: Path) -> None:
    """The node that decoded the first turn is busy, so another takes the second; both it and the prefill node borrow."""
    expected = expected_turns(model, SAID[:2])
    with Cluster(tmp_path, str(model), decode=2, settings=SETTINGS, router_settings=REMOTE) as cluster:
        context: list[int] = []
        await take_turn(cluster, context, SAID[0])
        busy, other = sorted(
            (node for node in cluster.nodes if node.role == "decode"),
            key=lambda node: -node.metric("headrace_generated_tokens_total"),
        )
        async with aiohttp.ClientSession() as session:
            filler = asyncio.create_task(complete(session, cluster.url, context[:80], 400, cache_salt=SALT))
            async with asyncio.timeout(20):
                while not busy.metric("headrace_requests_running"):
                    await asyncio.sleep(0.02)
            second = await complete(session, cluster.url, context + SAID[1], NUM_TOKENS, cache_salt=SALT)
            await filler
        assert second.token_ids == expected[1]
        assert other.metric("headrace_generated_tokens_total") == NUM_TOKENS - 1, "the first is the prefill node's"
        assert busy.metric("headrace_leases_released_total") == 2, "the prefill node's loan and the decode node's"
        await asyncio.to_thread(cluster.wait_idle)


@pytest.mark.parametrize("fate", ["killed", "stopped"])
async def test_a_chat_goes_on_without_its_lender(fate: str, model: Path, tmp_path: Path) -> None:
    """Another decode node takes the second turn; the first, which has the answer, is gone, or stands still."""
    expected = expected_turns(model, SAID[:2])
    with Cluster(tmp_path, str(model), decode=2, settings=SETTINGS, router_settings=REMOTE) as cluster:
        context: list[int] = []
        first = await take_turn(cluster, context, SAID[0])
        lender = max(cluster.nodes, key=lambda node: node.metric("headrace_generated_tokens_total")).name
        context += SAID[1]
        async with aiohttp.ClientSession() as session:
            turn = asyncio.create_task(complete(session, cluster.url, context, NUM_TOKENS, cache_salt=SALT))
            if fate == "killed":
                cluster.kill(lender)
            else:
                cluster.processes[lender].signal(signal.SIGSTOP)
            try:
                async with asyncio.timeout(30):
                    second = await turn
            finally:
                if fate == "stopped":
                    cluster.processes[lender].signal(signal.SIGCONT)
        assert [first.token_ids, second.token_ids] == expected
        await asyncio.to_thread(cluster.wait_idle)
