"""What a user does, in the order they would do it: `headrace up`, the official openai client, Ctrl-C."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from cluster import REPOSITORY, http_get
from up_process import START_TIMEOUT_S, Up


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """With a router that waits for a node as long as one may take to start on a busy machine."""
    running = Up(tmp_path_factory.mktemp("up"), "--set", f"router.worker_wait_s={START_TIMEOUT_S // 2}")
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait(10)


@pytest.fixture(scope="module")
def client(up: Up) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["smollm2-135m-instruct"]


def test_the_readmes_snippet_prints_what_it_promises(up: Up) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0].replace("127.0.0.1:8000", f"127.0.0.1:{up.port}")
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "The capital of France is Paris."


def test_a_streamed_chat_answer_makes_sense_and_its_kv_crossed_over_nixl(up: Up, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3
    log = (up.output.parent / "logs").glob("decode*")
    assert any("nixl" in path.read_text() for path in log)


def test_streamed_and_whole_answers_are_the_same(client: openai.OpenAI) -> None:
    request = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Write the word water in French, Greek, Chinese and as an emoji."}],
        "temperature": 0.7,
        "seed": 5,
        "max_tokens": 80,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    streamed = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == whole


def test_ten_megabytes_are_refused_and_the_cluster_lives_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="smollm2-135m-instruct", prompt="x" * 10_000_000, max_tokens=1)
    assert caught.value.status_code == 413
    assert client.completions.create(model="smollm2-135m-instruct", prompt="Hello", max_tokens=2).choices[0].text


def test_a_child_that_dies_is_reported_and_replaced(up: Up, client: openai.OpenAI) -> None:
    up.role("prefill").kill()
    answer = client.completions.create(model="smollm2-135m-instruct", prompt="Water runs", max_tokens=4, temperature=0)
    assert answer.choices[0].text
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(re.findall(r"^prefill-0 ready", up.output.read_text(), re.MULTILINE)) < 2:
        assert time.monotonic() < deadline, up.output.read_text()
        time.sleep(0.2)
    assert "prefill-0" in up.output.read_text()
    assert client.completions.create(model="smollm2-135m-instruct", prompt="Water runs", max_tokens=4).choices[0].text


def test_a_stream_waits_for_its_decode_node_and_goes_on(up: Up, client: openai.OpenAI) -> None:
    request = {"model": "smollm2-135m-instruct", "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0}
    undisturbed = client.completions.create(**request).choices[0].text
    text = ""
    for number, chunk in enumerate(client.completions.create(**request, stream=True)):
        if number == 20:
            up.role("decode").kill()
        text += chunk.choices[0].text
    assert len(text) > len(undisturbed) // 2
    assert text[:60] == undisturbed[:60]


def test_ctrl_c_leaves_nothing_behind(up: Up) -> None:
    children = up.children()
    assert len(children) >= 3
    assert up.end() == 0, up.output.read_text()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    with pytest.raises(OSError, match="refused"):
        http_get(f"{up.url}/health")
    assert not [entry for entry in Path("/dev/shm").iterdir() if "headrace" in entry.name]  # noqa: S108


def test_killing_the_supervisor_leaves_no_process(tmp_path: Path) -> None:
    up = Up(tmp_path, "--prefill", "0")
    up.wait_ready()
    children = up.children()
    up.process.kill()
    up.process.wait(10)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "-m", "headrace", "up", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
        )
    assert ran.returncode == 2
    assert str(port) in ran.stderr
    assert "Traceback" not in ran.stderr
