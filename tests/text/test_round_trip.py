"""Text to ids and back: what comes back is what went in, or its normal form."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lathe.text import Tokenizer
from tests.text.samples import SENTENCES, trained

# Everything that UTF-8 can hold. U+2581 is SentencePiece's space, and text that reads as a special token becomes one.
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PLAIN = ANY.filter(
    lambda text: "▁" not in text and not any(token in text for token in ("<s>", "</s>", "<pad>", "<unk>"))
)
HANGUL = st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3)
WORDS = st.lists(
    st.text(st.one_of(HANGUL, st.characters(min_codepoint=0x21, max_codepoint=0x7E)), min_size=1, max_size=8),
    max_size=8,
)


@given(PLAIN)
@example("  two  spaces,\ta tab\nand a line  ")
@example("<0x41><0xZZ>")
@example("\x00\x07\x85\ufeff")
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_llamas_loses_nothing(model: str, text: str) -> None:
    same(trained("llama", model=model), text, text)


@given(ANY.filter(lambda text: "<|" not in text))
@example("▁ 안녕 \u1112\u1161\u11ab 😀👨‍👩‍👧 \x00")
def test_byte_level_loses_nothing(text: str) -> None:
    same(trained("gpt2"), text, text)


@given(WORDS)
@example(["<0x41>", "<0x4", "1>"])
def test_words_of_korean_and_ascii_come_back_from_t5s(words: list[str]) -> None:
    text = " ".join(words)
    same(trained("t5"), text, text)
    same(trained("t5", model="bpe"), text, text)


@pytest.mark.parametrize("convention", ["t5", "albert"])
@given(PLAIN)
@example("ﬁ ① a\u00a0b c\u200bd \x00 \x07")
def test_what_normalisation_leaves_comes_back_unchanged(convention: str, text: str) -> None:
    tokenizer = trained(convention)
    once = tokenizer.decode(tokenizer.encode(text))
    twice = tokenizer.decode(tokenizer.encode(once))
    assert tokenizer.decode(tokenizer.encode(twice)) == twice
    if text.isascii() and text.isprintable() and convention == "t5":
        assert once == " ".join(text.split())


def test_emoji_and_rare_characters_are_spelt_in_bytes() -> None:
    for text in ("😀", "👨‍👩‍👧", "𠮷", "ꥠ"):
        for convention in ("t5", "llama"):
            tokenizer = trained(convention)
            ids = tokenizer.encode(text)
            assert tokenizer.unk_id not in ids
            assert any(piece.startswith("<0x") for piece in tokenizer.pieces(ids))
            assert tokenizer.decode(ids) == text
    plain = trained("t5", byte_fallback=False)
    assert plain.unk_id in plain.encode("😀")


def test_text_that_reads_as_a_byte_piece_is_text() -> None:
    tokenizer = trained("t5")
    ids = tokenizer.encode("<0x41>")
    assert tokenizer.token_id("<0x41>") is not None
    assert tokenizer.token_id("<0x41>") not in ids
    assert tokenizer.decode(ids) == "<0x41>"


def test_korean_syllables_stay_whole_unless_accents_are_to_go() -> None:
    text = "안녕하세요 여러분"
    for convention in ("bert", "albert"):
        tokenizer = trained(convention)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    stripped = trained("bert", strip_accents=True)
    assert unicodedata.normalize("NFC", stripped.decode(stripped.encode(text))) == text
    assert stripped.decode(stripped.encode(text)) != text


@pytest.mark.parametrize("convention", ["t5", "bert", "gpt2", "llama"])
def test_ids_and_pieces_belong_together(convention: str) -> None:
    tokenizer = trained(convention)
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert [tokenizer.token_id(piece) for piece in tokenizer.pieces(ids)] == ids
        assert tokenizer.encode_batch([sentence, "a"])[0] == ids


def same(tokenizer: Tokenizer, text: str, expected: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == expected
