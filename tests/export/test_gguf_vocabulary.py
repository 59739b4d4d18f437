"""Tokenizers as GGUF's keys: which of llama.cpp's algorithms each is, and what is refused."""

from __future__ import annotations

import pytest

from lathe.errors import RequestError
from lathe.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary
from tests.text.samples import trained


@pytest.mark.parametrize(
    ("convention", "algorithm", "before", "after"),
    [
        ("t5", "t5", False, True),
        ("llama", "llama", True, False),
        ("gpt2", "gpt2", False, False),
        ("bert", "bert", True, True),
    ],
)
def test_each_kind_is_one_of_llama_cpps(convention: str, algorithm: str, before: bool, after: bool) -> None:
    tokenizer = trained(convention)
    found = vocabulary(tokenizer, tokenizer.vocab_size + 3)
    keys = found.keys
    assert keys["tokenizer.ggml.model"] == algorithm
    assert keys["tokenizer.ggml.add_bos_token"] is before
    assert keys["tokenizer.ggml.add_sep_token" if algorithm == "bert" else "tokenizer.ggml.add_eos_token"] is after
    pieces, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(pieces) == len(set(pieces)) == len(types) == tokenizer.vocab_size + 3
    assert types[-3:] == [UNUSED] * 3
    assert types[tokenizer.pad_id or 0] == CONTROL
    assert types.count(NORMAL) > 200


def test_pieces_of_words_change_their_writing_for_wordpiece() -> None:
    tokenizer = trained("bert")
    pieces = vocabulary(tokenizer, tokenizer.vocab_size).keys["tokenizer.ggml.tokens"]
    begins, goes_on, special = (tokenizer.vocabulary[piece] for piece in ("the", "##s", "[CLS]"))
    assert (pieces[begins], pieces[goes_on], pieces[special]) == ("▁the", "s", "[CLS]")


def test_unigram_keeps_its_scores_its_normalisation_and_says_what_bytes_become() -> None:
    tokenizer = trained("t5")
    found = vocabulary(tokenizer, tokenizer.vocab_size)
    types, scores = found.keys["tokenizer.ggml.token_type"], found.keys["tokenizer.ggml.scores"]
    assert types[tokenizer.unk_id or 0] == UNKNOWN
    assert types.count(BYTE) == 256
    assert found.keys["tokenizer.ggml.precompiled_charsmap"][:1] != b""
    the = tokenizer.vocabulary["▁the"]
    assert -20 < scores[the] < 0
    assert "unknown in llama.cpp" in found.notes[0]


def test_merges_rank_the_pieces_of_bpe() -> None:
    tokenizer = trained("llama")
    scores = vocabulary(tokenizer, tokenizer.vocab_size).keys["tokenizer.ggml.scores"]
    short, long = (tokenizer.vocabulary[piece] for piece in ("▁t", "▁the"))
    assert 0 >= scores[short] > scores[long]


def test_what_llama_cpp_does_not_do_to_a_text_is_refused() -> None:
    with pytest.raises(RequestError, match=r"gguf cannot hold this tokenizer: its normaliser has Replace, .*unigram"):
        vocabulary(trained("albert"), 800)
    with pytest.raises(RequestError, match=r"its normaliser has Precompiled, and llama.cpp's BPE takes text"):
        vocabulary(trained("t5", model="bpe"), 800)


def test_a_table_with_fewer_rows_than_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="the tokenizer has 800 tokens and the model's table 700 rows"):
        vocabulary(trained("t5"), 700)


def test_a_text_may_end_in_two_ways() -> None:
    keys = vocabulary(trained("llama"), 800, (2, 7)).keys
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (2, 7)
    assert "tokenizer.ggml.eot_token_id" not in vocabulary(trained("llama"), 800, (2,)).keys
