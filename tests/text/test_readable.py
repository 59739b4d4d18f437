"""Pieces as a person reads them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lathe.text.readable import readable_pieces
from tests.text.samples import trained


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text))
def test_byte_level_pieces_are_shown_as_the_text_they_are(text: str) -> None:
    tokenizer = trained("gpt2")
    for number in tokenizer.encode(text):
        shown = readable_pieces(tokenizer, [number])[0]
        alone = tokenizer.decode([number])
        if "\ufffd" not in alone:
            assert shown.replace("▁", " ") == "".join(
                c if c.isprintable() else c.encode("unicode_escape").decode() for c in alone
            ).replace("▁", " ")
        assert shown.isprintable()


def test_bytes_that_are_no_character_are_shown_as_bytes() -> None:
    tokenizer = trained("gpt2")
    assert readable_pieces(tokenizer, tokenizer.encode("😀")) == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert readable_pieces(tokenizer, tokenizer.encode("\n is")) == ["\\n", "▁is"]
    assert readable_pieces(tokenizer, [0, 1]) == ["<|endoftext|>", "<|pad|>"]


def test_other_pieces_are_shown_as_they_are() -> None:
    for convention in ("t5", "bert"):
        tokenizer = trained(convention)
        ids = tokenizer.encode("The statement, 안녕하세요")
        assert readable_pieces(tokenizer, ids) == tokenizer.pieces(ids)
