"""A client of /v1/completions that works in token ids."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, Any]
    timing: dict[str, float]


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    num_tokens: int,
    *,
    stream: bool = False,
    **options: Any,
) -> Answer:
    """Exactly `num_tokens` tokens; greedy unless `options` says otherwise. Raises AssertionError on any error."""
    models = await (await session.get(f"{url}/v1/models")).json()
    body = {
        "model": models["data"][0]["id"],
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    } | options
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, f"{response.status}: {await response.text()}"
        if stream:
            return await _read_stream(response)
        answer = await response.json()
    choice = answer["choices"][0]
    return Answer(choice["token_ids"], choice["finish_reason"], answer["usage"], choice.get("timing") or {})


async def complete_all(url: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """One after the other, each on its own."""
    async with aiohttp.ClientSession() as session:
        return [(await complete(session, url, prompt, num_tokens)).token_ids for prompt in prompts]


async def complete_together(url: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(complete(session, url, prompt, num_tokens) for prompt in prompts))
    return [answer.token_ids for answer in answers]


async def _read_stream(response: aiohttp.ClientResponse) -> Answer:
    token_ids: list[int] = []
    finish_reason, usage, timing = "", {}, {}
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            token_ids += choice.get("token_ids") or []
            finish_reason = choice.get("finish_reason") or finish_reason
            timing = choice.get("timing") or timing
    return Answer(token_ids, finish_reason, usage, timing)
