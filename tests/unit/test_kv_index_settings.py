"""Where the index is, and whose owners are believed in it."""

import logging

import msgspec
import pytest

from kv_store.index.seal import Seal
from kv_store.index.settings import IndexSettings
from protocol.errors import ConfigError
from runtime.node_config import StoreOptions
from tests.support.index_servers import owner_named


class TestSeal:
    OWNER = owner_named("a")

    def test_golden_bytes(self) -> None:
        assert (
            Seal("key", "ns").close(7, self.OWNER).hex()[:64]
            == "e9f8d23cfb4b304d084b7d12d58ed831df58272e4db6f501cf97f13242053d50"
        )

    def test_only_the_same_key_namespace_life_and_owner_are_believed(self) -> None:
        value = Seal("key", "ns").close(7, self.OWNER)
        opened = Seal("key", "ns").open(7, value)
        assert (opened.owner, opened.believed) == (self.OWNER, True)
        assert not Seal("other", "ns").open(7, value).believed
        assert not Seal(None, "ns").open(7, value).believed
        assert not Seal("key", "other").open(7, value).believed
        assert not Seal("key", "ns").open(8, value).believed
        assert not Seal("key", "ns").open(7, value[:32] + msgspec.msgpack.encode(owner_named("b"))).believed
        with pytest.raises(msgspec.MsgspecError):
            Seal("key", "ns").open(7, value[:31])

    @pytest.mark.parametrize(
        ("host", "believed"),
        [("127.0.0.1", True), ("localhost", True), ("127.8.8.8", True), ("10.0.0.1", False), ("a.test", False)],
    )
    def test_without_a_key_only_loopback_is_believed(self, host: str, believed: bool) -> None:
        seal = Seal(None, "ns")
        owner = owner_named("a", control_url=f"http://{host}:8000")
        assert seal.open(7, seal.close(7, owner)).believed is believed


class TestSettings:
    @pytest.mark.parametrize(
        "url", ["unix:///a.sock", "redis://h", "rediss://u:p@h:1/2?ssl_ca_certs=x", "redis+cluster://h:7000"]
    )
    def test_forms_of_a_url(self, url: str) -> None:
        found = IndexSettings.of(StoreOptions(redis=url, namespace="n", redis_budget_s=0.5), "key")
        assert found is not None
        assert (found.url, found.namespace, found.budget_s) == (url, "n", 0.5)
        assert "+" not in found.driver_url

    @pytest.mark.parametrize(
        "url", ["", "http://h", "redis://", "unix://", "redis://:hush@h:x", "redis://u:hush/hush@h"]
    )
    def test_a_wrong_url_is_refused_without_showing_its_password(self, url: str) -> None:
        with pytest.raises(ConfigError, match=r"store\.redis") as error:
            IndexSettings(url=url)
        assert "hush" not in error.value.message

    @pytest.mark.parametrize(
        "url",
        [
            "redis://h?bogus=hush",
            "redis://h?hush=1",
            "redis://:hu?sh@h",
            "redis://h?protocol=3",
            "redis://h?socket_timeout=hush",
            "redis://h?ssl_ca_certs=hush",
            "redis://h/hush",
            "rediss://h?ssl_cert_reqs=hush",
            "rediss://h?ssl_keyfile=",
            "rediss://h?ssl_keyfile=hush&ssl_keyfile=hush",
            "unix:///a.sock?db=hush",
            "unix:///a.sock?ssl_keyfile=hush",
        ],
    )
    def test_options_that_are_not_ours_to_give_are_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match=r"store\.redis") as error:
            IndexSettings(url=url)
        assert "hush" not in error.value.message

    def test_options_that_are(self) -> None:
        for url in (
            "redis://h/3",
            "unix:///a.sock?db=2",
            "rediss://h/?ssl_cert_reqs=none&ssl_check_hostname=False",
            "rediss+cluster://h?ssl_ca_certs=/a.pem&ssl_certfile=/b.pem&ssl_keyfile=/c.pem",
        ):
            assert IndexSettings(url=url).url == url

    def test_secrets_are_not_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        found = IndexSettings(url="rediss://user:hush@host:1/2?ssl_keyfile=private", cluster_key="hush hush")
        with caplog.at_level(logging.INFO):
            logging.getLogger("test").info("%s %s", found, found.shown_url)
        assert "hush" not in caplog.text
        assert found.shown_url == "rediss://host:1/2"

    def test_no_url_no_index(self) -> None:
        assert IndexSettings.of(StoreOptions(), None) is None
