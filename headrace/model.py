"""`headrace model`: fetch or convert a model ahead of time, and say where it is and what shape it has."""

import argparse
import json
import sys
from pathlib import Path

import msgspec

from headrace.prepare import ModelReport
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

_EPILOG = """\
examples:
  headrace model                                  the built-in model, SmolLM2-135M-Instruct
  headrace model Qwen/Qwen3-0.6B                  from the Hugging Face hub; HF_TOKEN for gated ones
  headrace model ./weights/model.Q4_1.gguf        converted once, into $HEADRACE_CACHE or ~/.cache/headrace
"""

_SHAPE_KEYS = {
    "architectures": "architecture",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "head dimension",
    "torch_dtype": "dtype",
    "dtype": "dtype",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "model",
        help="fetch or convert a model ahead of time",
        description="Find, download or convert a model, and print where it is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--no-weights", action="store_true", help="tokenizer and configuration only, as a router needs")
    parser.add_argument("--json", action="store_true", help="one line of JSON, for programs")


def run(options: argparse.Namespace) -> int:
    files = resolve_model(options.name, progress=_tell, weights=not options.no_weights)
    if options.json:
        report = ModelReport(files.name, str(files.folder), files.max_model_len, files.vocab_size)
        print(msgspec.json.encode(report).decode())
        return 0
    print(f"name           {files.name}")
    print(f"folder         {files.folder}")
    print(f"size           {_size(files.folder) / 1e6:.0f} MB")
    for label, value in _shape(files).items():
        print(f"{label:<14} {value}")
    print(f"{'context':<14} {files.max_model_len} tokens")
    print(f"{'vocabulary':<14} {files.vocab_size} tokens")
    return 0


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _shape(files: ModelFiles) -> dict[str, object]:
    config = json.loads(files.config_path.read_text(encoding="utf-8"))
    shape: dict[str, object] = {}
    for key, label in _SHAPE_KEYS.items():
        value = config.get(key)
        if value is not None:
            shape[label] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return shape


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
