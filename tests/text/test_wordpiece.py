"""WordPiece and byte-level vocabularies: which merges, in which order, and the same on every run."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.text.wordpiece import train_bytes, train_wordpiece
from tests.text.samples import CORPUS, trained

CONTROL = ("[PAD]", "[UNK]")


def test_the_most_frequent_pair_is_merged_first() -> None:
    words = Counter({"ab": 5, "abc": 3, "xbc": 1})
    # a ##b is there 8 times; then ab ##c 3 times, since a ##b no longer stands before ##c alone.
    tokens = train_wordpiece(words, 8, CONTROL, 1.0)
    assert tokens == ["[PAD]", "[UNK]", "##b", "##c", "a", "x", "ab", "abc"] or tokens == [
        "[PAD]", "[UNK]", "a", "##b", "##c", "x", "ab", "abc"
    ]  # fmt: skip


def test_every_token_but_the_characters_is_made_of_two_others() -> None:
    tokens = [token for token in trained("bert").vocabulary if not token.startswith("[")]
    known = set(tokens)
    for token in tokens:
        text, mark = token.removeprefix("##"), "##" if token.startswith("##") else ""
        cuts = range(1, len(text))
        assert len(text) == 1 or any({mark + text[:cut], "##" + text[cut:]} <= known for cut in cuts), token


@given(st.dictionaries(st.text("abc가나", min_size=1, max_size=5), st.integers(1, 2500), min_size=1, max_size=6))
def test_a_vocabulary_as_large_as_fits_holds_every_word_whole(counts: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="the largest that fits is") as caught:
        train_wordpiece(Counter(counts), 10_000, CONTROL, 1.0)
    largest = int(str(caught.value).split("fits is ")[1].split(";")[0])
    tokens = train_wordpiece(Counter(counts), largest, CONTROL, 1.0)
    assert len(tokens) == len(set(tokens)) == largest
    assert set(counts) <= set(tokens)


def test_rare_characters_are_left_out_as_asked() -> None:
    words = Counter({"aa": 100, "az": 1})
    assert "##z" in train_wordpiece(words, 6, CONTROL, 1.0)
    tokens = train_wordpiece(words, 5, CONTROL, 0.99)
    assert tokens == ["[PAD]", "[UNK]", "##a", "a", "aa"] or tokens == ["[PAD]", "[UNK]", "a", "##a", "aa"]


def test_too_few_for_the_characters() -> None:
    with pytest.raises(RequestError, match=r"2 special tokens and 4 characters .* take 6"):
        train_wordpiece(Counter({"ab": 1, "xy": 1}), 5, CONTROL, 1.0)
    with pytest.raises(RequestError, match="2 special tokens and 256 bytes take 258"):
        train_bytes(["ab"], 257, CONTROL)


def test_bytes_come_first_and_merges_follow_in_the_order_of_their_ids() -> None:
    vocab, merges = train_bytes(CORPUS, 400, CONTROL)
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert tokens[:2] == list(CONTROL)
    assert all(len(token) == 1 for token in tokens[2:258])
    assert tokens[258:] == [left + right for left, right in merges]
    with pytest.raises(RequestError, match="the largest that fits is 257"):
        train_bytes(["a", "b"], 300, ("<s>",))


def test_the_vocabulary_does_not_depend_on_the_process() -> None:
    # The library's own WordPiece trainer differs from one process to the next.
    import subprocess
    import sys

    code = (
        "import json; from tests.text.samples import trained;"
        "print(json.dumps([trained(c).vocabulary for c in ('bert', 'gpt2')], sort_keys=True))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [trained("bert").vocabulary, trained("gpt2").vocabulary]
