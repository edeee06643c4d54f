"""A GGUF file's vocabulary as tokenizer.json and tokenizer_config.json.

Byte-level BPE only: its vocabulary and merges are complete in the file, and how text is cut before merging follows from
`tokenizer.ggml.pre`, a name that stands for a pattern. A name that is not known here is refused: a wrong pattern would
give plausible but wrong tokens.
"""

from dataclasses import dataclass

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from runtime.models.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # entries of tokenizer.ggml.token_type
_MAX_TEMPLATE_CHARS = 1 << 20

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _Cut:
    """How text is cut into pieces that merges stay within. `pattern` None: GPT-2's own, which ByteLevel has built in."""

    pattern: str | None = None
    single_digits: bool = False
    whole_words_first: bool = False  # a piece that is a token needs no merges
    compose: bool = False  # Unicode NFC before anything else


_CUTS = {
    "default": _Cut(),
    "gpt-2": _Cut(),
    "smollm": _Cut(single_digits=True),
    "llama-bpe": _Cut(_LLAMA3_PATTERN, whole_words_first=True),
    "qwen2": _Cut(_QWEN2_PATTERN, compose=True),
}


class TokenizerConfigJson(msgspec.Struct, frozen=True, omit_defaults=True):
    tokenizer_class: str
    clean_up_tokenization_spaces: bool
    model_max_length: int
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None


def tokenizer_config_json(source: GgufFile, max_length: int) -> TokenizerConfigJson:
    tokens = source.texts("tokenizer.ggml.tokens")
    key = "tokenizer.chat_template"
    template = source.text(key) if source.has(key) else None
    if template is not None and len(template) > _MAX_TEMPLATE_CHARS:
        raise source.error(key, f"has {len(template)} characters")
    return TokenizerConfigJson(
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        bos_token=_special(source, tokens, "bos"),
        eos_token=_special(source, tokens, "eos"),
        unk_token=_special(source, tokens, "unknown"),
        pad_token=_special(source, tokens, "padding"),
        chat_template=template,
    )


def build_tokenizer(source: GgufFile) -> Tokenizer:
    """Raises ConfigError, naming the key, where the vocabulary is malformed or of a kind that is not supported."""
    model = source.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise source.error(
            "tokenizer.ggml.model",
            f"is {model!r}; only byte-level BPE ('gpt2') is supported: use the model's Hugging Face folder",
        )
    cut = _cut(source)
    tokens = source.texts("tokenizer.ggml.tokens")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise source.error("tokenizer.ggml.tokens", "holds a token twice")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(source, vocabulary), ignore_merges=cut.whole_words_first)
    )
    if cut.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(source, tokens)
    _add_special_tokens(source, tokenizer, tokens)
    return tokenizer


def _cut(source: GgufFile) -> _Cut:
    key = "tokenizer.ggml.pre"
    name = source.text(key) if source.has(key) else "default"
    if name not in _CUTS:
        raise source.error(key, f"is {name!r}; supported are {', '.join(_CUTS)}: use the model's Hugging Face folder")
    return _CUTS[name]


def _merges(source: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in source.texts("tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise source.error("tokenizer.ggml.merges", f"joins what is not in the vocabulary: {line!r}")
        merges.append((left, right))
    return merges


def _pre_tokenizer(cut: _Cut) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if cut.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    return pre_tokenizers.Sequence(steps)


def _post_processor(source: GgufFile, tokens: list[str]) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    bos = _special(source, tokens, "bos")
    if bos is None or not source.flag("tokenizer.ggml.add_bos_token", default=False):
        return byte_level
    template = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, tokens.index(bos))])
    return processors.Sequence([byte_level, template])


def _add_special_tokens(source: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Tokens that text is searched for as a whole. They are in the vocabulary already and keep their ids."""
    key = "tokenizer.ggml.token_type"
    kinds = source.integers(key) if source.has(key) else []
    if kinds and len(kinds) != len(tokens):
        raise source.error(key, f"has {len(kinds)} entries for {len(tokens)} tokens")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind == _USER_DEFINED
        ]
    )


def _special(source: GgufFile, tokens: list[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return tokens[source.integer(key, 0, len(tokens) - 1)] if source.has(key) else None
