"""Tokens to text: nothing is emitted that a later token would change, and the pieces add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_model import EOS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers

from protocol.errors import ConfigError, InvalidParameter, RequestError
from router.chat_template import ChatTemplate
from router.detokenizer import REPLACEMENT, ByteLevelDetokenizer, WindowDetokenizer, make_detokenizer
from router.stop_strings import StopStringFinder
from router.tokenizer import TextTokenizer

TEXT = "é水👩‍👩‍👧‍👦 नमस्ते e\u0301 — plain words\n\t end 🎉"


def byte_fallback_tokenizer() -> TextTokenizer:
    """Like SentencePiece's: words with a leading mark, and bytes for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ("▁", "▁water", "▁runs", "water", "é", "水", "."):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(tokenizer)


@given(st.text(max_size=60))
def test_pieces_of_a_text_add_up_and_never_change(text: str) -> None:
    tokenizer = make_tokenizer()
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=False, prompt_token_ids=())
    so_far = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        so_far += detokenizer.push(token_id)
        assert text.startswith(so_far)
    assert so_far + detokenizer.flush() == text


@given(st.lists(st.integers(0, 399), max_size=80), st.booleans())
def test_any_tokens_add_up_to_the_full_decode(token_ids: list[int], skip: bool) -> None:
    """Random tokens are mostly broken UTF-8."""
    tokenizer = make_tokenizer()
    detokenizer = ByteLevelDetokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_an_id_outside_the_vocabulary_has_no_text() -> None:
    tokenizer = make_tokenizer()
    assert ByteLevelDetokenizer(tokenizer, True).push(10_000) == ""
    assert tokenizer.token_bytes(10_000) == b""


def test_byte_tokens_wait_for_their_character() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = WindowDetokenizer(tokenizer, True, ())
    pieces = [detokenizer.push(2 + byte) for byte in "🎉".encode()]
    assert pieces == ["", "", "", "🎉"]
    assert detokenizer.flush() == ""


@given(st.lists(st.sampled_from(["▁water", "▁runs", "water", "é", "水", ".", "🎉", "ж"]), max_size=30))
def test_window_pieces_add_up(words: list[str]) -> None:
    tokenizer = byte_fallback_tokenizer()
    token_ids: list[int] = []
    for word in words:
        known = tokenizer._tokenizer.token_to_id(word)
        token_ids += [known] if known is not None else [2 + byte for byte in word.encode()]
    detokenizer = WindowDetokenizer(tokenizer, True, ())
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_the_first_word_keeps_its_leading_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    water, runs = (tokenizer._tokenizer.token_to_id(piece) for piece in ("▁water", "▁runs"))
    assert WindowDetokenizer(tokenizer, True, [water]).push(runs) == " runs"


def test_broken_bytes_are_not_held_for_ever() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = WindowDetokenizer(tokenizer, True, ())
    assert REPLACEMENT in "".join(detokenizer.push(2 + 0xFF) for _ in range(8))


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), max_size=40),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_chunk_borders(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    whole = StopStringFinder(stops, include=include)
    expected = whole.push(text)
    rest = "" if expected.stop else whole.flush()
    finder = StopStringFinder(stops, include=include)
    got, stop, at = "", None, 0
    for size in [*sizes, *[1] * len(text)]:
        found = finder.push(text[at : at + size])
        got, stop, at = got + found.text, found.stop, at + size
        if stop is not None or at >= len(text):
            break
    assert stop == expected.stop
    assert got + ("" if stop else finder.flush()) == expected.text + rest
    if stop is None:
        assert not any(one in text for one in stops)
    else:
        assert not any(one in got[: -len(stop)] if include else one in got for one in stops)


def test_only_what_could_become_a_stop_is_held_back() -> None:
    finder = StopStringFinder(["STOP"], include=False)
    assert finder.push("go ST").text == "go "
    assert finder.push("ART ").text == "START "
    assert finder.push("STO").text == ""
    found = finder.push("P never")
    assert (found.text, found.stop) == ("", "STOP")


def test_the_stop_string_itself_on_request() -> None:
    assert StopStringFinder(["."], include=True).push("One. Two").text == "One."


def test_text_that_may_not_stop_passes() -> None:
    finder = StopStringFinder(["ab"], include=False)
    assert finder.push("a").text == ""
    assert finder.pass_through("b").text == "ab"
    assert finder.push("b").stop is None


def test_long_texts_are_refused_without_tokenizing() -> None:
    tokenizer = make_tokenizer()
    text = "x" * 100_000
    assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_a_template_gets_what_templates_expect() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.first %}\n{{ m.content | tojson }}\n    {% endif %}\n"
        "{% if not loop.first %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}{{ mode }}",
        {"bos_token": "<s>"},
    )
    messages = [{"role": "user", "content": 'a "<b>" é'}, {"role": "user", "content": "b"}]
    assert template.render(messages, extra={"mode": "on"}) == '<s>"a \\"<b>\\" é"\n4on'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ 'x' * 1000 ** 6 }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (messages | string) | int + 'a' }}",
    ],
)
def test_a_template_that_misbehaves_is_a_refusal(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])


def test_a_template_that_is_none_fails_at_start() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize("name", ["messages", "raise_exception", "add_generation_prompt"])
def test_template_options_cannot_replace_what_is_ours(name: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        ChatTemplate("x").render([], extra={name: "y"})
    assert caught.value.param == "chat_template_kwargs"


def test_end_of_sequence_is_markup() -> None:
    assert EOS in make_tokenizer().special_ids
