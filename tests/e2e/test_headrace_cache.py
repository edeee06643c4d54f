"""What a user of the store does: `headrace up` with a store node and a folder on disk, a long prompt that is forgotten and asked
again, a restart, and `headrace cache`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
from cluster import REPOSITORY
from up_process import Up

MODEL = "smollm2-135m-instruct"
PROMPT = "Water runs through the headrace to the wheel, and the wheel turns the mill. " * 20
DEADLINE_S = 60
OTHER = "The miller sleeps while his mill runs too fast, and the baker waits for the flour. " * 20
PROMPT_BLOCKS = 14
"""At least; a little less than what host memory holds."""

FLAGS = ("--prefill", "0", "--store", "--host-memory", "8MiB", "--kv-memory", "32MiB")
SETTINGS = ("write=through", "admission=all", "load=always", "policy=lru")


@contextlib.contextmanager
def running(folder: Path, name: str, control_port: int) -> Iterator[Up]:
    here = folder / name
    here.mkdir()
    settings = [word for setting in SETTINGS for word in ("--set", f"node.store.{setting}")]
    control = ("--set", f"router.control_port={control_port}")
    up = Up(here, *FLAGS, *settings, *control, "--disk", str(folder / "disk"))
    try:
        up.wait_ready()
        yield up
        assert up.end() == 0, up.output.read_text()
    finally:
        if up.process.poll() is None:
            up.process.kill()
            up.process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(up: Up, prompt: str) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were cached."""
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].text, 0 if details is None else details.cached_tokens or 0


def cache(port: int, *words: str) -> Any:
    ran = subprocess.run(
        [sys.executable, "-m", "headrace", "cache", *words, "--json", "--cluster", f"http://127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def used(port: int, tier: str) -> dict[str, int]:
    """Blocks by node."""
    nodes = cache(port, "stats")["nodes"]
    return {node["worker"]: each["used"] for node in nodes for each in node["tiers"] if each["tier"] == tier}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_prompt_outlives_its_device_and_its_cluster(tmp_path: Path) -> None:
    control_port = free_port()
    (tmp_path / "disk").mkdir()
    with running(tmp_path, "first", control_port) as up:
        text, cached = ask(up, PROMPT)
        assert cached == 0
        ask(up, OTHER)
        until(lambda: used(control_port, "disk")["decode-0"] >= PROMPT_BLOCKS, "nothing has gone to disk")
        cache(control_port, "clear", "--tier", "device", "--yes")
        found = cache(control_port, "lookup", PROMPT)["prompts"][0]
        assert sorted(node["worker"] for node in found["nodes"]) == ["decode-0", "store-0"]
        assert any(node["worker"] == "decode-0" and node["disk"] > 0 for node in found["nodes"])
        again, cached = ask(up, PROMPT)
        assert again == text
        assert cached > 0, "it is on disk"
    with running(tmp_path, "second", control_port) as up:
        again, cached = ask(up, PROMPT)
        assert again == text
        assert cached > 0, "the disk outlives the cluster"
        cache(control_port, "clear", "--yes")
        until(lambda: not any(used(control_port, "disk").values()), "the disk was to be cleared")
        again, cached = ask(up, PROMPT)
        assert (again, cached) == (text, 0)
