"""ModelFiles: a Hugging Face folder, and what the router and the nodes must know of it before they open anything big."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from protocol.errors import ConfigError
from runtime.models.json_files import MAX_JSON_BYTES, read_json

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
TokenIds = TokenId | list[TokenId] | None
ContextLength = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]

T = TypeVar("T")

_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How the model's makers want it sampled, where the client does not say. The API's own defaults otherwise."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model on disk. `name` is what clients call it unless they are told otherwise.

    `eos_token_ids` end a sequence; the first is the tokenizer's own, where it names one. `bos_token` and `eos_token`
    are texts, as chat templates want them. `max_model_len` is the context the model was made for. `sampling` is from generation_config.json.
    """

    folder: Path
    name: str
    config_path: Path
    tokenizer_path: Path
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    max_model_len: int
    vocab_size: int
    sampling: SamplingDefaults


class _Rope(msgspec.Struct):
    """Only what stretches the context; engine.model.config reads all of it."""

    rope_type: str | None = None
    type: str | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Config(msgspec.Struct):
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    model_type: str | None = None
    max_position_embeddings: ContextLength | None = None
    n_positions: ContextLength | None = None  # what GPT-2 and its descendants call it
    eos_token_id: TokenIds = None
    bos_token_id: TokenIds = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: TokenIds = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None


class _AddedToken(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _VocabularyEntry(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_VocabularyEntry] = []


def read_model_files(folder: Path, name: str) -> ModelFiles:
    """Read a folder's small files. Raises ConfigError, naming file and field, on anything that is missing or wrong."""
    config = read_json(folder / "config.json", _Config)
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; only models with a fast tokenizer can be served")
    added = {entry.content: entry.id for entry in read_json(tokenizer_path, _Tokenizer).added_tokens}
    tokenizer = _optional(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    generation = _optional(folder / "generation_config.json", _GenerationConfig) or _GenerationConfig()
    bos_token, eos_token = _text(tokenizer.bos_token), _text(tokenizer.eos_token)
    own_eos = () if eos_token is None or eos_token not in added else (added[eos_token],)
    eos_token_ids = (*own_eos, *(_ids(generation.eos_token_id) or _ids(config.eos_token_id)))
    for token_id in eos_token_ids:
        if token_id >= config.vocab_size:
            raise ConfigError(f"{folder}: eos_token_id {token_id} is not in the vocabulary of {config.vocab_size}")
    return ModelFiles(
        folder=folder,
        name=name,
        config_path=folder / "config.json",
        tokenizer_path=tokenizer_path,
        chat_template=_chat_template(folder, tokenizer),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        bos_token_id=next(iter(_ids(config.bos_token_id)), None),
        bos_token=bos_token,
        eos_token=eos_token,
        max_model_len=_max_model_len(config),
        vocab_size=config.vocab_size,
        sampling=_sampling_defaults(generation),
    )


def _sampling_defaults(generation: _GenerationConfig) -> SamplingDefaults:
    named = {field.name: getattr(generation, field.name) for field in fields(SamplingDefaults)}
    return SamplingDefaults(**{name: value for name, value in named.items() if value is not None})


def _optional(path: Path, message_type: type[T]) -> T | None:
    return read_json(path, message_type) if path.is_file() else None


def _text(token: str | _AddedToken | None) -> str | None:
    return token.content if isinstance(token, _AddedToken) else token


def _ids(token_ids: TokenIds) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    return (token_ids,) if isinstance(token_ids, int) else tuple(token_ids)


def _max_model_len(config: _Config) -> int:
    """YaRN is switched on by hand, beside a max_position_embeddings that still tells the length before it."""
    length = config.max_position_embeddings or config.n_positions
    if length is None:
        raise ConfigError(
            f"config.json: model type {config.model_type!r} has neither max_position_embeddings nor n_positions"
        )
    rope = config.rope_parameters or config.rope_scaling
    if rope is None or (rope.rope_type or rope.type) != "yarn" or rope.factor is None:
        return length
    original = rope.original_max_position_embeddings or length
    return max(length, int(original * rope.factor))


def _chat_template(folder: Path, tokenizer: _TokenizerConfig) -> str | None:
    path = folder / _TEMPLATE_FILE
    try:
        if path.is_file():
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ConfigError(f"{path} is too large for a chat template")
            return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    templates = tokenizer.chat_template
    if not isinstance(templates, list):
        return templates
    return next((entry.template for entry in templates if entry.name == "default"), None)
