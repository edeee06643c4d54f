"""Launch configurations: what wins, and what a broken file does."""

import json
import logging
from pathlib import Path

import pytest
import torch

from kernels.gpu import tuning
from kernels.gpu.tuning import LaunchConfig, forced, launch_config, shape_class, user_file, write_user_file

DEVICE, NAME = torch.device("cuda", 0), "NVIDIA H200"
DEFAULT, MEASURED = LaunchConfig(4, 1, {"TILE": 64}), LaunchConfig(8, 2, {"TILE": 128})


@pytest.fixture(autouse=True)
def a_gpu_and_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda device: NAME)
    tuning.measured.cache_clear()


def test_the_default_where_nothing_was_measured() -> None:
    assert launch_config("copy", DEVICE, DEFAULT, size=100) is DEFAULT


def test_a_measurement_holds_for_its_class_of_shapes_alone() -> None:
    write_user_file(NAME, {shape_class("copy", size=100): MEASURED})
    assert launch_config("copy", DEVICE, DEFAULT, size=128) == MEASURED
    assert launch_config("copy", DEVICE, DEFAULT, size=129) is DEFAULT
    assert launch_config("other", DEVICE, DEFAULT, size=100) is DEFAULT
    assert launch_config("copy", torch.device("cpu"), DEFAULT, size=100) is DEFAULT


def test_the_users_file_comes_before_the_shipped_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped.json"
    entries = {shape_class("copy", size=1): MEASURED.to_json(), shape_class("copy", size=2): MEASURED.to_json()}
    shipped.write_text(json.dumps({"version": tuning.VERSION, "devices": {NAME: entries}}))
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    own = LaunchConfig(2, 1, {"TILE": 32})
    write_user_file(NAME, {shape_class("copy", size=2): own})
    assert launch_config("copy", DEVICE, DEFAULT, size=1) == MEASURED
    assert launch_config("copy", DEVICE, DEFAULT, size=2) == own


def test_writing_keeps_what_was_there_and_other_devices_apart() -> None:
    write_user_file(NAME, {"copy size=1": MEASURED})
    write_user_file(NAME, {"copy size=2": DEFAULT})
    write_user_file("Other GPU (80GB)", {"copy size=1": DEFAULT})
    assert tuning.measured(NAME) == {"copy size=1": MEASURED, "copy size=2": DEFAULT}
    assert tuning.measured("Other GPU (80GB)") == {"copy size=1": DEFAULT}
    assert user_file("Other GPU (80GB)").name == "Other-GPU-80GB-.json"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 0, "devices": {}}',
        '{"version": 1, "devices": []}',
        '{"version": 1, "devices": {"NVIDIA H200": {"copy size=1": {"num_warps": 4}}}}',
        '{"version": 1, "devices": {"NVIDIA H200": {"copy size=1": {"num_warps": 3, "num_stages": 1, "sizes": {}}}}}',
        '{"version": 1, "devices": {"NVIDIA H200": {"copy size=1": {"num_warps": 4, "num_stages": 0, "sizes": {}}}}}',
        '{"version": 1, "devices": {"NVIDIA H200": {"copy size=1": {"num_warps": 4, "num_stages": 1, "sizes": {"T": 3}}}}}',
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_ignored(content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = user_file(NAME)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert launch_config("copy", DEVICE, DEFAULT, size=1) is DEFAULT
    assert str(path) in caplog.text


def test_sizes_of_another_kernel_do_not_count() -> None:
    write_user_file(NAME, {shape_class("copy", size=1): LaunchConfig(4, 1, {"WIDTH": 64})})
    assert launch_config("copy", DEVICE, DEFAULT, size=1) is DEFAULT


def test_forcing_one_kernel() -> None:
    with forced("copy", MEASURED):
        assert launch_config("copy", DEVICE, DEFAULT) is MEASURED
        assert launch_config("other", DEVICE, DEFAULT) is DEFAULT
    assert launch_config("copy", DEVICE, DEFAULT) is DEFAULT


def test_a_trial_tells_what_was_asked() -> None:
    with forced("copy", None) as trial:
        assert launch_config("copy", DEVICE, DEFAULT, size=100, width=3) is DEFAULT
        launch_config("other", DEVICE, DEFAULT, size=100)
    assert trial.asked == {"copy size=128 width=4": DEFAULT}


def test_the_shipped_table_can_be_read() -> None:
    content = json.loads(tuning.SHIPPED.read_text())
    assert content["version"] == tuning.VERSION
    for entries in content["devices"].values():
        assert all(LaunchConfig.parse(entry) for entry in entries.values())
