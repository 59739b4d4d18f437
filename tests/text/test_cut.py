"""A tokenizer with fewer pieces reads what needs none of the others as before, and stock transformers agrees."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.text import Tokenizer
from lathe.text.bpe import Parts, spell
from lathe.text.cut import Pieces, cut, cut_pieces
from lathe.text.grow import grow, spelt
from lathe.text.spiece import Kind, parse
from lathe.text.use import use_of
from tests.text.samples import CORPUS, KOREAN, SENTENCES, trained, vocabulary_files

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("t5", {}),
    ("t5", {"byte_fallback": False}),
    ("t5", {"model": "bpe"}),
    ("albert", {}),
    ("bert", {}),
    ("gpt2", {}),
    ("bart", {}),
    ("llama", {}),
    ("llama", {"byte_fallback": False}),
    ("llama", {"model": "unigram"}),
]
LINES = [line for text in CORPUS for line in text.splitlines() if line]


def name(value: Any) -> str:
    return "-".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else value


@cache
def pieces_of(convention: str, form: str, options: tuple[tuple[str, Any], ...]) -> Pieces:
    """A trained tokenizer's pieces: of all its files, or of those that spell nothing out."""
    tokenizer = trained(convention, **dict(options))
    if form == "vocabulary":
        tokenizer = Tokenizer.from_files(vocabulary_files(tokenizer), convention=convention)
    return Pieces(tokenizer)


def texts() -> st.SearchStrategy[str]:
    """Text such as the tokenizers were trained on, cut anywhere and mixed with anything."""
    line = st.sampled_from([*LINES, *SENTENCES])
    part = st.tuples(line, st.integers(0, 60), st.integers(1, 60)).map(lambda each: each[0][each[1] :][: each[2]])
    return st.lists(st.one_of(part, line, st.text(max_size=8)), min_size=1, max_size=4).map(" ".join)


@pytest.mark.parametrize("form", ["all", "vocabulary"])
@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
@settings(max_examples=5)
@given(data=st.data())
def test_text_that_needs_no_dropped_piece_is_read_as_before(
    convention: str, options: dict[str, Any], form: str, data: st.DataObject
) -> None:
    pieces = pieces_of(convention, form, tuple(options.items()))
    old = pieces.tokenizer
    shown = data.draw(st.lists(texts(), min_size=1, max_size=3))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    others = random.Random(data.draw(st.integers(0, 99)))
    used = {number for text in shown for number in old.encode(text)}
    made = cut_pieces(pieces, used | {number for number in pieces.texts if others.random() < share})
    new = {row[0]: number for number, row in enumerate(made.rows)}
    assert old.pieces([row[0] for row in made.rows]) == made.tokenizer.pieces(range(len(made.rows)))
    for text in [*shown, data.draw(texts()), *others.sample(LINES, 20)]:
        ids = old.encode(text)
        if new.keys() >= set(ids) and not is_unspelt(pieces, ids):
            assert made.tokenizer.encode(text) == [new[number] for number in ids]
            assert made.tokenizer.decode([new[number] for number in ids]) == old.decode(ids)


def is_unspelt(pieces: Pieces, ids: list[int]) -> bool:
    """Whether WordPiece gave up on a word, which shorter pieces may spell."""
    return pieces.model["type"] == "WordPiece" and pieces.tokenizer.unk_id in ids


def wordpiece(*tokens: str) -> Tokenizer:
    lines = "".join(f"{token}\n" for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens))
    return Tokenizer.from_files({"vocab.txt": lines.encode()}, convention="bert")


def test_a_word_that_could_not_be_spelt_may_be_spelt_by_shorter_pieces() -> None:
    old = wordpiece("a", "ab", "##bc")
    assert old.pieces(old.encode("abc", add_special_tokens=False)) == ["[UNK]"]
    new = cut(old, [5, 7]).tokenizer
    assert new.pieces(new.encode("abc", add_special_tokens=False)) == ["a", "##bc"]


@given(st.text("abcd ", max_size=30), st.sets(st.integers(5, 24)))
def test_with_a_continuing_piece_for_each_character_no_unknown_word_changes(text: str, kept: set[int]) -> None:
    old = wordpiece(*"abc", "##a", "##b", "##c", "ab", "abc", "##bc", "##ca", "bca", "##aab", "ca", "##cab", "bb")
    made = cut(old, kept & {*old.vocabulary.values()} | {*old.encode(text)})
    new = {row[0]: number for number, row in enumerate(made.rows)}
    assert made.tokenizer.encode(text) == [new[number] for number in old.encode(text)]


@pytest.mark.parametrize("convention", ["gpt2", "llama", "bart"])
def test_every_piece_comes_about_from_its_parts_alone(convention: str) -> None:
    pieces = pieces_of(convention, "all", ())
    parts = Parts(pieces.model)
    for number, token in pieces.texts.items():
        needed = {pieces.texts[part] for part in parts.of(token)}
        if not needed:
            continue
        held = needed | {token}
        ranks = {pair: rank for pair, rank in parts.ranks.items() if {*pair, "".join(pair)} <= held}
        *_, last = spell(token, ranks)
        assert last == [token], number


