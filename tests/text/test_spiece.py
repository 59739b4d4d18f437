"""SentencePiece's file read here, held against SentencePiece itself."""

from __future__ import annotations

from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.text.spiece import Kind, merges, parse
from tests.text.samples import CORPUS, SENTENCES, trained

FILES = {"t5": "spiece.model", "albert": "spiece.model", "llama": "tokenizer.model"}


def model_file(convention: str, **options: Any) -> bytes:
    return trained(convention, **options).files[FILES[convention]]


@pytest.mark.parametrize(("convention", "options"), [("t5", {}), ("t5", {"byte_fallback": False}), ("llama", {})])
def test_the_pieces_are_those_that_sentencepiece_reads(convention: str, options: dict[str, Any]) -> None:
    data = model_file(convention, **options)
    model = parse(data, "a file")
    reader = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert len(model.pieces) == len(reader)
    for number, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (reader.id_to_piece(number), reader.get_score(number))
        assert (piece.kind == Kind.UNKNOWN) == reader.is_unknown(number)
        assert (piece.kind == Kind.CONTROL) == reader.is_control(number)
        assert (piece.kind == Kind.BYTE) == reader.is_byte(number)
    assert model.model == ("bpe" if convention == "llama" else "unigram")
    assert model.byte_fallback == options.get("byte_fallback", True)
    assert bool(model.charsmap) == (convention == "t5")


@pytest.mark.parametrize(
    ("convention", "options"),
    [
        ("t5", {}),
        ("t5", {"model": "bpe"}),
        ("t5", {"byte_fallback": False}),
        ("llama", {}),
        ("llama", {"model": "unigram"}),
    ],
)
def test_text_is_cut_as_sentencepiece_cuts_it(convention: str, options: dict[str, Any]) -> None:
    tokenizer = trained(convention, **options)
    reader = sentencepiece.SentencePieceProcessor(model_proto=model_file(convention, **options))
    lines = [line for text in CORPUS for line in text.splitlines()]
    for line in [*lines, *(sentence for sentence in SENTENCES if "</s>" not in sentence and "ﬁ" not in sentence)]:
        ours, theirs = tokenizer.encode(line, add_special_tokens=False), reader.encode(line)
        # Two cuts of a word can be worth the same; then either will do.
        worth = [sum(reader.get_score(number) for number in ids) for ids in (ours, theirs)]
        tied = tokenizer.decode(ours) == reader.decode(theirs) and worth[0] == pytest.approx(worth[1], abs=1e-3)
        assert ours == theirs or (options.get("model") == "unigram" and tied), line


def test_merges_make_every_piece_from_two_and_in_the_order_of_the_ids() -> None:
    pieces = parse(model_file("llama"), "a file").pieces
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    found = merges(pieces)
    made = [ids[left + right] for left, right in found]
    assert made == sorted(made)
    longer = {piece.text for piece in pieces if piece.kind == Kind.NORMAL and len(piece.text) > 1}
    assert {left + right for left, right in found} == longer
    assert not any("<" in left and ">" in right for left, right in found if (left + right).startswith("<0x"))


@pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_refused(part: float) -> None:
    data = model_file("t5")
    with pytest.raises(RequestError, match=r"x\.model is not a SentencePiece model, or is cut short"):
        parse(data[: int(len(data) * part)], "x.model")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        parse(data, "x.model")


def test_a_tiktoken_file_of_the_same_name_says_what_to_look_for() -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        parse(b"IQ== 0\nIg== 1\nIw== 2\n", "tokenizer.model")


def test_a_model_of_words_is_refused() -> None:
    import io

    result = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 3),
        model_writer=result,
        vocab_size=8,
        model_type="word",
        minloglevel=3,
        hard_vocab_limit=False,
    )
    with pytest.raises(RequestError, match="expected unigram or BPE"):
        parse(result.getvalue(), "x.model")
