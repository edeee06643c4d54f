"""`headrace bench transfer` with its real processes: the report's shape, and that nothing is left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from headrace.cli import main
from kv_transfer.bench.report import Report


def test_a_tiny_run_reports_every_contestant_with_verified_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    arguments = ["--quick", "--rounds", "1", "--block-bytes", "64KiB", "--num-blocks", "4", "--json", str(file)]
    assert main(["bench", "transfer", "--transports", "shm,tcp,nixl", *arguments]) == 0
    report = msgspec.json.decode(file.read_bytes(), type=Report)
    measured = {(result.contestant, result.direction) for result in report.results if not result.setting}
    pulls = {"shm", "tcp", "nixl", "memcpy", "raw socket", "raw nixl"}
    assert {(name, "pull") for name in pulls} <= measured
    assert ("raw nixl", "push") in measured
    assert {result.contestant for result in report.results if result.setting == "UCX_TLS=tcp"} == {"nixl", "raw nixl"}
    assert {(result.num_blocks, result.placement) for result in report.results} == {(4, "contiguous"), (4, "scattered")}
    assert not report.missing
    assert {entry.transport for entry in report.idle} == {"shm", "tcp", "nixl"}
    for result in report.results:
        assert result.verified, result
        assert result.block_bytes == 65536
        assert result.num_transfers >= 2
        assert result.memcpy_ratio is not None
        assert (result.reference is None) == (result.contestant in ("memcpy", "raw socket", "raw nixl"))
    table = capsys.readouterr().out
    for name in pulls:
        assert name in table


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "headrace", "bench", "transfer", "--quick", "--transports", "tcp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as bench:
        assert bench.stdout is not None
        bench.stdout.readline()
        bench.stdout.readline()  # the idle costs: the stations are at work
        stations = psutil.Process(bench.pid).children(recursive=True)
        assert len(stations) >= 2
        bench.send_signal(how)
        bench.stdout.read()
    assert bench.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    _, alive = psutil.wait_procs(stations, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    "arguments",
    [
        ["--transports", "tcp,carrier-pigeon"],
        ["--transports", "inproc"],
        ["--block-bytes", "1000"],
        ["--num-blocks", "many"],
        ["--rounds", "0"],
        ["--json", "/no/such/folder/report.json"],
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"headrace: {arguments[0]}")
    assert error.count("\n") == 1
