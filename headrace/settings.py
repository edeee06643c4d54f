"""What several commands share: flags that are settings, and `--set` for all the others."""

import argparse
from collections.abc import Iterable, Mapping

from protocol.errors import ConfigError


def add_set_flag(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help=f"any other setting by its full name, such as {example}; may be repeated",
    )


def parse_settings(items: Iterable[str]) -> dict[str, object]:
    """`["a.b=1"]` as `{"a.b": "1"}`. Raises ConfigError for what has no key."""
    settings: dict[str, object] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item}: write it as KEY=VALUE", param="--set")
        settings[key.strip()] = value
    return settings


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """The settings whose flags were given."""
    return {key: value for key, value in flags.items() if value is not None}
