"""The command line as a user meets it: help, exit codes, one clear line for what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import main


def test_every_command_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["up"], ["serve"], ["model"], ["cache"], ["cache", "warm"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "decode", "--set", "cache.blocksize=32"], "did you mean 'cache.block_size'?"),
        (["serve", "decode", "--set", "nonsense"], "KEY=VALUE"),
        (["serve", "router", "--transport", "shm"], "--transport: transfer.transport is a setting of nodes"),
        (["serve", "router", "--dtype", "float32"], "--dtype: model.dtype is a setting of nodes"),
        (["serve", "router", "--quantization", "int8"], "--quantization: model.quantization is a setting of nodes"),
        (["serve", "router", "--threads", "2"], "--threads: model.threads is a setting of nodes"),
        (["serve", "router", "--kv-memory", "1GiB"], "--kv-memory: cache.memory is a setting of nodes"),
        (["serve", "router", "--gpu-memory-utilization", "0.5"], "cache.gpu_memory_utilization is a setting of nodes"),
        (["serve", "router", "--router", "http://127.0.0.1:1"], "--router: routers is a setting of nodes"),
        (["serve", "router", "--set", "model.dtype=float32"], "unknown setting 'model.dtype'"),
        (["serve", "decode", "--threads", "4097"], "model.threads"),
        (["up", "--prefill", "-3"], "--prefill -3"),
        (["up", "--threads", "99999999999999999999"], "--threads 99999999999999999999"),
        (["serve", "prefill", "--config", "/no/such/file.toml"], "cannot read"),
        (["up", "--decode", "0"], "at least one decode node"),
        (["up", "--colocated", "2", "--decode", "2"], "--colocated replicas are instead of prefill and decode nodes"),
        (["up", "--colocated", "0"], "--colocated 0"),
        (["up", "--port", "0", "--set", "x=1"], "begin with whose setting"),
        (["up", "--cpu-affinity", "0,4095"], "asks for cores 4095; this process may use"),
        (["serve", "decode", "--cpu-affinity", "4095"], "asks for cores 4095"),
        (["model", "/no/such/model"], "/no/such/model"),
        (["cache", "lookup"], "name a prompt"),
        (["cache", "lookup", "x", "--file", "y"], "name the prompt once"),
        (["cache", "lookup", "--file", "/no/such/file"], "--file /no/such/file"),
        (["cache", "pin", "x", "--ttl", "soon"], "--ttl soon: a time such as 90s"),
        (["cache", "pin", "x", "--ttl", "365d"], "at most 30d"),
        (["cache", "unpin"], "name a prompt, or say --all"),
        (["cache", "clear", "--tenant", "Team A", "--yes"], "not its salt"),
        (["cache", "warm", "/no/such/file"], "/no/such/file"),
        (["cache", "watch", "--interval", "0"], "--interval 0"),
        (["cache", "watch", "--events"], "--events needs the index's URL"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("headrace: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is no JSON object"),
        ("[]", "line 2 is no JSON object"),
        ('{"prompts": []}', 'line 2: either "prompt" or "messages"'),
    ],
)
def test_a_file_of_prompts_is_read_before_any_is_sent(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    assert main(["cache", "warm", str(path), "--api", "http://127.0.0.1:1"]) == 2
    assert message in capsys.readouterr().err


def test_settings_in_force_are_printed_with_secrets_masked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CLUSTER_KEY", "hush-hush-hush-hush")
    path = tmp_path / "node.toml"
    path.write_text("[cache]\nblock_size = 32\n")
    assert main(["serve", "decode", "--config", str(path), "--threads", "3", "--print-config"]) == 0
    output = capsys.readouterr().out
    assert "block_size = 32" in output
    assert "threads = 3" in output
    assert "hush" not in output


def test_the_command_line_and_the_router_load_no_tensor_library() -> None:
    code = "import sys, headrace.cli, router.main; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_kernels_is_ours() -> None:
    """Hugging Face's optional `kernels` distribution has the same import name."""
    code = "import kernels, pathlib; print(pathlib.Path(kernels.__file__).resolve().parents[1])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert Path(ran.stdout.strip()) == Path(__file__).resolve().parents[2]