def test_words_that_are_taken_whole_stay_whole() -> None:
    """Llama 3 looks a word up before it merges anything, so some of its pieces come about by no merge."""
    document = json.loads(trained("gpt2").files["tokenizer.json"])
    document["model"]["ignore_merges"] = True
    document["model"]["vocab"]["Ġwithout"] = 500
    old = Tokenizer.from_files({"tokenizer.json": json.dumps(document).encode()})
    text = "The statement is without a class."
    assert "Ġwithout" in old.pieces(old.encode(text))
    made = cut(old, old.encode(text))
    assert made.tokenizer.vocab_size < old.vocab_size
    assert made.tokenizer.pieces(made.tokenizer.encode(text)) == old.pieces(old.encode(text))


def test_specials_sentinels_bytes_and_added_tokens_stay() -> None:
    files = trained("t5").files
    config = json.loads(files["tokenizer_config.json"])
    config["extra_special_tokens"] = [*config["extra_special_tokens"], "<tool>"]
    old = Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(config).encode()})
    made = cut(old, [])
    new = made.tokenizer
    assert len(new.sentinels) == 100
    assert new.pieces([new.token_id("<tool>")])  # type: ignore[list-item]
    for role in ("pad", "eos", "unk"):
        number = getattr(old, f"{role}_id")
        assert made.rows[getattr(new, f"{role}_id")] == (number,)
    assert new.decode(new.encode("뷁 😀")) == "뷁 😀"
    assert all(new.token_id(f"<0x{byte:02X}>") is not None for byte in range(256))


@pytest.mark.parametrize(("convention", "options"), KINDS, ids=name)
def test_the_most_used_fill_a_size_exactly_and_small_sizes_are_refused(
    convention: str, options: dict[str, Any]
) -> None:
    pieces = pieces_of(convention, "all", tuple(options.items()))
    counts = use_of(pieces.tokenizer, KOREAN.splitlines()).counts
    least = len(pieces.required)
    for size in (least, least + 37, pieces.tokenizer.vocab_size):
        made = cut_pieces(pieces, pieces.most_used(counts, size))
        assert made.tokenizer.vocab_size == size == len(made.rows)
    with pytest.raises(RequestError, match=f"take {least}; ask for that at least"):
        pieces.most_used(counts, least - 1)
    with pytest.raises(RequestError, match="tokens to keep"):
        pieces.most_used(counts, pieces.tokenizer.vocab_size + 1)
    used = cut_pieces(pieces, pieces.most_used(counts, None))
    assert used.tokenizer.vocab_size < pieces.tokenizer.vocab_size
    for line in KOREAN.splitlines():
        assert used.tokenizer.pieces(used.tokenizer.encode(line)) == pieces.tokenizer.pieces(
            pieces.tokenizer.encode(line)
        )


def test_the_sentencepiece_file_is_one_and_agrees() -> None:
    import sentencepiece

    for convention, file in (("t5", "spiece.model"), ("llama", "tokenizer.model")):
        old = trained(convention)
        made = cut(old, old.encode(KOREAN)).tokenizer
        model = parse(made.files[file], file)
        assert sum(piece.kind == Kind.BYTE for piece in model.pieces) == 256
        reader = sentencepiece.SentencePieceProcessor(model_proto=made.files[file])
        assert len(reader) == len(model.pieces) == made.vocab_size - len(made.sentinels)
        assert reader.piece_to_id("<pad>") == made.pad_id
        assert reader.unk_id() == made.unk_id
        for line in KOREAN.splitlines():
            assert reader.encode(line) == made.encode(line, add_special_tokens=False)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="id 9000 is outside the vocabulary of 500 tokens"):
        cut(trained("gpt2"), [9000])


def test_text_that_the_tokenizer_cannot_read_is_refused() -> None:
    with pytest.raises(RequestError, match="reads 100% of the corpus as unknown"):
        use_of(trained("bert"), ["ქართული ენა"])
    with pytest.raises(RequestError, match="the corpus is empty"):
        use_of(trained("bert"), ["", " "])
    with pytest.raises(RequestError, match="one string"):
        use_of(trained("bert"), "text")


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(KOREAN, encoding="utf-8")
    tokenizer = trained("llama")
    assert use_of(tokenizer, path).counts == use_of(tokenizer, KOREAN.splitlines()).counts


@pytest.mark.parametrize("convention", ["bert", "llama", "gpt2"])
def test_words_that_a_user_added_stay(convention: str, tmp_path: Path) -> None:
    """Added by `add_tokens`, they are normalised before they are looked for."""
    old = trained(convention)
    old.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    words = ["Neo word", "foobar"]
    document["added_tokens"] += [
        {"id": old.vocab_size + number, "content": word, **flags} for number, word in enumerate(words)
    ]
    file.write_text(json.dumps(document), encoding="utf-8")
    added = Tokenizer.load(tmp_path)
    text = "a Neo word and foobar"
    assert {old.vocab_size, old.vocab_size + 1} <= set(added.encode(text))
    made = cut(added, added.encode(text))
    new = {row[0]: number for number, row in enumerate(made.rows)}
    assert made.tokenizer.vocab_size < old.vocab_size
    assert made.tokenizer.encode(text) == [new[number] for number in added.encode(text)]
    larger = grow(added, spelt(added, ["hippopotamus"]))
    assert larger.tokenizer.encode(text) == added.encode(text)
