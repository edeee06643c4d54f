"""Which devices UCX may use: those of the address that the node binds, as two trees of sysfs would have them."""

import logging
import os
from pathlib import Path

import pytest

from kv_transfer.transports import network_devices
from kv_transfer.transports.network_devices import SETTING, confine_ucx, interface_addresses, interface_of, rdma_devices

ADDRESSES = {
    "127.0.0.1": "lo",
    "::1": "lo",
    "10.0.0.5": "eth0",
    "10.1.0.5": "bond0.100",
    "fd00::5": "eth0",
    "fe80::1": "ib0",
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two RoCE ports of one card (eth0 with a VLAN that has a bond's name, eth1) and one InfiniBand port (ib0)."""
    infiniband = tmp_path / "class/infiniband"
    write(infiniband / "mlx5_0/ports/1/gid_attrs/ndevs/0", "eth0")
    write(infiniband / "mlx5_0/ports/1/gid_attrs/ndevs/1", "eth0")
    write(infiniband / "mlx5_0/ports/1/gid_attrs/ndevs/2", "bond0.100")
    (infiniband / "mlx5_0/ports/1/gid_attrs/ndevs/3").mkdir()  # cannot be read, as the kernel has it for an unused GID
    write(infiniband / "mlx5_0/ports/2/gid_attrs/ndevs/0", "eth1")
    (infiniband / "mlx5_1/ports/1/gid_attrs/ndevs").mkdir(parents=True)
    write(tmp_path / "class/net/eth0/dev_port", "0")
    write(tmp_path / "class/net/eth1/dev_port", "1")
    write(tmp_path / "class/net/ib0/dev_port", "0")
    for interface, device in ("eth0", "mlx5_0"), ("eth1", "mlx5_0"), ("ib0", "mlx5_1"):
        (tmp_path / f"class/net/{interface}/device/infiniband/{device}").mkdir(parents=True)
    write(tmp_path / "class/net/wlan0/address", "00:00:00:00:00:00")
    return tmp_path


@pytest.mark.parametrize(
    ("interface", "devices"),
    [
        ("eth0", ["mlx5_0:1"]),
        ("eth1", ["mlx5_0:2"]),
        ("ib0", ["mlx5_1:1"]),
        ("bond0.100", ["mlx5_0:1"]),
        ("wlan0", []),
        ("no-such-interface", []),
    ],
)
def test_an_interface_brings_the_rdma_ports_that_carry_its_traffic(
    sysfs: Path, interface: str, devices: list[str]
) -> None:
    assert rdma_devices(interface, sysfs) == devices


def test_a_machine_without_rdma_has_no_such_devices(tmp_path: Path) -> None:
    assert rdma_devices("eth0", tmp_path) == []


@pytest.mark.parametrize(
    ("host", "interface"),
    [
        ("10.0.0.5", "eth0"),
        ("10.1.0.5", "bond0.100"),
        ("fd00:0:0::5", "eth0"),
        ("fe80::1%ib0", None),  # the zone is not known here, so neither is the address
        ("fe80::1", "ib0"),
        ("0.0.0.0", None),  # noqa: S104
        ("::", None),
        ("10.9.9.9", None),
        ("no-such-host.invalid", None),
    ],
)
def test_an_address_belongs_to_at_most_one_interface(host: str, interface: str | None) -> None:
    assert interface_of(host, ADDRESSES) == interface


def test_the_kernel_tells_every_address_of_this_machine() -> None:
    assert interface_addresses()["127.0.0.1"] == "lo"


def test_ucx_is_confined_to_what_the_node_binds(monkeypatch: pytest.MonkeyPatch, sysfs: Path) -> None:
    monkeypatch.setattr(network_devices, "interface_addresses", lambda: ADDRESSES)
    monkeypatch.setattr(network_devices, "rdma_devices", lambda interface: rdma_devices(interface, sysfs))
    for host, devices in ("127.0.0.1", "lo"), ("localhost", "lo"), ("10.0.0.5", "eth0,mlx5_0:1"):
        monkeypatch.setenv(SETTING, "to be removed, and restored after the test")
        monkeypatch.delenv(SETTING)
        confine_ucx(host)
        assert os.environ[SETTING] == devices


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "eth7")
    confine_ucx("127.0.0.1")
    assert os.environ[SETTING] == "eth7"


@pytest.mark.parametrize("host", ["0.0.0.0", "10.9.9.9"])  # noqa: S104
def test_an_open_data_plane_is_a_warning_that_names_the_setting(
    host: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setattr(network_devices, "interface_addresses", lambda: ADDRESSES)
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        confine_ucx(host)
    assert SETTING not in os.environ
    assert SETTING in caplog.text
    assert host in caplog.text
