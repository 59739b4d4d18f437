"""New pieces are used where they stand, text without them is read as before, and stock transformers agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.text import Tokenizer
from lathe.text.cut import cut
from lathe.text.grow import grow, spelt
from lathe.text.learn import learn
from lathe.text.rewritten import Rewritten
from tests.text.samples import KOREAN, SENTENCES, trained, vocabulary_files
from tests.text.test_cut import KINDS, LINES, name, texts, wordpiece
from tests.text.test_twins import agree

NEW = """\
세종대왕은 훈민정음을 만들었다. 훈민정음은 백성을 가르치는 바른 소리라는 뜻이다. 훈민정음 해례본 뷁
Hippopotamus hippopotami are semiaquatic; the hippopotamus hippopotamuses 😀😀 😀
"""
WORDS = ["훈민정음", "hippopotamus", "semiaquatic"]


@pytest.mark.parametrize("how", ["words", "text"])
@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
@settings(max_examples=4)
@given(data=st.data())
def test_text_without_a_new_piece_is_read_as_before(
    convention: str, options: dict[str, Any], how: str, data: st.DataObject
) -> None:
    old, new = trained(convention, **options), grown(convention, options, how).tokenizer
    for text in [*data.draw(st.lists(texts(), min_size=1, max_size=3)), *LINES[::40]]:
        ids = new.encode(text)
        if max(ids, default=0) < old.vocab_size:
            assert ids == old.encode(text)
        # Whatever is new holds nothing that was not there: decoding gives the same text.
        if old.unk_id not in old.encode(text):
            assert new.decode(ids) == old.decode(old.encode(text))


@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
def test_a_new_word_is_one_piece_and_starts_from_those_that_spelt_it(convention: str, options: dict[str, Any]) -> None:
    old, made = trained(convention, **options), grown(convention, options, "words")
    assert made.rows[: old.vocab_size] == tuple((number,) for number in range(old.vocab_size))
    for word in WORDS:
        before, after = (each.encode(f"a {word}", add_special_tokens=False) for each in (old, made.tokenizer))
        assert after[-1] >= old.vocab_size
        if old.unk_id not in made.rows[after[-1]]:
            assert [*after[:-1], *made.rows[after[-1]]] == before


@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
def test_learnt_pieces_fill_the_size_and_shorten_the_text(convention: str, options: dict[str, Any]) -> None:
    old, made = trained(convention, **options), grown(convention, options, "text")
    assert len(made.rows) == made.tokenizer.vocab_size == old.vocab_size + 40
    assert all(made.rows)
    before, after = (len(each.encode(NEW)) for each in (old, made.tokenizer))
    assert after < 0.8 * before or convention == "bert"  # where a word was one [UNK] before
    assert made.tokenizer.encode(NEW).count(made.tokenizer.unk_id or -1) <= old.encode(NEW).count(old.unk_id or -1)


# Words and learnt pieces go the same way into the files, so each kind is looked at once.
@pytest.mark.parametrize("how", ["text"])
@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
def test_stock_transformers_reads_the_same(convention: str, options: dict[str, Any], how: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = grown(convention, options, how).tokenizer
    made.save(tmp_path)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    agree(made, stock)
    assert made.encode(NEW) == stock.encode(NEW)
    assert Tokenizer.load(tmp_path).encode(NEW) == stock.encode(NEW)


@pytest.mark.parametrize("convention", ["bert", "gpt2", "bart", "llama"])
def test_the_vocabulary_file_that_stays_holds_the_same(convention: str) -> None:
    made = grown(convention, {}, "text").tokenizer
    alone = Tokenizer.from_files(vocabulary_files(made), convention=convention)
    assert alone.vocabulary == made.vocabulary
    for text in [NEW.replace("  ", " ").strip(), *KOREAN.splitlines()]:
        if convention != "bert":  # whose settings, lower case and accents, are not in the file
            ids = made.encode(text, add_special_tokens=False)
            assert alone.encode(text, add_special_tokens=False) == ids


def test_no_word_that_could_be_spelt_becomes_unknown() -> None:
    old = wordpiece("ab", "##cd", "e")
    assert old.pieces(old.encode("abcd", add_special_tokens=False)) == ["ab", "##cd"]
    made = grow(old, ["abc"]).tokenizer
    assert made.pieces(made.encode("abcd", add_special_tokens=False)) == ["abc", "##d"]


def test_a_cut_and_growth_are_one_change() -> None:
    old = trained("bert")
    first = cut(old, old.encode(KOREAN))
    both = first.then(grow(first.tokenizer, spelt(first.tokenizer, WORDS)))
    assert both.origin == len(first.rows)
    for number in range(both.tokenizer.vocab_size):
        token = both.tokenizer.pieces([number])[0]
        assert (old.pieces(both.rows[number]) == [token]) == (number < both.origin)


def test_words_are_refused_that_are_none() -> None:
    tokenizer = trained("bert")
    with pytest.raises(RequestError, match="'The' is a piece of this tokenizer already"):
        spelt(tokenizer, ["The"])
    with pytest.raises(RequestError, match="'Hippo' and 'hippo' are the same piece"):
        spelt(tokenizer, ["Hippo", "hippo"])
    with pytest.raises(RequestError, match="is 2 words to this tokenizer"):
        spelt(tokenizer, ["two words"])
    for kind in ("bert", "gpt2", "llama"):
        with pytest.raises(RequestError, match="is 0 words to this tokenizer"):
            spelt(trained(kind), [" "])
    with pytest.raises(RequestError, match="twice among the new pieces"):
        grow(tokenizer, ["hippo", "hippo"])
    with pytest.raises(RequestError, match="is a piece of this tokenizer already"):
        grow(tokenizer, ["the"])
    assert spelt(tokenizer, ["##ippo"]) == ["##ippo"]


def test_a_word_is_the_piece_that_it_is_in_a_text() -> None:
    words = ["hippopotamus", " semiaquatic"]
    assert spelt(trained("gpt2"), words) == ["Ġhippopotamus", "Ġsemiaquatic"]
    assert spelt(trained("llama"), words) == ["▁hippopotamus", "▁semiaquatic"]
    assert spelt(trained("bert"), words) == ["hippopotamus", "semiaquatic"]
    assert spelt(trained("gpt2"), ["'ve"]) == ["'ve"]  # after a space it would be two


def test_more_pieces_than_the_text_has_are_refused_with_how_many_it_has() -> None:
    with pytest.raises(RequestError, match=r"new pieces for 5\d\d at most"):
        learn(trained("gpt2"), SENTENCES, 4000)


GROWN: dict[str, Rewritten] = {}


def grown(convention: str, options: dict[str, Any], how: str) -> Rewritten:
    """A trained tokenizer grown by WORDS, or by forty pieces learnt from NEW; each made once."""
    key = f"{convention}{options}{how}"
    if key not in GROWN:
        old = trained(convention, **options)
        GROWN[key] = grow(old, spelt(old, WORDS)) if how == "words" else learn(old, [NEW] * 4, 40)
    return GROWN[key]
