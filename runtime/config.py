"""load_config: one frozen configuration per process. Defaults, then a TOML file, then the environment, then flags.

What cannot be meant is refused at start with the key's full name, what was expected there, and the nearest key that
exists. Secrets may come from the environment (HEADRACE_CLUSTER_KEY, HEADRACE_API_KEY, HEADRACE_REDIS_URL), so that no file
or command line has to show them.
"""

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from protocol.errors import ConfigError

ENVIRONMENT_KEYS = {
    "HEADRACE_CLUSTER_KEY": "cluster_key",
    "HEADRACE_API_KEY": "api_key",
    "HEADRACE_REDIS_URL": "store.redis",  # may hold a password
}
SECRET_KEYS = frozenset(ENVIRONMENT_KEYS.values())
MASK = "(set)"

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)\s*", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("k", "m", "g", "t"), 1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}

T = TypeVar("T", bound=msgspec.Struct)


def load_config(
    config_type: type[T], path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str]
) -> T:
    """Build the process's configuration.

    `overrides` maps dotted keys to values. A value that is text is read as what the key wants: "1" is a number for a
    number, "a, b" or '["a", "b"]' a list for a list. In the file, types are strict. Raises ConfigError.
    """
    merged = {} if path is None else _read_toml(path)
    source = "the flags" if path is None else str(path)
    known = list(_dotted_keys(config_type, ""))
    _check(config_type, merged, "", known, source, lax=False)
    for variable, key in ENVIRONMENT_KEYS.items():
        if environ.get(variable) and key in known:
            _put(merged, key.split("."), environ[variable], key)
    flags: dict[str, Any] = {}
    for key, value in overrides.items():
        _put(flags, key.split("."), value, key)
    _check(config_type, flags, "", known, "the flags", lax=True)
    return msgspec.convert(_merge(merged, flags), config_type)


def parse_size(text: str, setting: str = "size") -> int:
    """Bytes of "512MiB", "2GiB", "2G", "64 MB" or "1e9". Raises ConfigError that names `setting`."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f'{setting}: {text!r} is not a size; write it like "512MiB", "2GiB" or "1e9"', param=setting)
    return int(float(match[1]) * unit)


def format_config(config: msgspec.Struct) -> str:
    """The configuration as TOML, secrets masked. Settings that are not set stand as comments."""
    return "\n".join(_toml_lines(msgspec.to_builtins(config), ""))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _check(
    struct: type[msgspec.Struct], values: dict[str, Any], prefix: str, known: list[str], source: str, lax: bool
) -> None:
    """Check every value against its own field, replacing it by the converted one; so each error has one key."""
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for name, value in values.items():
        key = prefix + name
        nested = fields.get(name)
        group = nested if isinstance(nested, type) and issubclass(nested, msgspec.Struct) else None
        if name not in fields:
            key = _first_leaf(key, value)
            raise ConfigError(f"{source}: unknown setting {key!r}{_nearest(key, known)}", param=key)
        if group is None and isinstance(value, dict) and value:
            leaf = _first_leaf(key, value)
            why = f"{key} is a value and has no settings of its own"
            raise ConfigError(f"{source}: unknown setting {leaf!r}: {why}", param=leaf)
        if group is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {key} is a group of settings, not a value", param=key)
            _check(group, value, f"{key}.", known, source, lax)
        else:
            values[name] = _convert(key, value, fields[name], source, lax)


def _convert(key: str, value: object, wanted: Any, source: str, lax: bool) -> object:
    try:
        return msgspec.convert(_read_text(value, wanted) if lax else value, wanted, strict=not lax)
    except msgspec.ValidationError as error:
        shown = MASK if key in SECRET_KEYS else repr(value)
        raise ConfigError(f"{source}: {key} = {shown}: {_plain(error)}", param=key) from error


def _read_text(value: object, wanted: Any) -> object:
    """Text that stands for a list, as that list. Other text is converted by msgspec."""
    if typing.get_origin(wanted) is typing.Annotated:
        wanted = typing.get_args(wanted)[0]
    if not isinstance(value, str) or typing.get_origin(wanted) not in (tuple, list):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return [item.strip() for item in value.split(",") if item.strip()]


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec's message in a user's words: "Expected `int`, got `str`" -> "expected int, got str"."""
    message = str(error).replace("`", "").partition(" - at ")[0]
    return message[:1].lower() + message[1:]


def _dotted_keys(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _dotted_keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _first_leaf(key: str, value: object) -> str:
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _nearest(key: str, known: list[str]) -> str:
    """The setting that was probably meant: one of the same name elsewhere, else one that is spelt alike."""
    name = key.rpartition(".")[2]
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    near = elsewhere or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _put(tree: dict[str, Any], path: list[str], value: object, key: str) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"the flags: {key}: {name} is a value and has no settings of its own", param=key)
    tree[path[-1]] = value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _toml_lines(values: Mapping[str, Any], group: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            continue
        if value is None:
            yield f"# {name} is not set"
        else:
            yield f"{name} = {json.dumps(MASK if group + name in SECRET_KEYS else value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"\n[{group}{name}]"
            yield from _toml_lines(value, f"{group}{name}.")
